"""Arrays that live on a GPU: in without a copy, out as the same kind, checked as NumPy's are.

The GPU is made up (see `made_up_gpu`): the way from a user's array to the kernels is the real one,
and the results are those of the ``numpy`` backend to the bit.
"""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from made_up_gpu import SHAPE, Array, Cupy, Kind, on_host, refused

import bnfast
import bnfast.functional as F
from bnfast import device
from bnfast.backends.cuda_kernels import dlpack
from bnfast.testing.bounds import assert_same_bits
from bnfast.testing.cases import STORAGE, over


def assert_order_of(expected, result):
    """Check that two arrays have their axes in the same order in memory."""
    assert result.strides == expected.strides


LAYOUTS = {
    "contiguous": lambda numbers: numbers(*SHAPE),
    "channels-last": lambda numbers: numbers(4, 2, 8, 3).transpose(0, 3, 1, 2),
    "fortran": lambda numbers: numbers(*SHAPE[::-1]).transpose(3, 2, 1, 0),
    "gaps": lambda numbers: numbers(4, 3, 2, 16)[..., ::2],
    "reversed": lambda numbers: numbers(*SHAPE)[::-1],
    "channels-last with gaps": lambda numbers: numbers(8, 2, 8, 3)[::2].transpose(0, 3, 1, 2),
}


@pytest.fixture(params=LAYOUTS)
def values(request, numbers):
    """Return a function that draws arrays of one layout."""
    return lambda: LAYOUTS[request.param](numbers)


# ---- in and out ---------------------------------------------------------------------------------


def test_inference(kind, values):
    x, residual = values(), values()
    layer = bnfast.BatchNorm2d(3, activation="relu").eval()
    layer.running_mean, layer.weight = [3, 2, 1], [1, 2, 3]
    y = layer(kind(x), residual=kind(residual))
    assert type(y) is kind.result
    layer.backend = "numpy"
    expected = layer(x, residual=residual)
    assert_same_bits("y", y.memory, expected)
    assert_order_of(expected, y.memory)


def test_training_and_gradients(kind, values, gpu):
    x, dy, residual = values(), values(), values()
    layer, twin = (bnfast.BatchNorm2d(3, activation="relu", backend=b) for b in (None, "numpy"))
    y, expected = layer(kind(x), kind(residual)), twin(x, residual)
    dx, expected_dx = layer.backward(kind(dy)), twin.backward(dy)
    assert [name for name, _, _ in gpu.launches] == ["train", "backward"]
    for name, result, reference in (
        ("y", y, expected),
        ("dx", dx, expected_dx),
        ("dresidual", layer.grad_residual, twin.grad_residual),
    ):
        assert type(result) is kind.result
        assert_same_bits(name, result.memory, reference)
        assert_order_of(reference, result.memory)
    for name in ("running_mean", "running_var", "grad_weight", "grad_bias"):
        assert type(getattr(layer, name)) is np.ndarray
        assert_same_bits(name, getattr(layer, name), getattr(twin, name))


def test_functions(kind, numbers):
    x, dy, weight = numbers(*SHAPE), numbers(*SHAPE), numbers(3)
    y, mean, invstd = F.batch_norm_with_stats(kind(x), weight)
    reference = F.batch_norm_with_stats(x, weight, backend="numpy")
    assert_same_bits("y", y.memory, reference[0])
    gradients = F.batch_norm_backward(
        kind(dy), kind(x), weight, mean, invstd, training=False, residual=True
    )
    expected = F.batch_norm_backward(
        dy, x, weight, mean, invstd, training=False, residual=True, backend="numpy"
    )
    assert type(gradients.dx) is type(gradients.dresidual) is kind.result
    assert_same_bits("dx", gradients.dx.memory, expected.dx)
    assert_same_bits("dresidual", gradients.dresidual.memory, expected.dresidual)
    assert_same_bits("dweight", gradients.dweight, expected.dweight)
    moments, expected_moments = F.moments(kind(x)), F.moments(x, backend="numpy")
    assert_same_bits("mean", moments.mean, expected_moments.mean)
    assert type(moments.mean) is np.ndarray


