"""From a kernel's source to machine code: signatures, the disk cache, and its failures.

Every kernel is compiled for one explicit signature, taken from its annotations. Left to itself,
Numba would compile anew, within the user's call, for a read-only array or for None.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, TypeAlias

import numba
import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from bnfast.backends.numba_kernels.addresses import Address, Dimensions
from bnfast.backends.numba_kernels.storage import STORAGE_DTYPES

Array: TypeAlias = "NDArray[Any] | None"
"""Parameter: an array in one of the two forms, or None; the kernel gets its `Address`."""

Vector: TypeAlias = "NDArray[np.float64] | None"
"""Parameter: one number per channel, or None; the kernel gets its `Address`."""

Shape: TypeAlias = NDArray[Any]
"""Parameter: an array; the kernel gets the address of its dimensions."""

Kernel: TypeAlias = Callable[..., Any]

_internal: Any = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}

inline: Any = njit(forceinline=True, **_internal)
"""A step that becomes part of the kernels which call it."""

step: Any = njit(**_internal)
"""A larger step, for the optimiser to inline or not."""


def build(function: Callable[..., Any], dtype: str, *, parallel: bool) -> Kernel:
    """Compile ``function`` for arrays of the dtype of that name, or load it from disk.

    What is returned skips Numba's dispatcher, which would ask every argument for its type. It takes
    positional arguments, does not check them, and gives up the GIL.
    """
    kinds: dict[str, Any] = {
        "Array": _address_of(dtype),
        "Vector": Address(types.float64),
        "Shape": Dimensions(),
        "float": types.float64,
        "int": types.intp,
        "bool": types.boolean,
    }
    *parameters, result = function.__annotations__.values()
    returned = types.void if result == "None" else kinds[result]
    signature = returned(*[kinds[kind] for kind in parameters])
    # Numba's cache knows when the file of a kernel changes, but not the files of its steps. It
    # keeps one entry per name, so the name carries a digest of them all.
    kernel = FunctionType(function.__code__, function.__globals__, function.__name__)
    kernel.__module__ = function.__module__
    variant = "parallel" if parallel else "serial"
    kernel.__qualname__ = f"{function.__name__}-{variant}-{_digest()}"
    compile_ = functools.partial(
        njit,
        signature,
        error_model="numpy",
        nogil=True,
        no_cfunc_wrapper=True,
        parallel=parallel,
    )
    compiled: Any
    try:
        compiled = compile_(cache=True)(kernel)
    except Exception:
        # No directory for the cache can be written, the disk is full, or a file is damaged, which
        # can raise anything. An error of the kernel itself is raised again here.
        compiled = compile_(cache=False)(kernel)
    entry: Kernel = compiled.overloads[signature.args].entry_point
    return entry


def _address_of(dtype: str) -> Address:
    if dtype in STORAGE_DTYPES:
        return Address(types.float32, dtype)
    return Address(numba.from_dtype(np.dtype(dtype)))


@functools.cache
def _digest() -> str:
    """Return a digest of the sources in this folder."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
