"""What a kernel is compiled for: `signature` reads its annotations, `launch_bounds` its name."""

# mypy: disable-error-code="attr-defined"

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

Elements: TypeAlias = Any
"""A pointer to elements of one of the array forms."""

Numbers: TypeAlias = Any
"""A pointer to float64 numbers: channel vectors one after the other, or results of parts."""

Kernel: TypeAlias = Callable[..., None]


def signature(kernel: Kernel, element: Any) -> Any:
    """Return the Numba signature of a kernel for arrays of elements of a type."""
    from numba.cuda import types  # at hand only where kernels are compiled

    kinds: dict[str, Any] = {
        "Elements": types.CPointer(element),
        "Numbers": types.CPointer(types.float64),
        "float": types.float64,
        "int": types.int64,
        "bool": types.boolean,
    }
    *parameters, _ = kernel.__annotations__.values()
    return types.void(*[kinds[kind] for kind in parameters])


def launch_bounds(kernel: Kernel, element: Any) -> tuple[int, int]:
    """Return the threads of a block, and how many blocks a multiprocessor has registers for.

    More blocks hide more of the time that memory takes. These are the most that none of the kernels
    spills registers with, at any compute capability from 7.5 to 9.0.
    """
    many = ("rows_moments", "columns_moments", "columns_normalize")
    return 256, 2 if element.bitwidth == 64 or kernel.__name__ in many else 3
