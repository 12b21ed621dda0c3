"""The three array hooks of the contract for NumPy arrays, shared by every CPU backend."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnfast.layout import Plan
from bnfast.spec import Floats


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
    flags = x.flags
    if not (flags.c_contiguous and flags.aligned and x.dtype == plan.dtype):
        copy = np.empty(x.shape, plan.dtype)
        np.copyto(copy, x)
        x = copy
    form: Floats = x.reshape(plan.kernel_shape)
    return form


def empty(plan: Plan, like: Any) -> Any:
    """Return a new, uninitialised array of ``plan.shape`` in the memory order of ``plan``."""
    if plan.inverse is None:
        return np.empty(plan.shape, plan.dtype)
    return np.empty(plan.memory_shape, plan.dtype).transpose(plan.inverse)
