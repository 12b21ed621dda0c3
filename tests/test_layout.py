"""Any strided array is computed like its contiguous copy, and the output lies as the input does.

Comparisons are of bits: in eval mode always, in training where x is copied into the order of axes
that it is compared with. In another order sums are cut into other parts, and their last bits may
differ, so there the bounds of `bnfast.spec` take over. The two sums of the backward pass have the
same bits in any order here: x, dy, mean and invstd have so few digits that no sum rounds.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from backends_here import over_backends
from numpy.lib.stride_tricks import as_strided
from strided import DENSE, LAYOUTS, WRITABLE, memory_of, permuted, stepped

import bnfast
import bnfast.functional as F
from bnfast import layout, spec
from bnfast.backends import host_arrays
from bnfast.testing.bounds import assert_same_bits

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
EVERY_LAYOUT = pytest.mark.parametrize("lies", LAYOUTS)
SHAPE = (4, 3, 2, 8)
WEIGHT, BIAS = np.array([1.5, -0.7, 0.3]), np.array([0.1, 2.0, -3.0])
DYADIC = np.array([0.5, -1.0, 2.0]), np.array([0.5, 2.0, 0.25])
MEAN, VAR = np.array([0.5, -3.0, 1.25]), np.array([4.0, 0.3, 2.0])
UNIT = 2.0**-53


def integers(rng, dtype, shape=SHAPE):
    return rng.integers(-8, 9, shape).astype(dtype)


def any_layout(rng, values, among=LAYOUTS):
    return among[rng.choice(list(among))](values)


def assert_lies_like(y, x):
    """NumPy's own rule for "the same order of axes" is that of `numpy.empty_like`."""
    expected = np.empty_like(x).strides
    long = [axis for axis in range(x.ndim) if x.shape[axis] > 1]
    if x.size:
        assert [y.strides[axis] for axis in long] == [expected[axis] for axis in long]
    assert y.dtype == x.dtype.newbyteorder("=")
    assert y.dtype.isnative
    assert y.flags.aligned


def is_in_order(x):
    """Return whether ``x`` gets the kernel form of its C-contiguous copy."""
    return layout.plan(x.shape, x.strides, x.dtype).axes is None


def assert_same_training(y, expected, x, residual, layer):
    """Compare with the output for the contiguous copy: bits, or one rounding in another order."""
    if is_in_order(x):
        assert_same_bits("y", y, expected)
        return
    wide = x.astype(np.float64)
    mean, var = (f(wide, axis=(0, 2, 3), keepdims=True) for f in (np.mean, np.var))
    std = np.sqrt(var + layer.eps)
    weight, bias = layer.weight[:, None, None], layer.bias[:, None, None]
    xhat = (wide - mean) / std
    scale = spec.output_scale(xhat, weight, bias, residual, expected)
    scale = np.maximum(scale, np.abs(xhat * weight + bias))  # rounded before the residual is added
    if y.dtype == np.float32:
        bound = np.spacing(scale.astype(np.float32))
    else:
        bound = 2 * spec.Y_UNITS_FLOAT64 * UNIT * (1 + np.abs(mean / std)) * scale
    assert (np.abs(y - expected) <= bound).all()


def assert_same_gradients(gradients, expected, x, vectors, *, training):
    """Everything has the same bits but dx in training: there one ulp of its scale is allowed.

    dx then is a sum of two products, which a kernel may contract otherwise for another form.
    """
    for name in ("dweight", "dbias", "dresidual"):
        assert_same_bits(name, getattr(gradients, name), getattr(expected, name))
    if not training:
        assert_same_bits("dx", gradients.dx, expected.dx)
        return
    weight, mean, invstd = (vector[:, None, None] for vector in vectors)
    sums = (vector[:, None, None] / 64 for vector in (expected.dbias, expected.dweight))
    xhat = (x - mean) * invstd
    scale = spec.gradient_scale(expected.dresidual, xhat, invstd, weight, *sums).astype(x.dtype)
    assert (np.abs(gradients.dx - expected.dx) <= np.spacing(scale)).all()


