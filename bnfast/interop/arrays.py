"""Whatever holds numbers, as a NumPy array, without an import of the library that made it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfast import channels


def as_numpy(value: Any, name: str) -> NDArray[Any]:
    """Return ``value`` as a NumPy array.

    A torch tensor is detached and brought to the host. NumPy has no bfloat16: such a tensor is
    returned as float32, which holds every bfloat16 exactly.

    Raises
    ------
    TypeError
        If that fails, naming ``name``.
    """
    if isinstance(value, np.ndarray):
        return channels.as_array(value, name)
    is_tensor = hasattr(value, "detach")
    if not is_tensor:
        channels.refuse_device(value, name)
    try:
        if is_tensor:
            value = value.detach().cpu()
            if "bfloat16" in str(value.dtype):
                value = value.float()
            value = value.numpy()
        return channels.as_array(value, name)
    except Exception as error:
        raise TypeError(
            f"{name} should hold real numbers, got {type(value).__name__}: {error}"
        ) from error
