"""Arrays of real libraries through the CUDA backend, kernels included.

Numba's arrays are tested on a GPU or in the simulator, whichever `conftest` settled; those of torch
and CuPy need a GPU and their library. What a result should be is what a NumPy array gives.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import numpy as np
import pytest
from made_up_gpu import SHAPE
from numba import config, cuda

import bnfast
import bnfast.functional as F
from bnfast.testing.bounds import assert_same_bits
from bnfast.testing.cases import ALL_DTYPES, STORAGE, over

SIMULATED = bool(config.ENABLE_CUDASIM)
on_gpu = pytest.mark.skipif(SIMULATED, reason="needs a GPU, and NUMBA_ENABLE_CUDASIM=0")
simulated = pytest.mark.skipif(not SIMULATED, reason="looks into the simulator's memory")

if SIMULATED:
    from quick_simulator import quick
else:
    from contextlib import nullcontext as quick


class OfNumba:
    """Puts NumPy arrays on the device as Numba's, with the strides they have."""

    def __init__(self):
        self.kind = type(cuda.device_array(1))

    def put(self, values, stream=0):
        room, offset = memory_of(values)
        there = cuda.to_device(room, stream=stream)
        if SIMULATED:
            return self.kind(as_in(there._ary, values, offset))
        data = there.gpu_data.view(offset * values.itemsize)
        return self.kind(values.shape, values.strides, values.dtype, stream, data)

    def get(self, array):
        return array.copy_to_host()


