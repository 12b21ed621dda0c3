"""Large outputs of the Numba kernels go past the cache, in whole lines, with the same bits.

In place nothing is streamed, so the in-place call on a copy is what the streamed one must equal.
"""

import numpy as np
import pytest

from bnfast.backends import caches

numba_parallel = pytest.importorskip(
    "bnfast.backends.numba_parallel", reason="Numba is not installed"
)

# Where a step of sixteen elements falls: within runs, across two, across many; on whole rows, on
# rows that are no multiple of a step; the last one short.
FORMS = [(5, 64), (3, 49), (64, 7), (1, 1), (2, 16), (67,), (64,), (1,), (1030,)]


def at_offset(values, offset):
    """Return a copy that begins ``offset`` elements behind the start of a cache line."""
    room = np.empty(values.nbytes + 128, np.uint8)
    start = -room.ctypes.data % 64 + offset * values.itemsize
    copy = room[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


@pytest.fixture(autouse=True)
def caches_of_32_kib():
    numba_parallel.assume_caches(4 << 10, 32 << 10)
    yield
    numba_parallel.assume_caches(*caches.sizes())


def large(rng, form, dtype):
    """Return an array that alone outgrows the caches, of samples or rows of a form."""
    samples = (1 << 20) // np.dtype(dtype).itemsize // int(np.prod(form)) + 3
    return rng.normal(3, 2, (samples, *form)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_normalize(rng, form, dtype):
    x = large(rng, form, dtype)
    mean, bias = rng.normal(size=(2, form[0]))
    var, weight = rng.uniform(0.5, 2, (2, form[0]))
    given = (mean, var, weight, bias, 1e-5)
    y = at_offset(np.full_like(x, np.nan), int(rng.integers(8)))
    numba_parallel.normalize(x, *given, None, y=y, relu=False, num_threads=2)
    ordinary = x.copy()
    numba_parallel.normalize(ordinary, *given, None, y=ordinary, relu=False, num_threads=1)
    np.testing.assert_array_equal(y, ordinary)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_train(rng, form):
    x = large(rng, form, np.float32)
    residual = rng.normal(size=x.shape).astype(np.float32)
    bias = rng.normal(size=form[0])
    weight = rng.uniform(0.5, 2, form[0])
    given = (weight, bias, 1e-5, residual)
    stats = {"mean": np.empty(form[0]), "m2": np.empty(form[0]), "relu": True}
    y = at_offset(np.full_like(x, np.nan), int(rng.integers(8)))
    numba_parallel.train(x, *given, y=y, num_threads=2, **stats)
    ordinary = x.copy()
    numba_parallel.train(ordinary, *given, y=ordinary, num_threads=1, **stats)
    np.testing.assert_array_equal(y, ordinary)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_backward(rng, form):
    x = large(rng, form, np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)
    mean = rng.normal(3, 0.1, form[0])
    invstd, weight = rng.uniform(0.5, 2, (2, form[0]))
    sums = {"sum_dy": np.empty(form[0]), "sum_dy_xhat": np.empty(form[0])}
    dx = at_offset(np.full_like(x, np.nan), int(rng.integers(8)))
    given = (x, None, mean, invstd, weight)
    numba_parallel.backward(dy, *given, dx=dx, dresidual=None, relu=False, num_threads=2, **sums)
    numba_parallel.backward(dy, *given, dx=dy, dresidual=None, relu=False, num_threads=1, **sums)
    np.testing.assert_array_equal(dx, dy)


def test_the_callers_number_of_threads_is_put_back(rng):
    numba = pytest.importorskip("numba")
    x = rng.normal(size=(64, 16)).astype(np.float32)
    mean, m2 = np.empty((2, 16))
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        numba_parallel.moments(x, mean=mean, m2=m2, num_threads=2)
        assert numba.get_num_threads() == 1
    finally:
        numba.set_num_threads(before)
