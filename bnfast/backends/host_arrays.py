"""The three array hooks of the contract for NumPy arrays, shared by every CPU backend."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnfast import memory
from bnfast.layout import Plan
from bnfast.spec import Floats

_READY = 0x101
"""NumPy's flags C_CONTIGUOUS and ALIGNED in one number: to ask for both takes twice as long."""


def accepts(x: object) -> bool:
    """Return whether ``x`` lies in host memory as a NumPy array."""
    return isinstance(x, np.ndarray)


def view(x: Any, plan: Plan) -> Floats:
    """Return ``x`` in the form that ``plan`` names.

    A view where the memory of ``x`` allows it. Else one copy, which also mends byte order and
    alignment.
    """
    if plan.axes is not None:
        x = x.transpose(plan.axes)
    if x.flags.num & _READY != _READY or x.dtype != plan.dtype:
        copy = _allocate(x.shape, plan.dtype, x.nbytes)
        np.copyto(copy, x)
        x = copy
    form: Floats = x.reshape(plan.kernel_shape)
    return form


def empty(plan: Plan, like: Any) -> Any:
    """Return a new, uninitialised array of ``plan.shape`` in the memory order of ``plan``."""
    if plan.inverse is None:
        return _allocate(plan.shape, plan.dtype, like.nbytes)
    return _allocate(plan.memory_shape, plan.dtype, like.nbytes).transpose(plan.inverse)


def _allocate(shape: tuple[int, ...], dtype: np.dtype[Any], nbytes: int) -> Floats:
    """Return an uninitialised array: where it is large, on recycled memory, aligned to 64 bytes."""
    return memory.empty(shape, dtype) if nbytes >= memory.SMALLEST else np.empty(shape, dtype)
