"""A GPU that is not there: libraries whose device arrays lie in host memory.

`install` puts a module in the place of ``numba.cuda`` and one in that of the backend ``cuda``. The
hooks of the backend are the real ones, its kernels the NumPy reference on the addresses that they
are given. Every kind of array refuses to be read by NumPy, so what the host must not touch fails.

A `Gpu` records what a test asks about: which device was current, which streams were waited for.
"""

from __future__ import annotations

import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace

import numpy as np
import pytest

import bnfast
from bnfast.backends import cuda_kernels, numpy_reference
from bnfast.device import DeviceArray

SHAPE = (4, 3, 2, 8)
BACKEND = "bnfast.backends.numba_cuda"


class Array:
    """An array of a library that has nothing but CUDA's array interface."""

    read_only = False
    mask = None

    def __init__(self, memory, device=0, stream=None):
        self.memory = memory
        self.number = device
        self.stream = stream

    @property
    def __cuda_array_interface__(self):
        return {
            "version": 3,
            "shape": self.memory.shape,
            "strides": None if self.memory.flags.c_contiguous else self.memory.strides,
            "typestr": self.memory.dtype.str,
            "data": (self.memory.__array_interface__["data"][0], self.read_only),
            "stream": self.stream,
            "mask": self.mask,
        }

    def __array__(self, *args, **kwargs):
        raise AssertionError("an array on a device was read by the host")


class Numba(Array):
    """A device array as Numba makes them: no DLPack, a stream of its own or the default one.

    Its interface leaves out axes of stride 0 when it asks whether the array is contiguous.
    """

    def __init__(self, memory, gpu, device=0, stream=0):
        super().__init__(memory, device, int(stream) or None)
        self.gpu = gpu
        self.gpu_data = SimpleNamespace(context=gpu.context(device))
        self.strides, self.dtype = memory.strides, memory.dtype

    @property
    def __cuda_array_interface__(self):
        interface = super().__cuda_array_interface__
        core = self.memory[tuple(slice(None) if step else slice(1) for step in self.strides)]
        return interface | ({"strides": None} if core.flags.c_contiguous else {})


class Cupy(Array):
    """An array as CuPy makes them: work on it goes to CuPy's current stream."""

    def __init__(self, memory, gpu, device=0):
        super().__init__(memory, device)
        self.gpu = gpu
        self.device, self.dtype = gpu.gpus[device], memory.dtype

    @property
    def stream(self):
        return self.gpu.cupy_stream

    @stream.setter
    def stream(self, _):
        pass

    def __dlpack_device__(self):
        return 2, self.number

    def transpose(self, axes):
        return Cupy(self.memory.transpose(axes), self.gpu, self.number)


class HostTensor:
    """What torch makes of a tensor that is brought to the host."""

    def __init__(self, array):
        self.array, self.dtype = array, array.dtype

    def numpy(self):
        return self.array


class Torch(Array):
    """A tensor as torch makes them: its interface names no stream, and gradients are recorded."""

    def __init__(self, memory, gpu, device=0, requires_grad=False, negative=False):
        super().__init__(memory, device)
        self.gpu = gpu
        self.device = gpu.gpus[device]
        self.dtype = f"torch.{memory.dtype}"
        self.requires_grad = requires_grad
        self.negative = negative

    @property
    def __cuda_array_interface__(self):
        if self.requires_grad:
            raise RuntimeError("Can't get __cuda_array_interface__ on a Variable")
        interface = super().__cuda_array_interface__
        return {name: interface[name] for name in ("shape", "strides", "typestr", "data")}

    def __dlpack_device__(self):
        return 2, self.number

    def is_neg(self):
        return self.negative

    def detach(self):
        return Torch(self.memory, self.gpu, self.number)

    def cpu(self):
        return HostTensor(self.memory.copy())

    def permute(self, axes):
        return Torch(self.memory.transpose(axes), self.gpu, self.number)


class Dlpack(Array):
    """An array of a library that has nothing but DLPack."""

    __cuda_array_interface__ = property()  # hasattr() says no

    def __dlpack_device__(self):
        return 2, self.number

    def __dlpack__(self, stream=None):
        assert stream == 1
        return self.memory.__dlpack__()


class TorchOutOfMemoryError(RuntimeError):
    """As torch names its own."""


TorchOutOfMemoryError.__name__ = "OutOfMemoryError"


class CudaAPIError(Exception):
    """As Numba has it."""

    def __init__(self, code, msg):
        super().__init__(code, msg)
        self.code = code


class Device:
    """One GPU: entered, it is the current one."""

    compute_capability = (9, 0)

    def __init__(self, gpu, number):
        self.gpu, self.id, self.index = gpu, number, number
        self.before = []

    def __enter__(self):
        self.before.append(self.gpu.current)
        self.gpu.current = self.id

    def __exit__(self, *error):
        self.gpu.current = self.before.pop()


