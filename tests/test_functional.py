"""The functions: against their formulas, against each other, and what they write where."""

from __future__ import annotations

import numpy as np
import pytest
from backends_here import over_backends

import bnfast
import bnfast.functional as F
from bnfast import threads
from bnfast.backends import numpy_reference
from bnfast.testing.bounds import assert_same_bits

SHAPES = pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (4, 3, 2, 8), (2, 3, 2, 3, 4)])


def draw(rng, shape=(4, 3, 2, 8), dtype=np.float64):
    return rng.normal(3, 2, shape).astype(dtype)


def vectors(rng, dtype=np.float64):
    """Return running_mean, running_var, weight, bias."""
    return [
        vector.astype(dtype)
        for vector in (rng.normal(size=3), rng.uniform(0.5, 2, 3), *rng.normal(size=(2, 3)))
    ]


def each(vector, x):
    return np.asarray(vector)[:, None].reshape(3, *[1] * (x.ndim - 2))


def statistics(x):
    axes = (0, *range(2, x.ndim))
    return x.mean(axis=axes), x.var(axis=axes)


@over_backends
@SHAPES
def test_eval_formula(rng, shape, backend):
    x = draw(rng, shape)
    residual = draw(rng, shape)
    mean, var, weight, bias = vectors(rng)
    y = F.batch_norm(x, mean, var, weight, bias, eps=0.1, residual=residual, backend=backend)
    xhat = (x - each(mean, x)) / np.sqrt(each(var, x) + 0.1)
    expected = xhat * each(weight, x) + each(bias, x) + residual
    np.testing.assert_allclose(y, expected, rtol=1e-13, atol=1e-13)
    y = F.batch_norm(
        x, mean, var, weight, bias, False, 0.1, 0.1, activation="relu", backend=backend
    )
    np.testing.assert_allclose(y, np.maximum(expected - residual, 0), rtol=1e-13, atol=1e-13)


@over_backends
@SHAPES
def test_train_formula(rng, shape, backend):
    x = draw(rng, shape)
    running_mean, running_var, weight, bias = vectors(rng)
    old_mean, old_var = running_mean.copy(), running_var.copy()
    y = F.batch_norm(x, running_mean, running_var, weight, bias, True, 0.3, 0.1, backend=backend)
    mean, var = statistics(x)
    xhat = (x - each(mean, x)) / np.sqrt(each(var, x) + 0.1)
    expected = xhat * each(weight, x) + each(bias, x)
    np.testing.assert_allclose(y, expected, rtol=1e-13, atol=1e-13)
    count = x.size // 3
    np.testing.assert_allclose(running_mean, 0.7 * old_mean + 0.3 * mean, rtol=1e-13)
    unbiased = var * count / (count - 1)
    np.testing.assert_allclose(running_var, 0.7 * old_var + 0.3 * unbiased, rtol=1e-13)


@over_backends
def test_running_statistics_are_written_in_place_in_their_own_dtype(rng, backend):
    x = draw(rng, dtype=np.float32)
    exact = vectors(rng)[:2]
    F.batch_norm(x, *exact, training=True, backend=backend)
    for dtype in (np.float16, np.float32):
        table = np.zeros((3, 2), dtype)
        table[:, 0], table[:, 1] = start = vectors(rng, dtype)[:2]
        same = [vector.astype(np.float64) for vector in start]
        F.batch_norm(x, *table.T, training=True, backend=backend)
        F.batch_norm(x, *same, training=True, backend=backend)
        for own, wide in zip(table.T, same, strict=True):
            np.testing.assert_array_equal(own, wide.astype(dtype))


@over_backends
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (4, 3, 0)])
def test_an_empty_batch_leaves_the_running_statistics(rng, shape, backend):
    running = vectors(rng)[:2]
    before = [vector.copy() for vector in running]
    assert F.batch_norm(np.empty(shape), *running, training=True, backend=backend).shape == shape
    for vector, copy in zip(running, before, strict=True):
        np.testing.assert_array_equal(vector, copy)


@over_backends
@pytest.mark.parametrize("training", [True, False])
def test_defaults_are_neutral(rng, training, backend):
    x = draw(rng)
    mean, var = vectors(rng)[:2]
    options = {"training": training, "backend": backend}
    bare = F.batch_norm(x, mean.copy(), var.copy(), **options)
    assert_same_bits("y", bare, F.batch_norm(x, mean, var, np.ones(3), np.zeros(3), **options))


@over_backends
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64, np.uint8])
def test_parameters_of_any_real_dtype(rng, dtype, backend):
    x = draw(rng, dtype=np.float32)
    given = [np.array(values, dtype) for values in ([1, 2, 3], [4, 5, 6], [2, 0, 1], [7, 8, 9])]
    wide = [vector.astype(np.float64) for vector in given]
    y = F.batch_norm(x, *given, backend=backend)
    assert y.dtype == np.float32
    assert_same_bits("y", y, F.batch_norm(x, *wide, backend=backend))
    lists = [vector.tolist() for vector in wide]
    assert_same_bits("lists", y, F.batch_norm(x, *lists, backend=backend))


