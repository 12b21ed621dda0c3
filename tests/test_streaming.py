"""Large channels-last outputs are written past the cache, in whole lines, with the same bits.

In place nothing is streamed, so the in-place call on a copy is what the streamed one must equal.
"""

import itertools

import numpy as np
import pytest

cython_openmp = pytest.importorskip(
    "bnfast.backends.cython_openmp", reason="the extension was not built"
)

LEVELS = ("baseline", "x86-64-v3", "x86-64-v4")


@pytest.fixture(params=LEVELS)
def level(request):
    best = cython_openmp.instruction_set()
    cython_openmp.limit_instruction_set(request.param)
    if cython_openmp.instruction_set() != request.param:
        cython_openmp.limit_instruction_set(best)
        pytest.skip(f"this CPU does not run {request.param}")
    yield request.param
    cython_openmp.limit_instruction_set(best)


def at_offset(values, offset):
    """Return a copy that begins ``offset`` elements behind the start of a cache line."""
    room = np.empty(values.nbytes + 128, np.uint8)
    start = -room.ctypes.data % 64 + offset * values.itemsize
    copy = room[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("width", [67, 64, 1, 1030])
def test_streamed_output_has_the_bits_of_the_ordinary_one(rng, level, width, dtype):
    rows = (16 << 20) // np.dtype(dtype).itemsize // width + 3
    x = rng.normal(3, 2, (rows, width)).astype(dtype)
    residual = rng.normal(size=x.shape).astype(dtype)
    mean, bias = rng.normal(size=(2, width))
    var, weight = rng.uniform(0.5, 2, (2, width))
    given = (mean, var, weight, bias, 1e-5)
    for offset, (add, relu) in zip(
        rng.permutation(8)[:4], itertools.product((False, True), repeat=2), strict=True
    ):
        y = at_offset(np.full_like(x, np.nan), int(offset))
        other = residual if add else None
        cython_openmp.normalize(x, *given, other, y=y, relu=relu, num_threads=2)
        ordinary = x.copy()
        cython_openmp.normalize(ordinary, *given, other, y=ordinary, relu=relu, num_threads=2)
        np.testing.assert_array_equal(y, ordinary)