@EVERY_LAYOUT
@DTYPES
def test_a_layout_holds_its_values(rng, lies, dtype):
    values = integers(rng, dtype)
    x = LAYOUTS[lies](values)
    assert_same_bits("values", x.astype(dtype), values)
    unchanged = {"axes0123", "read_only", "mapped", "read_only_mapped"}
    contiguous = x.flags.c_contiguous and x.flags.aligned and x.dtype.isnative
    assert contiguous == (lies in unchanged)


@over_backends
@EVERY_LAYOUT
@DTYPES
def test_eval(rng, lies, dtype, backend):
    values, added = rng.normal(3, 2, SHAPE).astype(dtype), rng.normal(size=SHAPE).astype(dtype)
    x, residual = LAYOUTS[lies](values), any_layout(rng, added)
    arguments = (MEAN, VAR, WEIGHT, BIAS)
    y = F.batch_norm(x, *arguments, residual=residual, activation="relu", backend=backend)
    expected = F.batch_norm(values, *arguments, residual=added, activation="relu", backend=backend)
    assert_same_bits("y", y, expected)
    assert_lies_like(y, x)
    assert_same_bits("x after the call", x.astype(dtype), values)
    assert_same_bits("residual after the call", residual.astype(dtype), added)


@over_backends
@EVERY_LAYOUT
@DTYPES
def test_train(rng, lies, dtype, backend):
    values, added = integers(rng, dtype), integers(rng, dtype)
    x, residual = LAYOUTS[lies](values), any_layout(rng, added)
    layers = [bnfast.BatchNorm2d(3, backend=backend) for _ in range(2)]
    for layer in layers:
        layer.weight, layer.bias = WEIGHT, BIAS
    y = layers[0](x, residual=residual)
    expected = layers[1](values, residual=added)
    assert_same_training(y, expected, x, residual, layers[0])
    assert_lies_like(y, x)
    if is_in_order(x):
        for name, vector in layers[1].state_dict().items():
            np.testing.assert_array_equal(layers[0].state_dict()[name], vector)
    assert_same_bits("x after the call", x.astype(dtype), values)


@over_backends
@EVERY_LAYOUT
@DTYPES
@pytest.mark.parametrize("training", [True, False])
def test_backward(rng, lies, dtype, training, backend):
    values, slope, result = (integers(rng, dtype) for _ in range(3))
    x, dy, y = LAYOUTS[lies](values), any_layout(rng, slope), any_layout(rng, result)
    vectors = (WEIGHT, *DYADIC)
    options = {
        "activation": "relu",
        "residual": True,
        "training": training,
        "backend": backend,
    }
    gradients = F.batch_norm_backward(dy, x, *vectors, y=y, **options)
    expected = F.batch_norm_backward(slope, values, *vectors, y=result, **options)
    assert_same_gradients(gradients, expected, values, vectors, training=training)
    assert_lies_like(gradients.dx, x)
    assert_lies_like(gradients.dresidual, x)
    for name, array, copy in (("x", x, values), ("dy", dy, slope), ("y", y, result)):
        assert_same_bits(f"{name} after the call", array.astype(dtype), copy)


@over_backends
@EVERY_LAYOUT
@DTYPES
def test_moments(rng, lies, dtype, backend):
    values = integers(rng, dtype)
    moments = F.moments(LAYOUTS[lies](values), backend=backend)
    assert moments.count == 64
    rows = np.moveaxis(values, 1, 0).reshape(3, -1).astype(np.float64)
    mean, m2 = rows.mean(axis=1), 64 * rows.var(axis=1)
    unit = spec.SUM_UNITS * UNIT
    assert (np.abs(moments.mean - mean) <= unit * np.abs(rows).mean(axis=1)).all()
    assert (np.abs(moments.m2 - m2) <= unit * m2 + 64 * (unit * mean) ** 2).all()


@over_backends
@pytest.mark.parametrize("lies", WRITABLE)
@DTYPES
def test_out_of_any_layout(rng, lies, dtype, backend):
    values = rng.normal(3, 2, SHAPE).astype(dtype)
    out = WRITABLE[lies](np.full(SHAPE, 7.0, dtype))
    around = memory_of(out).copy()
    y = F.batch_norm(any_layout(rng, values), MEAN, VAR, WEIGHT, BIAS, out=out, backend=backend)
    assert y is out
    assert_same_bits("y", y, F.batch_norm(values, MEAN, VAR, WEIGHT, BIAS, backend=backend))
    out[...] = 7.0
    np.testing.assert_array_equal(memory_of(out), around, "memory around out was written")


