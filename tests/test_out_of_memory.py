"""Memory that runs out: whichever allocation fails, a call raises MemoryError, nothing changes."""

from __future__ import annotations

import ctypes
import sys

import numpy as np
import pytest
from backends_here import over_backends
from fresh_python import output_of
from numba import cfunc, types

import bnfast
import bnfast.functional as F
from bnfast import channels
from bnfast.testing.bounds import assert_same_bits


class _Handler(ctypes.Structure):
    """NumPy's ``PyDataMem_Handler`` (NEP 49)."""

    _fields_ = (
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("countdown", ctypes.c_void_p),
        ("functions", ctypes.c_void_p * 4),
    )


def _c(name, *arguments, result=ctypes.c_size_t):
    function = getattr(ctypes.CDLL(None), name)
    function.argtypes, function.restype = arguments, result
    return function


def _functions():
    """Return malloc, calloc, realloc and free, of which all but the last count down.

    In machine code: NumPy calls them with an exception set, which Python code would lose.
    """
    size, number = types.uintp, types.CPointer(types.int64)
    c_malloc = _c("malloc", ctypes.c_size_t)
    c_calloc = _c("calloc", ctypes.c_size_t, ctypes.c_size_t)
    c_realloc = _c("realloc", ctypes.c_size_t, ctypes.c_size_t)
    c_free = _c("free", ctypes.c_size_t, result=None)

    @cfunc(size(number, size))
    def malloc(countdown, n):
        countdown[0] -= 1
        return size(0) if countdown[0] == -1 else size(c_malloc(n))

    @cfunc(size(number, size, size))
    def calloc(countdown, n, each):
        countdown[0] -= 1
        return size(0) if countdown[0] == -1 else size(c_calloc(n, each))

    @cfunc(size(number, size, size))
    def realloc(countdown, at, n):
        countdown[0] -= 1
        return size(0) if countdown[0] == -1 else size(c_realloc(at, n))

    @cfunc(types.void(number, size, size))
    def free(countdown, at, n):
        c_free(at)

    return malloc, calloc, realloc, free


class Failing:
    """NumPy's allocations, of which one fails: the one that `countdown` reaches."""

    def __init__(self) -> None:
        self.countdown = np.full(1, -1, np.int64)
        self._functions = _functions()
        self._handler = _Handler(
            b"failing",
            1,
            self.countdown.ctypes.data,
            (ctypes.c_void_p * 4)(*[function.address for function in self._functions]),
        )
        new = ctypes.PYFUNCTYPE(
            ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
        )(("PyCapsule_New", ctypes.pythonapi))
        self._capsule = new(ctypes.addressof(self._handler), b"mem_handler", None)
        pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
            ("PyCapsule_GetPointer", ctypes.pythonapi)
        )
        table = ctypes.cast(
            pointer(np._core._multiarray_umath._ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p)
        )
        number = 304  # of PyDataMem_SetHandler in NumPy's table of functions
        self._set = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(table[number])

    def install(self) -> None:
        """Put this in the place of NumPy's own, in the contexts that bnfast computes in."""
        self._before = self._set(self._capsule)
        channels._SILENT.run(self._set, self._capsule)

    def remove(self) -> None:
        self._set(self._before)
        channels._SILENT.run(self._set, self._before)


_failing = Failing()  # arrays that it made are freed by it, whenever that is


@pytest.fixture
def fail_at():
    """Return a function that lets NumPy's n-th allocation from now fail."""
    _failing.countdown[0] = -1
    _failing.install()

    def start(number):
        _failing.countdown[0] = number

    yield start
    _failing.remove()


def outcomes(fail_at, call, check):
    """Let one allocation after the other fail in ``call``, until it succeeds; return how many."""
    for number in range(100):
        fail_at(number)
        try:
            result = call()
        except MemoryError:
            fail_at(-1)
            check()
            continue
        finally:
            fail_at(-1)
        return number, result
    raise AssertionError("still failing")


