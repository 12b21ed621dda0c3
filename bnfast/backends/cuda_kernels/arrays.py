"""What the backend takes for an array: NumPy's, and those that live on a GPU already.

Kernel forms
    A NumPy array's form is a NumPy array, which the launch copies in and out. The form of an array
    on a GPU is a `DeviceArray` of the kernel's shape: an address, a stream, and what keeps the
    memory. `Frame` is what a launch on forms of either kind happens in.
Kinds
    A result is of the kind of x: CuPy's, torch's, or Numba's, which also stands in for a library
    that shows its arrays by ``__cuda_array_interface__`` or DLPack alone. The library allocates it,
    so that its memory pool and its streams hold. A library is looked up in ``sys.modules``: whoever
    has an array of it has imported it.
Streams
    Work on an array is launched where its library would: on torch's and CuPy's current stream, and
    on the stream that a Numba array is bound to. A number stands for a stream, 0 for Numba's
    default. Where the arrays of a call are on several, the host waits for the others.
Simulator
    Only Numba's own arrays are device arrays there, and they have addresses in host memory.
"""

from __future__ import annotations

import functools
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import numpy as np

from bnfast import layout
from bnfast.backends import host_arrays
from bnfast.backends.cuda_kernels import copying, dlpack, driver, failures
from bnfast.device import DeviceArray, on_device
from bnfast.layout import Plan

cuda: Final[Any] = driver.cuda

_CUDA_DEVICE_TYPES: Final = frozenset({2, 13})
"""DLPack's device types that CUDA's kernels read: a GPU's own memory, and managed memory."""


def accepts(x: object) -> bool:
    """Return whether ``x`` is a NumPy array, or lives where a kernel reads it."""
    if isinstance(x, np.ndarray):
        return True
    if driver.SIMULATED:
        return getattr(x, "__cuda_ndarray__", False) is True
    if not on_device(x):
        return False
    dlpack_device = getattr(x, "__dlpack_device__", None)
    return dlpack_device is None or dlpack_device()[0] in _CUDA_DEVICE_TYPES


def describe(x: Any) -> DeviceArray:
    """Return what is known of an array on a GPU.

    Raises
    ------
    TypeError
        If it has a mask, or its byte order is not the GPU's; or, without the package ml_dtypes, if
        its dtype is bfloat16.
    ValueError
        If its elements are not aligned.
    RuntimeError
        If it is a torch tensor that requires grad, while torch records gradients: they would be
        lost. Inside ``torch.no_grad()`` it is taken, as ``Tensor.numpy()`` takes it. Or if it is a
        view with its negative bit set.
    BackendUnavailableError
        In a process that was forked while CUDA was in use.
    """
    failures.refuse_fork()
    if driver.SIMULATED:
        return _described(x, x.__array_interface__, 0, 0)
    interface, stream = _interface_of(x)
    return _described(x, interface, stream, _device_of(x, interface["data"][0]))


def view(x: Any, plan: Plan) -> Any:
    """Return ``x`` in the form that ``plan`` names: a view, or one copy on the same device."""
    if isinstance(x, np.ndarray):
        return host_arrays.view(x, plan)
    source = x if isinstance(x, DeviceArray) else describe(x)
    axes = plan.axes or tuple(range(source.ndim))
    if source.size and not layout.is_dense(axes, source.shape, source.strides, plan.dtype.itemsize):
        strided = _over(source, plan.memory_shape, tuple(source.strides[axis] for axis in axes))
        source = describe(_allocate(plan.memory_shape, None, source, "a contiguous copy"))
        _copy(source, strided)
    return _over(source, plan.kernel_shape, _row_major(plan.kernel_shape, plan.dtype.itemsize))


def empty(plan: Plan, like: Any) -> Any:
    """Return an uninitialised array of ``plan.shape``, of the kind and in the place of ``like``."""
    if isinstance(like, np.ndarray):
        return host_arrays.empty(plan, like)
    return _allocate(plan.memory_shape, plan.inverse, like, "the result")