@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (4, 3, 0, 8), (4, 0, 2, 8)])
def test_arrays_without_elements(kind, numbers, shape):
    layer = bnfast.BatchNorm2d(shape[1])
    y = layer(kind(numbers(*shape)))
    assert type(y) is kind.result
    assert y.memory.shape == shape
    assert layer.backward(kind(numbers(*shape))).memory.shape == shape
    assert layer.num_batches_tracked == 1


def test_float64(kind, rng):
    x = rng.normal(size=SHAPE)
    assert_same_bits("y", bnfast.BatchNorm2d(3)(kind(x)).memory, on_host(x))


@over("dtype", STORAGE)
@pytest.mark.parametrize("name", ["cupy", "torch", "numba"])
def test_16_bit_storage(gpu, rng, name, dtype):
    kind = Kind(gpu, name)
    x, residual, gaps = (rng.normal(3, 2, (4, 3, 2, 8 * n)).astype(dtype) for n in (1, 1, 2))
    layer, twin = bnfast.BatchNorm2d(3), bnfast.BatchNorm2d(3, backend="numpy")
    for given in (x, gaps[..., ::2]):
        y, expected = layer(kind(given), kind(residual)), twin(given, residual)
        assert type(y) is kind.result
        assert_same_bits("y", y.memory, expected)
        assert_same_bits("dx", layer.backward(kind(x)).memory, twin.backward(x))
    with pytest.raises(TypeError, match=f"^residual should have the dtype of x, {dtype.__name__}"):
        layer(kind(x), kind(x.astype(np.float32)))


def test_float16_of_every_kind(kind, rng):
    x = rng.normal(3, 2, SHAPE).astype(np.float16)
    assert_same_bits("y", bnfast.BatchNorm2d(3)(kind(x)).memory, on_host(x))


def test_bfloat16_needs_the_package_that_has_it(gpu, numbers, monkeypatch):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    tensor = Kind(gpu, "torch")(numbers(*SHAPE).astype(ml_dtypes.bfloat16))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    layer = bnfast.BatchNorm2d(3)
    message = (
        "arrays of bfloat16 need the package ml_dtypes, which is not installed: "
        "pip install ml_dtypes"
    )
    refused(TypeError, message, layer, tensor)
    assert layer.num_batches_tracked == 0


def test_two_bytes_of_nobody_knows_what(gpu, numbers):
    x = Kind(gpu, "interface")(numbers(*SHAPE).astype(np.float16).view("V2"))
    with pytest.raises(TypeError, match=r"^expected an array of float16, .* got dtype \|V2; cast"):
        bnfast.BatchNorm2d(3)(x)


def test_a_dense_array_is_not_copied(kind, numbers, gpu):
    x, out = numbers(4, 2, 8, 3).transpose(0, 3, 1, 2), numbers(*SHAPE)
    bnfast.BatchNorm2d(3)(kind(x))
    bnfast.BatchNorm2d(3)(kind(out), out=kind(numbers(*SHAPE)))
    assert gpu.copies == []
    bnfast.BatchNorm2d(3)(kind(x), out=kind(out))
    assert len(gpu.copies) == 1


def test_broadcast_array(kind, numbers):
    x = np.lib.stride_tricks.as_strided(numbers(3, 8), SHAPE, (0, 32, 0, 4))  # DLPack: writable
    assert_same_bits("y", bnfast.BatchNorm2d(3)(kind(x)).memory, on_host(x))


# ---- out= ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_out_of_any_layout(kind, values, numbers, training):
    x, room = numbers(*SHAPE), values()
    out = kind(room)
    layer = bnfast.BatchNorm2d(3).train(training)
    assert layer(kind(x), out=out) is out
    assert_same_bits("out", room, on_host(x, training))


def test_out_of_another_library(gpu, numbers):
    x, room = numbers(*SHAPE), numbers(4, 3, 2, 16)[..., ::2]
    out = Kind(gpu, "torch")(room)
    assert bnfast.BatchNorm2d(3)(Kind(gpu, "cupy")(x), out=out) is out
    assert_same_bits("out", room, on_host(x))