def assert_state(layer, state):
    for name, value in layer.state_dict().items():
        assert_same_bits(name, value, state[name])


SHAPES = {"small": (2, 3, 4, 4), "of 1 MB": (4, 4, 128, 128)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@over_backends
def test_layer(fail_at, rng, backend, shape):
    layer = bnfast.BatchNorm2d(shape[1], activation="relu", backend=backend)
    x, residual, dy = rng.normal(size=(3, *shape)).astype(np.float32)
    strided = np.repeat(x, 2, axis=3)[..., ::2]
    layer.backward(layer(x, residual))  # whatever is to be compiled or looked up
    layer.backward(layer(x, residual))
    bnfast.empty_cache()
    state, dx = layer.state_dict(), layer.backward(dy)
    layer.zero_grad()
    layer.backward(dy)
    gradients = layer.grad_weight.copy(), layer.grad_bias.copy()

    def unchanged():
        bnfast.empty_cache()
        assert_state(layer, state)
        assert_same_bits("grad_weight", layer.grad_weight, gradients[0])
        assert_same_bits("grad_bias", layer.grad_bias, gradients[1])

    failed, _ = outcomes(fail_at, lambda: layer(strided, residual), unchanged)
    assert failed >= 1
    assert layer.num_batches_tracked == int(state["num_batches_tracked"]) + 1
    layer.load_state_dict(state)
    layer(x, residual)
    state = layer.state_dict()
    bnfast.empty_cache()
    failed, again = outcomes(fail_at, lambda: layer.backward(dy), unchanged)
    assert failed >= 1
    assert again.shape == dx.shape
    layer.eval()
    gradients = layer.grad_weight.copy(), layer.grad_bias.copy()
    failed, _ = outcomes(fail_at, lambda: layer(strided, residual), unchanged)
    assert failed >= 1


@over_backends
def test_functions(fail_at, rng, backend):
    x, dy = rng.normal(size=(2, 2, 3, 4, 4)).astype(np.float32)
    mean, var = np.zeros(3, np.float32), np.ones(3, np.float32)
    F.batch_norm(x, mean, var, training=True, backend=backend)
    before = mean.copy(), var.copy()

    def unchanged():
        assert_same_bits("running_mean", mean, before[0])
        assert_same_bits("running_var", var, before[1])

    failed, _ = outcomes(
        fail_at, lambda: F.batch_norm(x, mean, var, training=True, backend=backend), unchanged
    )
    assert failed >= 1
    assert not np.array_equal(mean, before[0])
    y, batch_mean, invstd = F.batch_norm_with_stats(x, backend=backend)
    failed, result = outcomes(
        fail_at,
        lambda: F.batch_norm_backward(dy, x, None, batch_mean, invstd, backend=backend),
        lambda: None,
    )
    assert failed >= 1
    assert result.dx.shape == y.shape


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("backend", ["cython", "numba"])
def test_room_that_kernels_need_beside_the_arrays(backend):
    """Three million channels need more room for sums than the limit leaves."""
    code = f"""
        import resource
        import numpy as np
        import bnfast
        bnfast.set_backend({backend!r})
        bnfast.set_num_threads(1)
        small = np.ones((1, 3, 4), np.float32)
        bnfast.BatchNorm1d(3)(small)
        x = np.random.default_rng().normal(size=(1, 3_000_000, 4)).astype(np.float32)
        y = np.empty_like(x)
        layer = bnfast.BatchNorm1d(3_000_000)
        before = layer.state_dict()
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + 190 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        try:
            layer(x, out=y)
        except MemoryError as error:
            print(type(error).__name__, end=" ")
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        after = layer.state_dict()
        print(all(np.array_equal(after[name], value) for name, value in before.items()), end=" ")
        layer(x, out=y)
        print(layer.num_batches_tracked, abs(float(y.mean(dtype=float))) < 1e-4)
    """
    assert output_of(code) == "MemoryError True 1 True"