def assign(out: DeviceArray, y: Any) -> None:
    """Copy ``y``, a new array on a GPU, to an array in any memory order."""
    _copy(out, describe(y))


class Frame:
    """The device and the stream of a launch: ``with Frame(x) as frame``.

    Attributes
    ----------
    device : int
        The device of x, current inside; for a NumPy array, the one that is current anyway.
    stream : object
        Numba's stream to launch on: that of x.
    """

    def __init__(self, x: Any) -> None:
        failures.refuse_fork()
        self._number, self._others = 0, set[int]()
        if isinstance(x, DeviceArray):
            self._number, self.device = x.stream, _number_of(x.place)
        else:
            self.device = 0 if driver.SIMULATED else int(cuda.current_context().device.id)
        if self._number > dlpack.LEGACY_STREAM:  # which no graph is recorded from, nor from 0
            failures.refuse_capture(cuda, self._number)
        self.stream = _stream(self.device, self._number)

    def __enter__(self) -> Frame:
        self._entered = _on(self.device)
        self._entered.__enter__()
        return self

    def join(self, form: Any) -> None:
        """Let what is launched from here on come after all work on another form."""
        if isinstance(form, DeviceArray) and form.stream != self._number:
            if form.stream not in self._others:
                _synchronize(self.device, form.stream)
            self._others.add(form.stream)

    def memory_for(self, purpose: str, size: int) -> failures.MemoryFor:
        """Return a context that says so where the device has no memory for something."""
        return failures.MemoryFor(purpose, size, f"cuda:{self.device}", cuda)

    def __exit__(self, *error: Any) -> None:
        if self._others:  # whoever goes on to use those streams finds the results there
            _synchronize(self.device, self._number)
        self._entered.__exit__(*error)


