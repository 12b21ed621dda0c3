"""Arrays that the CPU does not read: how they are recognised, and what is known of them.

Everything between a user and a backend works on metadata: shape, strides, dtype, addresses. A NumPy
array shows its own. An array on a device is described once, at the door of a call, by the backend
that will read it; the `DeviceArray` then stands for it until a result goes out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_DEVICES: Final = {
    2: "cuda",
    4: "opencl",
    7: "vulkan",
    8: "metal",
    10: "rocm",
    13: "cuda",
    14: "oneapi",
}
"""DLPack's device types by name; 13 is memory that CUDA moves between host and GPU."""

_HOST_DEVICE_TYPES: Final = frozenset({1, 3, 11})
"""DLPack's device types whose memory a CPU reads: CPU, and host memory pinned by CUDA or ROCm."""


@dataclass(slots=True, eq=False)
class DeviceArray:
    """An array on a device, as its backend describes it.

    Attributes
    ----------
    array : object
        The array itself, of whatever library.
    shape, strides : tuple of int
        Its shape, and its strides in bytes.
    dtype : numpy.dtype
        Its dtype.
    address : int
        Where its first element lies, in its device's memory.
    writeable : bool
        Whether results may be written to it.
    place : str
        The device, such as ``"cuda:0"``: arrays of one call share it.
    stream : object
        What the backend orders its work by at the time; None if it needs nothing.
    """

    array: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]
    address: int
    writeable: bool
    place: str
    stream: Any = None

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of all elements."""
        return self.size * self.dtype.itemsize

    @property
    def flags(self) -> Any:
        """The flags that NumPy gives an array in these places."""
        return self._places().flags

    def transpose(self, axes: tuple[int, ...]) -> NDArray[Any]:
        """Return an array of the same places with its axes in another order: see `_places`."""
        return self._places().transpose(axes)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """Tell NumPy the places, for `numpy.shares_memory` and its like."""
        return {
            "version": 3,
            "shape": self.shape,
            "strides": self.strides,
            "typestr": self.dtype.str,
            "data": (self.address, not self.writeable),
        }

    def _places(self) -> NDArray[Any]:
        """Return a NumPy array of these addresses: **to read an element would end the process**."""
        return np.asarray(self)


def on_device(x: object) -> bool:
    """Return whether ``x`` is an array in memory that a CPU does not read."""
    # DLPack is asked first: __cuda_array_interface__ of a torch tensor that requires grad raises,
    # and Numba's arrays in memory that CUDA maps have one, but are NumPy arrays.
    dlpack_device = getattr(x, "__dlpack_device__", None)
    if dlpack_device is not None:
        return dlpack_device()[0] not in _HOST_DEVICE_TYPES
    return isinstance(x, DeviceArray) or hasattr(x, "__cuda_array_interface__")


def where(x: object) -> str:
    """Return where an array is, for messages, and to compare."""
    if isinstance(x, DeviceArray):
        return f"on {x.place}"
    if not on_device(x):
        return "in host memory"
    dlpack_device = getattr(x, "__dlpack_device__", None)
    if dlpack_device is None:
        return "on a CUDA device"
    device_type, number = dlpack_device()
    return f"on {_DEVICES.get(device_type, f'DLPack device type {int(device_type)}')}:{number}"