@over_backends
@SHAPES
@pytest.mark.parametrize("activation", [None, "relu"])
def test_with_stats(rng, shape, activation, backend):
    x, residual = draw(rng, shape), draw(rng, shape)
    _, _, weight, bias = vectors(rng)
    out = np.empty(shape)
    options = {"residual": residual, "activation": activation, "backend": backend}
    y, mean, invstd = F.batch_norm_with_stats(x, weight, bias, 0.1, out=out, **options)
    assert y is out
    expected = F.batch_norm(x, None, None, weight, bias, True, eps=0.1, **options)
    assert_same_bits("y", y, expected)
    exact_mean, exact_var = statistics(x)
    assert mean.dtype == invstd.dtype == np.float64
    np.testing.assert_allclose(mean, exact_mean, rtol=1e-14)
    np.testing.assert_allclose(invstd, 1 / np.sqrt(exact_var + 0.1), rtol=1e-13)


@over_backends
@SHAPES
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_backward_formula(rng, shape, training, weighted, activation, backend):
    x, dy = draw(rng, shape), draw(rng, shape)
    mean, var, weight, _ = vectors(rng)
    weight = weight if weighted else None
    invstd = 1 / np.sqrt(var + 0.1)
    y = draw(rng, shape) - 3 if activation else None
    out = np.empty(shape)
    gradients = F.batch_norm_backward(
        dy,
        x,
        weight,
        mean,
        invstd,
        training=training,
        activation=activation,
        y=y,
        residual=True,
        out=out,
        backend=backend,
    )
    g = dy * (y > 0) if activation else dy
    xhat = (x - each(mean, x)) * each(invstd, x)
    axes = (0, *range(2, x.ndim))
    sums = g.sum(axis=axes), (g * xhat).sum(axis=axes)
    scale = each(invstd, x) * (each(weight, x) if weighted else 1.0)
    count = x.size // 3
    centred = g - (each(sums[0], x) + xhat * each(sums[1], x)) / count if training else g
    assert gradients.dx is out
    np.testing.assert_allclose(gradients.dx, scale * centred, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(gradients.dbias, sums[0], rtol=1e-12)
    np.testing.assert_allclose(gradients.dweight, sums[1], rtol=1e-11, atol=1e-12)
    assert gradients.dweight.dtype == gradients.dbias.dtype == np.float64
    np.testing.assert_array_equal(gradients.dresidual, g)


def test_backward_without_a_residual(rng):
    x, dy = draw(rng), draw(rng)
    gradients = F.batch_norm_backward(dy, x, None, np.zeros(3), np.ones(3))
    assert gradients.dresidual is None
    assert not np.shares_memory(gradients.dx, dy)


def test_y_without_an_activation_masks_nothing(rng):
    x, dy = draw(rng), draw(rng)
    given = (dy, x, None, np.zeros(3), np.ones(3))
    with_y = F.batch_norm_backward(*given, y=-np.ones_like(x))
    assert_same_bits("dx", with_y.dx, F.batch_norm_backward(*given).dx)


@over_backends
@SHAPES
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_moments(rng, shape, dtype, backend):
    x = draw(rng, shape, dtype)
    moments = F.moments(x, backend=backend)
    mean, var = statistics(x.astype(np.float64))
    assert isinstance(moments, bnfast.Moments)
    assert moments.count == x.size // 3
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-14)
    np.testing.assert_allclose(moments.m2, var * moments.count, rtol=1e-13)


@over_backends
def test_batches_merged_by_hand_give_the_gradient_of_the_whole(rng, backend):
    """What the functions are in pieces for: statistics from two halves, gradients in two halves."""
    x, dy = draw(rng), draw(rng)
    _, _, weight, _ = vectors(rng)
    whole_y, mean, invstd = F.batch_norm_with_stats(x, weight, backend=backend)
    halves = [slice(0, 1), slice(1, None)]
    merged = F.moments(x[halves[0]]).merge(F.moments(x[halves[1]]))
    np.testing.assert_allclose(merged.mean, mean, rtol=1e-14)
    np.testing.assert_allclose(1 / np.sqrt(merged.m2 / merged.count + 1e-5), invstd, rtol=1e-13)
    parts = [
        F.batch_norm(x[half], merged.mean, merged.m2 / merged.count, weight, backend=backend)
        for half in halves
    ]
    np.testing.assert_allclose(np.concatenate(parts), whole_y, rtol=1e-12, atol=1e-13)
    whole = F.batch_norm_backward(dy, x, weight, mean, invstd, backend=backend)
    sums = [
        F.batch_norm_backward(dy[half], x[half], weight, mean, invstd, backend=backend).dweight
        for half in halves
    ]
    np.testing.assert_allclose(sum(sums), whole.dweight, rtol=1e-12, atol=1e-12)


