"""float16 and bfloat16 through the public names: what goes in, what comes out, who refuses them."""

from __future__ import annotations

import platform
import subprocess
import sys

import numpy as np
import pytest

import bnfast
import bnfast.functional as F
from bnfast import registry
from bnfast.errors import BackendUnavailableError
from bnfast.testing.bounds import assert_same_bits
from bnfast.testing.cases import STORAGE, over

SHAPE = (4, 3, 5, 7)
STRIDED = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "gaps": lambda x: np.repeat(x, 2, axis=3)[..., ::2],
    "reversed": lambda x: np.ascontiguousarray(x[::-1])[::-1],
    "unaligned": lambda x: unaligned(x),
    "read-only": lambda x: np.broadcast_to(x, x.shape),
}


def unaligned(x):
    buffer = np.empty(x.nbytes + 1, np.uint8)[1:]
    moved = buffer.view(x.dtype).reshape(x.shape)
    moved[...] = x
    return moved


@pytest.fixture(params=[name for name in registry._table if name != "cuda"])
def backend(request) -> str:
    """Return each backend of the host that takes 16-bit storage here; see `test_cuda_arrays`."""
    try:
        kernels = registry.load(request.param)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    dtype = request.node.callspec.params.get("dtype", np.float16).__name__
    if dtype not in getattr(kernels, "STORAGE_DTYPES", ()):
        pytest.skip(f"{request.param} does not take {dtype} here")
    return request.param


def draw(rng, dtype, shape=SHAPE):
    return rng.normal(3.0, 2.0, shape).astype(dtype)


def nearly(actual, expected):
    """Check a 16-bit result against that of float32: both round the same exact result."""
    assert actual.shape == expected.shape
    digits = {"float16": 11, "bfloat16": 8}[actual.dtype.name]
    error = np.abs(actual.astype(np.float64) - expected)
    assert (error <= 2.0**-digits * np.maximum(np.abs(expected), 1.0) * 1.01).all()


@over("dtype", STORAGE)
@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("training", [True, False])
def test_result_has_the_dtype_and_layout_of_x(rng, backend, dtype, layout, training):
    x = STRIDED[layout](draw(rng, dtype))
    mean, var = np.full(3, 3.0, np.float32), np.full(3, 4.0, np.float32)
    y = F.batch_norm(x, mean, var, training=training, backend=backend)
    assert y.dtype == dtype
    assert y.flags.aligned
    mean, var = np.full(3, 3.0, np.float32), np.full(3, 4.0, np.float32)
    nearly(y, F.batch_norm(x.astype(np.float32), mean, var, training=training, backend=backend))
    if layout in ("contiguous", "channels-last"):
        assert y.strides == x.strides


def test_float16_of_the_other_byte_order(rng, backend):
    x = draw(rng, np.float16)
    swapped = x.astype(x.dtype.newbyteorder())
    y = F.batch_norm(swapped, None, None, training=True, backend=backend)
    assert y.dtype == np.float16
    assert_same_bits("y", y, F.batch_norm(x, None, None, training=True, backend=backend))


@over("dtype", STORAGE)
@pytest.mark.parametrize("parameters", [np.float32, np.float64, "own"])
def test_parameters_of_any_mix(rng, backend, dtype, parameters):
    x = draw(rng, dtype)
    own = dtype if parameters == "own" else parameters
    weight, bias = (rng.normal(size=3).astype(own) for _ in range(2))
    mean, var = np.full(3, 3.0, np.float64), np.full(3, 4.0, np.float32)
    wide = [vector.astype(np.float64) for vector in (mean, var, weight, bias)]
    one = F.batch_norm(x, mean, var, weight, bias, backend=backend)
    assert one.dtype == dtype
    assert_same_bits("y", one, F.batch_norm(x, *wide, backend=backend))


@over("dtype", STORAGE)
def test_layer_trains_on_it(rng, backend, dtype):
    layer, twin = (
        bnfast.BatchNorm2d(3, activation="relu", backend=backend, dtype=np.float64)
        for _ in range(2)
    )
    x, residual, dy = (draw(rng, dtype) for _ in range(3))
    y = layer(x, residual)
    dx = layer.backward(dy)
    assert y.dtype == dx.dtype == layer.grad_residual.dtype == dtype
    wide = [a.astype(np.float64) for a in (x, residual, dy)]
    nearly(y, twin(wide[0], wide[1]))
    # The gradient passes where y of 16 bits is positive, which y of float64 is nearly everywhere.
    twin._saved = (wide[0], y.astype(np.float64), *twin._saved[2:])
    nearly(dx, twin.backward(wide[2]))
    np.testing.assert_allclose(layer.running_mean, twin.running_mean, rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, twin.running_var, rtol=1e-10)
    np.testing.assert_allclose(layer.grad_weight, twin.grad_weight, rtol=1e-10)
    np.testing.assert_allclose(layer.grad_bias, twin.grad_bias, rtol=1e-10)


