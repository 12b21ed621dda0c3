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
    native = x.dtype is plan.dtype or x.dtype == plan.dtype  # to compare takes 0.1 us
    if x.flags.num & _READY != _READY or not native:
        copy = _allocate(x.shape, plan.dtype, x.nbytes)
        np.copyto(copy, x)
        x = copy
    form: Floats = x.reshape(plan.kernel_shape)
    return form


def empty(plan: Plan, like: Any) -> Any:
    """Return a new, uninitialised array of ``plan.shape`` in the memory order of ``plan``."""
    nbytes = like.nbytes
    if plan.inverse is not None:
        return _allocate(plan.memory_shape, plan.dtype, nbytes).transpose(plan.inverse)
    if nbytes < memory.SMALLEST:  # as `_allocate` does: of a small call, each step counts
        return np.empty(plan.shape, plan.dtype)
    return _allocate(plan.shape, plan.dtype, nbytes)


def _allocate(shape: tuple[int, ...], dtype: np.dtype[Any], nbytes: int) -> Floats:
    """Return an uninitialised array: where it is large, on recycled memory, aligned to 64 bytes."""
    return memory.empty(shape, dtype) if nbytes >= memory.SMALLEST else np.empty(shape, dtype)