class Gpu(SimpleNamespace):
    """Two GPUs, and what was done with them. It is ``numba.cuda`` for the code under test."""

    def __init__(self):
        super().__init__(current=0, waited=[], copies=[], full=False, cupy_stream=1, torch_stream=0)
        self.gpus = [Device(self, 0), Device(self, 1)]
        self.recording = True  # of torch's gradients
        self.runtime = SimpleNamespace(get_version=lambda: (13, 0))
        self.driver_version = (13, 1)
        calls = SimpleNamespace(
            get_version=lambda: self.driver_version,
            cuPointerGetAttribute=lambda attribute, pointer: self.owner_of[pointer],
            cuStreamIsCapturing=lambda stream: int(stream in self.captured),
        )
        names = SimpleNamespace(
            CUpointer_attribute=SimpleNamespace(CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL=9),
            CUdeviceptr=int,
        )
        self.cudadrv = SimpleNamespace(driver=SimpleNamespace(driver=calls, binding=names))
        self.owner_of, self.captured = {}, set()

    def context(self, number):
        return SimpleNamespace(
            device=self.gpus[number],
            get_memory_info=lambda: SimpleNamespace(free=1_000, total=80_000_000_000),
        )

    def current_context(self):
        return self.context(self.current)

    def external_stream(self, number):
        return Stream(self, number)

    def default_stream(self):
        return Stream(self, 0)

    def device_array(self, shape, dtype, strides, stream):
        if self.full:
            raise CudaAPIError(2, "Call to cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY")
        order = sorted(range(len(shape)), key=lambda axis: (-strides[axis], axis))
        room = np.full([shape[axis] for axis in order], np.nan, dtype)
        return Numba(room.transpose(np.argsort(order)), self, self.current, stream)

    def copy(self, source, target, stream):
        assert source.place == target.place == f"cuda:{self.current}"
        self.copies.append(int(stream))
        np.asarray(target)[...] = np.asarray(source)

    # What arrays of each kind are made with.

    def cupy_empty(self, shape, dtype):
        if self.full:
            raise MemoryError("Out of memory allocating 3,072 bytes")
        return Cupy(np.full(shape, np.nan, dtype), self, self.current)

    def torch_empty(self, shape, dtype, device):
        if self.full:
            raise TorchOutOfMemoryError("CUDA out of memory.")
        memory = np.full(shape, np.nan, dtype.removeprefix("torch."))
        return Torch(memory, self, device.id)

    @contextmanager
    def no_grad(self):
        self.recording = False
        yield
        self.recording = True


class Stream:
    """A stream; it can be waited for."""

    def __init__(self, gpu, number):
        self.gpu, self.number = gpu, number

    def __int__(self):
        return self.number

    def synchronize(self):
        self.gpu.waited.append(self.number)


class Kind:
    """Called with a NumPy array, it puts that on a GPU as one kind of array."""

    classes = MappingProxyType(
        {"cupy": Cupy, "torch": Torch, "numba": Numba, "interface": Array, "dlpack": Dlpack}
    )

    def __init__(self, gpu, name):
        self.gpu, self.name, self.made = gpu, name, self.classes[name]
        self.result = self.made if name in ("cupy", "torch", "numba") else Numba

    def __call__(self, memory, **options):
        if self.name in ("interface", "dlpack"):
            array = self.made(memory, **options)
        else:
            array = self.made(memory, self.gpu, **options)
        self.gpu.owner_of[memory.__array_interface__["data"][0]] = array.number
        return array


def on_host(x, training=True):
    """Return what a new layer makes of a NumPy array, on the backend that the made-up one is."""
    return bnfast.BatchNorm2d(3, backend="numpy").train(training)(x)


def refused(error, message, call, *args, **kwargs):
    """Check the whole message of the error that a call raises."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    assert type(caught.value) is error
    assert str(caught.value) == message


def install(monkeypatch):
    """Return a `Gpu` that the backend ``cuda`` runs on until the end of the test."""
    gpu = Gpu()
    with monkeypatch.context() as while_imported:
        driver = SimpleNamespace(SIMULATED=False, cuda=gpu)
        while_imported.setattr(cuda_kernels, "driver", driver, raising=False)
        copying = SimpleNamespace(run=gpu.copy)
        while_imported.setattr(cuda_kernels, "copying", copying, raising=False)
        path = Path(cuda_kernels.__file__).with_name("arrays.py")
        specification = importlib.util.spec_from_file_location("made_up_arrays", path)
        arrays = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(arrays)
    torch = ModuleType("torch")
    torch.Tensor, torch.empty = Torch, gpu.torch_empty
    torch.is_grad_enabled = lambda: gpu.recording
    torch.cuda = SimpleNamespace(
        current_stream=lambda device: SimpleNamespace(cuda_stream=gpu.torch_stream)
    )
    cupy = ModuleType("cupy")
    cupy.ndarray, cupy.empty = Cupy, gpu.cupy_empty
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, BACKEND, _backend(arrays, gpu))
    gpu.arrays = arrays
    return gpu


def _memory_of(form):
    """Return what a described array describes; everything else as it is."""
    return np.asarray(form).view(form.dtype) if isinstance(form, DeviceArray) else form


def _backend(arrays, gpu):
    """Return a backend of the real hooks and the reference's arithmetic."""
    module = ModuleType(BACKEND)
    module.STORAGE_DTYPES = numpy_reference.STORAGE_DTYPES
    module.unavailable = lambda: None
    for hook in ("accepts", "describe", "view", "empty", "assign"):
        setattr(module, hook, getattr(arrays, hook))
    gpu.launches = []

    def launched(name):
        kernel = getattr(numpy_reference, name)

        def launch(*inputs, **outputs):
            forms = [*inputs, *outputs.values()]
            x = next(form for form in forms if np.ndim(form) > 1)
            with arrays.Frame(x) as frame:
                for form in forms:
                    frame.join(form)
                gpu.launches.append((name, gpu.current, int(frame.stream)))
                kernel(
                    *(_memory_of(form) for form in inputs),
                    **{key: _memory_of(form) for key, form in outputs.items()},
                )

        return launch

    for name in ("moments", "normalize", "train", "backward_sums", "backward_input", "backward"):
        setattr(module, name, launched(name))
    return module
