"""Reading where an array lies from DLPack, for arrays that have no ``__cuda_array_interface__``."""

from __future__ import annotations

import ctypes
from typing import Any, Final

import numpy as np

_KINDS: Final = {0: "i", 1: "u", 2: "f", 5: "c", 6: "b"}
"""NumPy's letters for DLPack's type codes: integer, unsigned, float, complex, bool."""

_BFLOAT: Final = 4
"""The type code of bfloat16, which NumPy has no letter for."""

LEGACY_STREAM: Final = 1
"""The default stream that waits for all others: DLPack's and the array interface's number."""


class _Tensor(ctypes.Structure):
    """``DLTensor``, which ``DLManagedTensor`` begins with."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


# A prototype of our own: all users of an attribute of ctypes.pythonapi share its types.
_pointer_of = ctypes.PYFUNCTYPE(ctypes.POINTER(_Tensor), ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def interface(x: Any) -> dict[str, Any]:
    """Return what ``__cuda_array_interface__`` of ``x`` would say, and the name of bfloat16.

    Its producer is asked to order its work before the legacy default stream. The capsule is not
    consumed: it lets go of the memory when this function returns, and ``x`` keeps it.
    """
    capsule = x.__dlpack__(stream=LEGACY_STREAM)
    tensor = _pointer_of(capsule, b"dltensor").contents
    kind = _KINDS.get(tensor.code, "V")
    if tensor.lanes != 1 or tensor.bits % 8:
        kind = "V"
    dtype = np.dtype(f"{kind}{max(1, tensor.bits // 8)}")
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    strides = None
    if tensor.strides:
        strides = tuple(tensor.strides[axis] * dtype.itemsize for axis in range(tensor.ndim))
    return {
        "version": 3,
        "shape": shape,
        "strides": strides,
        "typestr": dtype.str,
        "dtype": "bfloat16" if tensor.code == _BFLOAT and dtype == "V2" else None,
        "data": ((tensor.data or 0) + tensor.byte_offset, False),
        "stream": LEGACY_STREAM,
    }