@over("dtype", STORAGE)
@pytest.mark.parametrize("training", [True, False])
def test_out_and_in_place(rng, backend, dtype, training):
    x, residual = draw(rng, dtype), draw(rng, dtype)

    def call(**options):
        mean, var = np.full(3, 3.0), np.full(3, 4.0)
        return F.batch_norm(options.pop("x", x), mean, var, training=training, **options)

    expected = call(residual=residual, backend=backend)
    for out in (np.empty_like(x), np.empty_like(x)[::-1], np.empty(SHAPE[::-1], dtype).T):
        assert call(residual=residual, out=out, backend=backend) is out
        assert_same_bits("out", out, expected)
    own = x.copy()
    assert call(x=own, residual=residual, out=own, backend=backend) is own
    assert_same_bits("in place", own, expected)


@over("dtype", STORAGE)
def test_moments(rng, backend, dtype):
    x = draw(rng, dtype)
    own, wide = F.moments(x, backend=backend), F.moments(x.astype(np.float64), backend=backend)
    np.testing.assert_allclose(own.mean, wide.mean, rtol=1e-12)
    np.testing.assert_allclose(own.m2, wide.m2, rtol=1e-10)


@over("dtype", STORAGE)
def test_large_outputs_are_recycled(rng, backend, dtype):
    x = np.ones((8, 16, 64, 128), dtype)
    y = F.batch_norm(x, np.zeros(16), np.ones(16), backend=backend)
    assert y.nbytes == 2 * 2**20
    assert y.ctypes.data % 64 == 0
    assert y.dtype == dtype
    assert (y.view(np.uint16) == x.view(np.uint16)).all()


@over("dtype", STORAGE)
def test_other_arrays_must_share_its_dtype(rng, dtype):
    x = draw(rng, dtype)
    other = x.astype(np.float32)
    with pytest.raises(TypeError, match="residual should have the dtype of x"):
        F.batch_norm(x, None, None, training=True, residual=other, backend="numpy")
    with pytest.raises(TypeError, match="out should have dtype"):
        F.batch_norm(x, None, None, training=True, out=other, backend="numpy")
    with pytest.raises(TypeError, match="residual should have the dtype of x"):
        F.batch_norm(other, None, None, training=True, residual=x, backend="numpy")


@over("dtype", STORAGE)
def test_backend_without_it_refuses(rng, add_backend, dtype):
    add_backend("plain")
    x = draw(rng, dtype)
    sentence = (
        f"^backend 'plain' takes arrays of float32 and float64 here, got dtype {dtype.__name__}; "
        r"cast it first, for example x\.astype\(np\.float32\)$"
    )
    with pytest.raises(TypeError, match=sentence):
        F.batch_norm(x, None, None, training=True, backend="plain")
    with pytest.raises(TypeError, match=sentence):
        F.moments(x, backend="plain")
    layer = bnfast.BatchNorm2d(3, backend="plain")
    with pytest.raises(TypeError, match=sentence):
        layer(x)
    assert layer.num_batches_tracked == 0


def test_numba_refuses_float16_where_the_cpu_does_not_convert_it(monkeypatch):
    pytest.importorskip("numba")
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("not an x86 CPU")
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+sse2")
    code = (
        "import numpy as np, bnfast\n"
        "bnfast.BatchNorm2d(3, backend='numba')(np.ones((2, 3, 4, 4), np.float16))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "takes arrays of float32, bfloat16 and float64 here, got dtype float16" in run.stderr


def test_other_dtypes_of_ml_dtypes_are_refused():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.ones(SHAPE, ml_dtypes.float8_e5m2)
    with pytest.raises(TypeError, match="got dtype float8_e5m2; cast it first"):
        F.moments(x)


def test_nothing_imports_ml_dtypes():
    code = (
        "import sys, numpy as np, bnfast\n"
        "bnfast.BatchNorm2d(3, backend='numpy')(np.ones((2, 3, 4, 4), np.float16))\n"
        "assert 'ml_dtypes' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