class OfTorch:
    """Puts NumPy arrays on the device as tensors, with the strides they have."""

    def __init__(self):
        self.library = importlib.import_module("torch")
        self.kind = self.library.Tensor

    def put(self, values):
        room, offset = memory_of(values)
        steps = [step // values.itemsize for step in values.strides]
        return self.library.from_numpy(room).cuda().as_strided(values.shape, steps, offset)

    def get(self, array):
        return array.cpu().numpy()


class OfCupy:
    """Puts NumPy arrays on the device as CuPy's, with the strides they have."""

    def __init__(self):
        self.library = importlib.import_module("cupy")
        self.kind = self.library.ndarray

    def put(self, values):
        room, offset = memory_of(values)
        start = self.library.asarray(room).data + offset * values.itemsize
        return self.kind(values.shape, values.dtype, start, values.strides)

    def get(self, array):
        return array.get()


def memory_of(values):
    """Return a copy of all memory between the ends of an array, and where in it that starts."""
    below, above = np.lib.array_utils.byte_bounds(values)
    room = np.zeros((above - below) // values.itemsize, values.dtype)
    offset = (values.__array_interface__["data"][0] - below) // values.itemsize
    as_in(room, values, offset)[...] = values
    return room, offset


def as_in(room, values, offset):
    """Return the view of ``room`` that ``values`` is of its own memory."""
    return np.lib.stride_tricks.as_strided(room[offset:], values.shape, values.strides)


LIBRARIES = ["numba"] if SIMULATED else ["numba", "torch", "cupy"]


@pytest.fixture(params=LIBRARIES)
def library(request):
    """Return what puts arrays on the device and gets them back, for each library."""
    pytest.importorskip(request.param)
    with quick():
        yield {"numba": OfNumba, "torch": OfTorch, "cupy": OfCupy}[request.param]()


LAYOUTS = {
    "contiguous": lambda numbers: numbers(*SHAPE),
    "channels-last": lambda numbers: numbers(4, 2, 8, 3).transpose(0, 3, 1, 2),
    "gaps": lambda numbers: numbers(4, 3, 2, 16)[..., ::2],
    "one sample of two": lambda numbers: numbers(8, 3, 2, 8)[1::2],
}


@pytest.fixture(params=LAYOUTS)
def values(request, numbers):
    """Return a function that draws arrays of one layout."""
    return lambda: LAYOUTS[request.param](numbers)


def new_layer(**options):
    """Return a layer; in the simulator, the backend has to be named."""
    return bnfast.BatchNorm2d(3, backend="cuda" if SIMULATED else None, **options)


def on_host(**options):
    """Return a layer whose NumPy arrays are copied to the device and back: the same kernels."""
    return bnfast.BatchNorm2d(3, backend="cuda", **options)


def test_training_and_gradients(library, values):
    x, residual, dy = values(), values(), values()
    layer, twin = new_layer(activation="relu"), on_host(activation="relu")
    y, expected = layer(library.put(x), library.put(residual)), twin(x, residual)
    dx, expected_dx = layer.backward(library.put(dy)), twin.backward(dy)
    for name, array, reference in (
        ("y", y, expected),
        ("dx", dx, expected_dx),
        ("dresidual", layer.grad_residual, twin.grad_residual),
    ):
        assert type(array) is library.kind
        assert_same_bits(name, library.get(array), reference)
    for name in ("running_mean", "running_var", "grad_weight", "grad_bias"):
        assert_same_bits(name, getattr(layer, name), getattr(twin, name))


@over("dtype", STORAGE)
@pytest.mark.parametrize("gaps", [False, True])
def test_16_bit_storage(rng, dtype, gaps):
    """torch has no way from NumPy's bfloat16, nor has Numba: what it takes are its bits."""
    x, dy = (rng.normal(3, 2, (4, 3, 2, 16)).astype(dtype)[..., :: 1 + gaps] for _ in range(2))
    twin = on_host()
    if SIMULATED:
        put, get = OfNumba().put, OfNumba().get
    else:
        torch = pytest.importorskip("torch")
        kind = getattr(torch, dtype.__name__)

        def put(values):
            bits = OfTorch().put(values.view(np.int16))
            return bits.view(kind)

        def get(tensor):
            return tensor.view(torch.int16).cpu().numpy().view(dtype)

    layer = new_layer()
    with quick():
        y, expected = layer(put(x)), twin(x)
        assert_same_bits("y", get(y), expected)
        assert_same_bits("dx", get(layer.backward(put(dy))), twin.backward(dy))


def test_reversed_axes(library, numbers):
    if library.kind.__module__.startswith("torch"):
        pytest.skip("torch's strides are not negative")
    x = numbers(*SHAPE)
    y = new_layer()(library.put(x[::-1, :, ::-1]))
    assert_same_bits("y", library.get(y), on_host()(x[::-1, :, ::-1]))


def test_vectors_that_are_not_aligned(library, numbers):
    x = numbers(1 + 4 * 3 * 2 * 8)
    y = new_layer()(library.put(x)[1:].reshape(SHAPE))
    assert_same_bits("y", library.get(y), on_host()(x[1:].reshape(SHAPE)))


def test_broadcast_array(library, numbers):
    x = np.broadcast_to(numbers(1, 3, 1, 8), SHAPE)
    y = new_layer()(library.put(x))
    assert_same_bits("y", library.get(y), on_host()(x))


def test_out(library, values, numbers):
    x, out = numbers(*SHAPE), library.put(values())
    layer, twin = new_layer().eval(), on_host().eval()
    layer.running_mean = twin.running_mean = numbers(3)
    assert layer(library.put(x), out=out) is out
    assert_same_bits("out", library.get(out), twin(x))


def test_in_place(library, numbers):
    x, layer = numbers(*SHAPE), new_layer()
    array = library.put(x)
    assert layer(array, out=array) is array
    assert_same_bits("x", library.get(array), on_host()(x))
    with pytest.raises(RuntimeError, match="its input was overwritten by out=x"):
        layer.backward(array)


def test_statistics(library, numbers):
    x = numbers(*SHAPE)
    backend = new_layer().backend
    moments, expected = F.moments(library.put(x), backend=backend), F.moments(x, backend="cuda")
    assert_same_bits("mean", moments.mean, expected.mean)
    assert_same_bits("m2", moments.m2, expected.m2)


@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (4, 3, 0, 8)])
def test_no_elements(library, numbers, shape):
    if SIMULATED:
        x = library.kind(numbers(*shape))
    else:
        x = library.put(numbers(*SHAPE))[: shape[0], :, : shape[2]]
    y = new_layer()(x)
    assert type(y) is library.kind
    assert tuple(y.shape) == shape


CUTS = (
    lambda n: slice(n),
    lambda n: slice(0, 2 * n, 2),
    lambda n: slice(n - 1, None, -1),
)


@simulated
@over("dtype", ALL_DTYPES)
@pytest.mark.parametrize("broadcast", [False, True])
@pytest.mark.parametrize(
    "shape", [(1,), (7,), (40,), (2, 3), (1, 1, 1), (2, 1, 3, 2), (2, 3, 2, 1, 2, 2)]
)
def test_copies_between_any_strides(rng, shape, broadcast, dtype):
    from bnfast.backends.cuda_kernels import copying
    from bnfast.backends.cuda_kernels.arrays import describe

    def strided():
        order = rng.permutation(len(shape))
        lengths = [shape[axis] for axis in order]
        room = rng.normal(size=[2 * n for n in lengths]).astype(dtype)
        view = room[tuple(CUTS[rng.integers(3)](n) for n in lengths)]
        return room, view.transpose(np.argsort(order))

    source = np.broadcast_to(strided()[1][:1], shape) if broadcast else strided()[1]
    room, target = strided()
    before, held = room.copy(), target.copy()
    kind = OfNumba().kind
    with quick():
        copying.run(describe(kind(source)), describe(kind(target)), 0)
    assert_same_bits("the copy", target, source)
    target[...] = held
    assert_same_bits("what is beside it", room, before)