def test_in_place(kind, numbers):
    x = numbers(*SHAPE)
    expected, layer = on_host(x), bnfast.BatchNorm2d(3)
    array = kind(x)
    assert layer(array, out=array) is array
    assert_same_bits("x", x, expected)
    with pytest.raises(RuntimeError, match="its input was overwritten by out=x"):
        layer.backward(kind(numbers(*SHAPE)))


def test_in_place_through_another_object(kind, numbers):
    x = numbers(*SHAPE)
    layer = bnfast.BatchNorm2d(3)
    layer(kind(x), out=kind(x[:]))
    with pytest.raises(RuntimeError, match="its input was overwritten by out=x"):
        layer.backward(kind(numbers(*SHAPE)))


def test_gradient_in_place(kind, numbers):
    x, dy, weight = numbers(*SHAPE), numbers(*SHAPE), numbers(3)
    _, mean, invstd = F.batch_norm_with_stats(x)
    expected = F.batch_norm_backward(dy, x, weight, mean, invstd, backend="numpy").dx
    array = kind(dy)
    dx = F.batch_norm_backward(array, kind(x), weight, mean, invstd, out=array).dx
    assert dx is array
    assert_same_bits("dy", dy, expected)


# ---- choice -------------------------------------------------------------------------------------


def test_auto_follows_the_data(kind, numbers, gpu):
    x = numbers(*SHAPE)
    for host in (x, x[::2], x.view(np.memmap), x.tolist()):
        assert type(bnfast.BatchNorm2d(3)(host)) is np.ndarray
    assert gpu.launches == []
    bnfast.BatchNorm2d(3)(kind(x))
    assert [name for name, _, _ in gpu.launches] == ["train"]


def test_named_for_a_host_array(gpu, numbers):
    x = numbers(*SHAPE)
    y = bnfast.BatchNorm2d(3, backend="cuda")(x)
    assert type(y) is np.ndarray
    assert_same_bits("y", y, on_host(x))
    assert gpu.launches == [("train", 0, 0)]


def test_host_backend_named_for_a_device_array(kind, numbers):
    x, layer = kind(numbers(*SHAPE)), bnfast.BatchNorm2d(3, backend="numpy")
    message = (
        f"backend 'numpy' (asked for by the argument backend=) does not read arrays of type "
        f"made_up_gpu.{type(x).__name__} on the device where this one lives; copy the array to the "
        "host first, or leave the choice to backend='auto'"
    )
    refused(TypeError, message, layer, x)
    layer.backend = None
    layer(x)
    layer.backend = "numpy"
    refused(TypeError, message, layer.backward, x)


def test_another_device_than_cuda(gpu, numbers):
    class Rocm(Array):
        def __dlpack_device__(self):
            return 10, 1

    array = Rocm(numbers(*SHAPE))
    with pytest.raises(TypeError, match=r"^backend 'cuda' \(asked for by auto, for an array on a"):
        bnfast.BatchNorm2d(3)(array)
    assert device.where(array) == "on rocm:1"


def test_memory_that_both_read_is_the_host_s(gpu, numbers):
    class Mapped(np.ndarray):  # what numba.cuda.mapped_array and managed_array return
        __cuda_array_interface__ = None

    x = numbers(*SHAPE)
    y = bnfast.BatchNorm2d(3)(x.view(Mapped))
    assert type(y) is np.ndarray
    assert gpu.launches == []
    assert device.where(x.view(Mapped)) == "in host memory"


def test_a_device_that_dlpack_knows_and_this_package_does_not():
    class Unknown:
        def __dlpack_device__(self):
            return 16, 3

    assert device.where(Unknown()) == "on DLPack device type 16:3"


# ---- devices and streams ------------------------------------------------------------------------


def test_work_is_done_where_the_array_is(kind, numbers, gpu):
    x, residual, out = numbers(*SHAPE), numbers(4, 3, 2, 16)[..., ::2], numbers(*SHAPE)[::-1]
    layer = bnfast.BatchNorm2d(3)
    y = layer(kind(x, device=1), kind(residual, device=1))
    layer(kind(x, device=1), out=kind(out, device=1))
    layer.backward(kind(x, device=1))
    assert y.number == 1
    assert {where for _, where, _ in gpu.launches} == {1}
    assert gpu.current == 0