@over_backends
@pytest.mark.parametrize("lies", WRITABLE)
@DTYPES
def test_in_place(rng, lies, dtype, backend):
    values = integers(rng, dtype)
    for target in ("x", "residual"):
        arrays = {"x": LAYOUTS["axes0123"](values), "residual": LAYOUTS["axes0123"](values)}
        arrays[target] = WRITABLE[lies](values)
        around = memory_of(arrays[target]).copy()
        layer = bnfast.BatchNorm2d(3, backend=backend)
        y = layer(**arrays, out=arrays[target])
        assert y is arrays[target]
        expected = bnfast.BatchNorm2d(3, backend=backend)(values, residual=values)
        x = arrays["x"] if target == "residual" else WRITABLE[lies](values)
        assert_same_training(y, expected, x, values, layer)
        y[...] = values
        np.testing.assert_array_equal(memory_of(y), around, "memory around out was written")


@over_backends
@pytest.mark.parametrize("lies", WRITABLE)
@DTYPES
def test_backward_in_place_of_dy(rng, lies, dtype, backend):
    values, slope = integers(rng, dtype), integers(rng, dtype)
    dy = WRITABLE[lies](slope)
    around = memory_of(dy).copy()
    vectors = (WEIGHT, *DYADIC)
    gradients = F.batch_norm_backward(
        dy, any_layout(rng, values), *vectors, residual=True, out=dy, backend=backend
    )
    expected = F.batch_norm_backward(slope, values, *vectors, residual=True, backend=backend)
    assert gradients.dx is dy
    assert_same_gradients(gradients, expected, values, vectors, training=True)
    dy[...] = slope
    np.testing.assert_array_equal(memory_of(dy), around, "memory around out was written")


@over_backends
@pytest.mark.parametrize(
    "shape", [s for s in itertools.product((1, 4), (1, 3), (1, 2), (1, 8)) if s != (1, 1, 1, 1)]
)
def test_broadcast(rng, shape, backend):
    x = np.broadcast_to(integers(rng, np.float32, shape), SHAPE)
    layers = [bnfast.BatchNorm2d(3, backend=backend) for _ in range(2)]
    y, expected = layers[0](x), layers[1](np.ascontiguousarray(x))
    assert_same_training(y, expected, x, 0.0, layers[0])
    assert_lies_like(y, x)
    dy = np.broadcast_to(np.float32(1.5), SHAPE)
    assert layers[0].backward(dy).shape == SHAPE
    np.testing.assert_array_equal(layers[0].grad_bias, np.full(3, 96, np.float32))


@over_backends
@pytest.mark.parametrize("stride", [0, -4, 12, 2**40])
@pytest.mark.parametrize("shape", list(itertools.product((1, 2), repeat=4)))
def test_strides_of_axes_of_length_1_mean_nothing(rng, shape, stride, backend):
    values = integers(rng, np.float32, shape)
    strides = [stride if n == 1 else s for n, s in zip(shape, values.strides, strict=True)]
    x = as_strided(values, shape, strides)
    mean, var = np.zeros(shape[1]), np.ones(shape[1])
    y = F.batch_norm(x, mean, var, backend=backend)
    assert_same_bits("y", y, F.batch_norm(values, mean, var, backend=backend))
    plan = layout.plan(x.shape, x.strides, x.dtype)
    assert np.shares_memory(host_arrays.view(x, plan), values)


@over_backends
@EVERY_LAYOUT
@pytest.mark.parametrize(
    "shape", [(0, 3, 2, 8), (4, 0, 2, 8), (4, 3, 0, 8), (4, 3, 2, 0), (0, 0, 0, 0)]
)
def test_empty(lies, shape, backend):
    x = LAYOUTS[lies](np.empty(shape, np.float32))
    layer = bnfast.BatchNorm2d(shape[1], backend=backend)
    before = layer.state_dict()
    y = layer(x)
    assert (y.shape, y.dtype) == (shape, np.float32)
    assert layer.backward(y).shape == shape
    np.testing.assert_array_equal(layer.grad_weight, np.zeros(shape[1]))
    np.testing.assert_array_equal(layer.grad_bias, np.zeros(shape[1]))
    after = layer.state_dict()
    assert after.pop("num_batches_tracked") == 1
    for name, vector in after.items():
        np.testing.assert_array_equal(vector, before[name])
    assert layer.eval()(x).shape == shape