@simulated
def test_arrays_of_several_streams_and_devices(numbers, monkeypatch):
    from bnfast.backends import numba_cuda
    from bnfast.backends.cuda_kernels import arrays, failures, launch

    waited = []
    monkeypatch.setattr(arrays, "_synchronize", lambda *stream: waited.append(stream))
    monkeypatch.setattr(arrays, "_stream", lambda device, number: number)
    monkeypatch.setattr(failures, "refuse_capture", lambda cuda, stream: None)
    monkeypatch.setattr(launch, "_desk", launch._Desk())
    vector = np.ones(8)

    def call(device, streams):
        x, residual, y = (
            replace(
                numba_cuda.describe(cuda.to_device(numbers(4, 8, 6))),
                place=f"cuda:{device}",
                stream=stream,
            )
            for stream in streams
        )
        numba_cuda.normalize(
            x, vector, vector, vector, vector, 0.1, residual, y=y, relu=False, num_threads=1
        )

    with quick():
        call(0, (5, 6, 7))
        assert waited == [(0, 6), (0, 7), (0, 5)]
        call(0, (5, 5, 5))
        call(1, (5, 5, 5))
    assert len(waited) == 3
    rooms = list(launch._desk.buffers.values())
    assert len(rooms) == 2, "one for each device: a call has only what went up to keep"
    assert not np.shares_memory(*rooms)


@simulated
def test_the_simulator_is_used_where_it_is_named(numbers):
    x, layer = numbers(*SHAPE), bnfast.BatchNorm2d(3)
    assert type(layer(x)) is np.ndarray
    assert bnfast.get_backend() != "cuda"

    class OnGpu:
        __cuda_array_interface__ = None

    with pytest.raises(TypeError) as caught:
        layer(OnGpu())
    assert str(caught.value) == (
        "backend 'cuda' (asked for by auto, for an array on a GPU) does not read arrays of type "
        f"{OnGpu.__module__}.{OnGpu.__qualname__} on the device where this one lives; copy the "
        "array to the host first, or leave the choice to backend='auto'"
    )


def test_host_array_beside_a_device_array(library, numbers):
    x, layer = numbers(*SHAPE), new_layer()
    with pytest.raises(TypeError, match=r"^residual is in host memory, but x is on cuda:0: the"):
        layer(library.put(x), residual=x)
    assert layer.num_batches_tracked == 0


@on_gpu
def test_work_on_another_stream_of_torch(numbers):
    torch = pytest.importorskip("torch")
    x, layer = numbers(64, 3, 256, 256), new_layer()
    there, stream = torch.from_numpy(x).cuda(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # clock cycles: what is not on this stream comes first
        shifted = there + 1
        y = layer(shifted)
        result = (y * 2).cpu().numpy()
    assert_same_bits("y", result, on_host()(x + np.float32(1)) * 2)


@on_gpu
def test_work_on_a_stream_of_numba(numbers):
    x, layer, stream = numbers(64, 3, 256, 256), new_layer(), cuda.stream()
    y = layer(cuda.to_device(x, stream=stream))
    assert int(y.stream) == int(stream)
    assert_same_bits("y", y.copy_to_host(stream=0), on_host()(x))


@on_gpu
def test_torch_tensors_that_require_grad():
    torch = pytest.importorskip("torch")
    x, layer = torch.ones(*SHAPE, device="cuda", requires_grad=True), new_layer()
    with pytest.raises(RuntimeError, match=r"^bnfast does not record gradients for torch"):
        layer(x)
    with torch.no_grad():
        assert not layer(x).requires_grad


@on_gpu
def test_memory_that_is_not_there():
    torch = pytest.importorskip("torch")
    x, layer = torch.ones(1, 1, 1, 1, device="cuda").expand(2**12, 3, 2**12, 2**12), new_layer()
    with pytest.raises(MemoryError, match=r"^no memory on cuda:0 for a contiguous copy of 824,63"):
        layer(x)
    assert layer.num_batches_tracked == 0


@on_gpu
def test_the_second_gpu(numbers):
    torch = pytest.importorskip("torch")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, layer = numbers(*SHAPE), new_layer()
    y = layer(torch.from_numpy(x).to("cuda:1"))
    assert y.device == torch.device("cuda:1")
    assert_same_bits("y", y.cpu().numpy(), on_host()(x))
    with pytest.raises(TypeError, match=r"^residual is on cuda:0, but x is on cuda:1"):
        layer(y, residual=y.to("cuda:0"))
