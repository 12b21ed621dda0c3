"""How kernels spell their parameters; `signature` turns the annotations into Numba types."""

# mypy: disable-error-code="attr-defined"

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

Elements: TypeAlias = Any
"""A pointer to elements of one of the array forms."""

Numbers: TypeAlias = Any
"""A pointer to float64 numbers: channel vectors one after the other, or results of parts."""

Kernel: TypeAlias = Callable[..., None]


def signature(kernel: Kernel, real: Any) -> Any:
    """Return the Numba signature of a kernel for elements of the type ``real``."""
    from numba.cuda import types  # at hand only where kernels are compiled

    kinds: dict[str, Any] = {
        "Elements": types.CPointer(real),
        "Numbers": types.CPointer(types.float64),
        "float": types.float64,
        "int": types.int64,
        "bool": types.boolean,
    }
    *parameters, _ = kernel.__annotations__.values()
    return types.void(*[kinds[kind] for kind in parameters])