def stream_of(gpu, name, number):
    """Let the arrays that a kind makes from now on be on a stream."""
    gpu.cupy_stream = gpu.torch_stream = number
    return {"stream": number} if name in ("numba", "interface") else {}


@pytest.mark.parametrize("name", ["cupy", "torch", "numba", "interface"])
def test_work_goes_to_the_stream_of_the_array(gpu, numbers, name):
    options = stream_of(gpu, name, 77)
    layer = bnfast.BatchNorm2d(3)
    y = layer(Kind(gpu, name)(numbers(*SHAPE), **options))
    assert gpu.launches == [("train", 0, 77)]
    assert gpu.waited == []
    assert name not in ("numba", "interface") or int(y.stream) == 77
    options = stream_of(gpu, name, 78)  # the stream of the moment, not that of the forward call
    layer.backward(Kind(gpu, name)(numbers(*SHAPE), **options))
    assert gpu.launches[1] == ("backward", 0, 78)
    assert gpu.waited == ([77, 78] if options else [])  # x is bound to its stream, if dy is


def test_default_streams(gpu, numbers):
    bnfast.BatchNorm2d(3)(Kind(gpu, "torch")(numbers(*SHAPE)))
    bnfast.BatchNorm2d(3)(Kind(gpu, "numba")(numbers(*SHAPE)))
    legacy, numbas_own = 1, 0
    assert [stream for _, _, stream in gpu.launches] == [legacy, numbas_own]


def test_other_streams_are_waited_for(gpu, numbers):
    x = Kind(gpu, "numba")(numbers(*SHAPE), stream=5)
    residual = Kind(gpu, "numba")(numbers(*SHAPE), stream=6)
    bnfast.BatchNorm2d(3)(x, residual)
    assert gpu.launches == [("train", 0, 5)]
    assert gpu.waited == [6, 5]  # before the launch, and after it


# ---- what is known of an array ------------------------------------------------------------------


def test_description_answers_as_numpy_would(gpu, values):
    x = values()
    described = gpu.arrays.describe(Cupy(x, gpu))
    assert described.ndim == x.ndim
    assert (described.size, described.nbytes) == (x.size, x.nbytes)
    assert described.flags.carray == x.flags.carray
    assert np.shares_memory(described, x)
    assert not np.shares_memory(described, x.copy())
    order = (1, 0, 3, 2)
    assert described.transpose(order).strides == x.transpose(order).strides


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, np.float16, np.int32, np.uint8, np.complex64, np.bool_]
)
def test_dlpack_dtypes(gpu, dtype):
    values_ = np.zeros((2, 3, 4), dtype)[:, ::2]
    described = gpu.arrays.describe(Kind(gpu, "dlpack")(values_))
    assert described.dtype == values_.dtype
    assert described.strides == values_.strides
    assert described.address == values_.__array_interface__["data"][0]


def test_bfloat16_by_the_letter_of_dlpack(gpu):
    pytest.importorskip("ml_dtypes")
    lengths = (ctypes.c_int64 * 2)(3, 4)
    bfloat16 = {"code": 4, "bits": 16, "lanes": 1}
    tensor = dlpack._Tensor(
        data=4096, device_type=2, ndim=2, shape=lengths, byte_offset=256, **bfloat16
    )
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    capsule = new_capsule(ctypes.addressof(tensor), b"dltensor", None)
    array = SimpleNamespace(__dlpack__=lambda stream: capsule, __dlpack_device__=lambda: (2, 1))
    assert dlpack.interface(array) == {
        "version": 3,
        "shape": (3, 4),
        "strides": None,
        "typestr": "|V2",
        "dtype": "bfloat16",
        "data": (4096 + 256, False),
        "stream": 1,
    }
    described = gpu.arrays.describe(array)
    assert described.dtype.name == "bfloat16"
    assert described.strides == (8, 2)
    assert described.place == "cuda:1"