@pytest.mark.parametrize("ndim", [2, 3, 4, 5])
def test_plan(rng, ndim):
    """Each place of the kernel form belongs to the channel that the form says."""
    for _ in range(300):
        shape = tuple(int(n) for n in rng.integers(1, 5, ndim))
        order = tuple(int(axis) for axis in rng.permutation(ndim))
        of_channel = np.broadcast_to(
            np.arange(shape[1], dtype=np.float32).reshape(-1, *[1] * (ndim - 2)), shape
        )
        x = permuted(order)(of_channel)
        if rng.random() < 0.3:
            x = stepped(int(rng.integers(ndim)))(x)
        plan = layout.plan(x.shape, x.strides, x.dtype)
        form = host_arrays.view(x, plan)
        assert form.shape == plan.kernel_shape
        assert len(form.shape) in (2, 3)
        assert form.shape[1] == shape[1]
        assert plan.count == x.size // shape[1]
        assert form.size == x.size
        channel = np.arange(shape[1]).reshape(-1, *[1] * (form.ndim - 2))
        np.testing.assert_array_equal(form, np.broadcast_to(channel, form.shape))
        assert form.flags.c_contiguous
        assert plan.dense == np.shares_memory(form, x)

        y = host_arrays.empty(plan, x)
        assert y.shape == shape
        assert layout.lies_as(y, plan)
        assert np.shares_memory(host_arrays.view(y, plan), y)
        if plan.axes is not None:
            assert [plan.axes[axis] for axis in plan.inverse] == list(range(ndim))
            assert plan.memory_shape == tuple(shape[axis] for axis in plan.axes)
        else:
            assert plan.inverse is None
            assert plan.memory_shape == shape


@EVERY_LAYOUT
@DTYPES
def test_kernels_get_what_the_contract_says(rng, lies, dtype):
    """C-contiguous, aligned, in native byte order; and a view where the array is all that."""
    x = LAYOUTS[lies](integers(rng, dtype))
    plan = layout.plan(x.shape, x.strides, x.dtype)
    form = host_arrays.view(x, plan)
    assert form.flags.c_contiguous
    assert form.flags.aligned
    assert form.dtype == dtype
    fits = plan.dense and x.flags.aligned and x.dtype.isnative
    assert np.shares_memory(form, x) == fits
    if lies in DENSE:
        assert fits


def test_plan_depends_on_metadata_alone():
    x = np.empty((2, 3, 4, 5), np.float32)
    plan = layout.plan(x.shape, x.strides, x.dtype)
    other = np.empty_like(x)
    assert layout.plan(other.shape, other.strides, other.dtype) == plan
    assert layout.plan(x.shape, x.strides, x.dtype.newbyteorder("S")).dtype == np.float32


def test_kernel_forms_of_common_layouts():
    def form(x):
        return layout.plan(x.shape, x.strides, x.dtype).kernel_shape

    x = np.empty((2, 3, 4, 5), np.float32)
    assert form(x) == (2, 3, 20)
    assert form(DENSE["axes0231"](x)) == (40, 3)
    assert form(DENSE["axes3210"](x)) == (20, 3, 2)
    assert form(np.empty((7, 3))) == (7, 3)
    assert form(np.empty((7, 1, 5, 5))) == (1, 1, 175)
    assert form(np.empty((7, 3, 1, 1))) == (7, 3)


def test_out_that_lies_otherwise_is_written_by_a_copy():
    x = np.ones((2, 3, 4, 5), np.float32)
    plan = layout.plan(x.shape, x.strides, x.dtype)
    for name, lay in WRITABLE.items():
        assert layout.lies_as(lay(x), plan) == (name in {"axes0123", "mapped"}), name