@over_backends
def test_statistics_without_variance(backend):
    """A negative running variance is not refused, as in torch: its channel is NaN, silently."""
    x = np.ones((2, 3, 2), np.float32)
    y = F.batch_norm(x, np.zeros(3), [-1.0, 0.0, 3.0], eps=0.0, backend=backend)
    np.testing.assert_array_equal(np.isnan(y).all(axis=(0, 2)), [True, False, False])
    np.testing.assert_array_equal(y[:, 1], np.full((2, 2), np.inf))
    np.testing.assert_allclose(y[:, 2], 3**-0.5, rtol=1e-7)


FORMS = pytest.mark.parametrize(
    "form", [pytest.param((0, 1, 2), id="NCS"), pytest.param((0, 2, 1), id="NSC")]
)


def lay(values, form):
    """Return the same values, the axes in the order of ``form`` in memory."""
    return values.transpose(form).copy().transpose(form)


@over_backends
@FORMS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_eval_without_variance_and_eps(rng, dtype, form, backend):
    """It is (x - mean) / 0: an infinity of its sign, and 0 / 0 where x is the mean."""
    mean = rng.integers(-9, 9, 7).astype(float)
    sign = rng.integers(-1, 2, (3, 7, 67))
    weight, bias = rng.uniform(0.5, 2, 7) * rng.choice([-1.0, 1.0], 7), rng.normal(size=7)
    x = lay((mean[:, None] + sign * rng.integers(1, 5, sign.shape)).astype(dtype), form)
    y = F.batch_norm(x, mean, np.zeros(7), weight, bias, eps=0.0, backend=backend)
    expected = np.where(sign == 0, np.nan, np.copysign(np.inf, sign * weight[:, None]))
    np.testing.assert_array_equal(y, expected)


@over_backends
@FORMS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["x", "mean"])
def test_eval_gradient_beside_what_is_not_finite(rng, where, poison, dtype, form, backend):
    """dx = weight * invstd * dy, whatever x and the running mean hold."""
    x, dy = (lay(rng.normal(size=(3, 7, 67)).astype(dtype), form) for _ in range(2))
    mean, weight, invstd = rng.normal(size=7), rng.normal(size=7), rng.uniform(0.5, 2, 7)
    if where == "mean":
        mean[rng.integers(7)] = poison
    else:
        x[rng.random(x.shape) < 0.1] = poison
    gradients = F.batch_norm_backward(dy, x, weight, mean, invstd, training=False, backend=backend)
    expected = (weight * invstd)[:, None] * dy.astype(np.float64)
    np.testing.assert_allclose(gradients.dx, expected, rtol=4 * np.finfo(dtype).eps, atol=0)


@over_backends
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_poisoned_channel_keeps_to_itself(rng, poison, backend):
    x = draw(rng, dtype=np.float32)
    clean = bnfast.BatchNorm2d(3, backend=backend)
    poisoned = bnfast.BatchNorm2d(3, backend=backend)
    expected = clean(x)
    x[1, 1, 0, 3] = poison
    y = poisoned(x)
    assert_same_bits("other channels", y[:, ::2], expected[:, ::2])
    assert np.isnan(y[:, 1]).all()
    np.testing.assert_array_equal(np.isnan(poisoned.running_var), [False, True, False])
    np.testing.assert_array_equal(clean.running_var[::2], poisoned.running_var[::2])


class Stop(Exception):
    """What the kernels of the next test raise, as an interrupt would."""


@pytest.mark.parametrize("kernel", ["moments", "normalize", "train", "backward", "backward_sums"])
def test_an_interrupted_kernel_changes_no_state_and_frees_the_threads(monkeypatch, kernel):
    def stop(*arguments, **keywords):
        raise Stop

    x = np.ones((2, 16, 64, 64), np.float32)
    layer = bnfast.BatchNorm2d(16, backend="numpy")
    vectors = (np.zeros(16), np.ones(16))
    y, before = layer(x), layer.state_dict()
    calls = {
        "moments": lambda: F.moments(x, backend="numpy"),
        "normalize": lambda: F.batch_norm(x, *vectors, backend="numpy"),
        "train": lambda: layer(x),
        "backward": lambda: layer.backward(y),
        "backward_sums": lambda: F.batch_norm_backward(
            y, x, None, *vectors, training=False, backend="numpy"
        ),
    }
    monkeypatch.setattr(numpy_reference, kernel, stop)
    with bnfast.use_num_threads(2):
        with pytest.raises(Stop):
            calls[kernel]()
        claimed = threads.claim(x.size)
        threads.free[claimed > 1] = True
    assert claimed == 2
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    assert layer.grad_weight is None