def _interface_of(x: Any) -> tuple[dict[str, Any], int]:
    """Return how ``x`` shows itself, and the stream that its library works on."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "bnfast does not record gradients for torch: call it inside torch.no_grad(), or "
                "pass tensor.detach()"
            )
        if x.is_neg():
            raise RuntimeError("the tensor is a negated view: pass tensor.resolve_neg()")
        stream = torch.cuda.current_stream(x.device).cuda_stream
        return x.detach().__cuda_array_interface__, stream or dlpack.LEGACY_STREAM
    interface = getattr(x, "__cuda_array_interface__", None)
    if interface is None:
        interface = dlpack.interface(x)
    elif hasattr(x, "gpu_data"):  # Numba's, which shows a broadcast array as a contiguous one
        interface["strides"] = x.strides
    return interface, interface.get("stream") or 0


def _described(x: Any, interface: dict[str, Any], stream: int, device: int) -> DeviceArray:
    dtype, shape = _dtype_of(x, interface), tuple(interface["shape"])
    strides = interface.get("strides") or _row_major(shape, dtype.itemsize)
    address, read_only = interface["data"]
    if interface.get("mask") is not None:
        raise TypeError("masked arrays are not accepted: the mask would be ignored")
    if not dtype.isnative:
        raise TypeError(f"arrays on a GPU have its byte order, got dtype {dtype}")
    if any(offset % dtype.itemsize for offset in (address or 0, *strides)):
        raise ValueError(
            f"arrays on a GPU need elements aligned to their {dtype.itemsize} bytes, got address "
            f"{address:#x} and strides {strides}"
        )
    return DeviceArray(
        x, shape, tuple(strides), dtype, address or 0, not read_only, f"cuda:{device}", stream
    )


def _dtype_of(x: Any, interface: dict[str, Any]) -> np.dtype[Any]:
    """Return the dtype of ``x``. Interfaces have no letter for bfloat16 and say "2 bytes"."""
    dtype: np.dtype[Any] = np.dtype(interface["typestr"])
    if dtype.kind != "V" or dtype.itemsize != 2:
        return dtype
    name = interface.get("dtype") or str(getattr(x, "dtype", "")).removeprefix("torch.")
    if name != "bfloat16":
        return dtype
    try:
        from ml_dtypes import bfloat16  # what gives NumPy the dtype
    except ImportError as error:
        raise TypeError(
            "arrays of bfloat16 need the package ml_dtypes, which is not installed: "
            "pip install ml_dtypes"
        ) from error
    dtype = np.dtype(bfloat16)
    return dtype


def _device_of(x: Any, address: int) -> int:
    """Return the number of the GPU that ``x`` lives on."""
    dlpack_device = getattr(x, "__dlpack_device__", None)
    if dlpack_device is not None:
        return int(dlpack_device()[1])
    if hasattr(x, "gpu_data"):  # Numba's
        return int(x.gpu_data.context.device.id)
    if not address:
        return int(cuda.current_context().device.id)
    calls, names = cuda.cudadrv.driver.driver, cuda.cudadrv.driver.binding
    ordinal = names.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    return int(calls.cuPointerGetAttribute(ordinal, names.CUdeviceptr(address)))


def _allocate(
    shape: tuple[int, ...], inverse: tuple[int, ...] | None, like: DeviceArray, purpose: str
) -> Any:
    """Return a new array of ``shape`` in C order, seen with its axes permuted by ``inverse``."""
    array, torch, cupy = like.array, sys.modules.get("torch"), sys.modules.get("cupy")
    with failures.MemoryFor(purpose, like.nbytes, like.place, cuda):
        if torch is not None and isinstance(array, torch.Tensor):
            tensor = torch.empty(shape, dtype=array.dtype, device=array.device)
            return tensor if inverse is None else tensor.permute(inverse)
        if cupy is not None and isinstance(array, cupy.ndarray):
            with array.device:
                new = cupy.empty(shape, like.dtype)
            return new if inverse is None else new.transpose(inverse)
        strides = _row_major(shape, like.dtype.itemsize)
        if inverse is not None:
            shape = tuple(shape[axis] for axis in inverse)
            strides = tuple(strides[axis] for axis in inverse)
        device = _number_of(like.place)
        with _on(device):
            stream = _stream(device, like.stream)
            return cuda.device_array(shape, like.dtype, strides=strides, stream=stream)


def _copy(to: DeviceArray, source: DeviceArray) -> None:
    """Copy elements, whatever the strides of either."""
    if to.size:
        with Frame(source) as frame:
            frame.join(to)
            copying.run(source, to, frame.stream)


def _over(x: DeviceArray, shape: tuple[int, ...], strides: tuple[int, ...]) -> DeviceArray:
    """Return a description of the memory of ``x`` seen with other axes."""
    return DeviceArray(x.array, shape, strides, x.dtype, x.address, x.writeable, x.place, x.stream)


@functools.lru_cache(maxsize=1024)
def _row_major(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the strides of an array in C order."""
    strides, extent = [], itemsize
    for length in reversed(shape):
        strides.append(extent)
        extent *= max(length, 1)
    return tuple(reversed(strides))


def _number_of(place: str) -> int:
    return int(place.removeprefix("cuda:"))


def _on(device: int) -> AbstractContextManager[Any]:
    """Return a context in which a device is the current one."""
    if driver.SIMULATED or int(cuda.current_context().device.id) == device:
        return nullcontext()
    entered: AbstractContextManager[Any] = cuda.gpus[device]
    return entered


@functools.lru_cache(maxsize=1024)
def _stream(device: int, number: int) -> Any:
    """Return Numba's object for a stream of a device, the same for the same; 0 for its default."""
    return cuda.external_stream(number) if number else 0


def _synchronize(device: int, number: int) -> None:
    """Wait until all work on a stream is done."""
    (_stream(device, number) or cuda.default_stream()).synchronize()
