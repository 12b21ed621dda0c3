"""From a kernel's source to machine code: signatures, the disk cache, and its failures.

Every kernel is compiled for one explicit signature, taken from its annotations. Left to itself,
Numba would compile anew, within the user's call, for a read-only array or for None.
"""

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

Read: TypeAlias = NDArray[Any]
"""Parameter: an array in one of the two forms, read only."""

Write: TypeAlias = NDArray[Any]
"""Parameter: an array in one of the two forms, written."""

ReadVector: TypeAlias = NDArray[np.float64]
"""Parameter: one number per channel, read only."""

WriteVector: TypeAlias = NDArray[np.float64]
"""Parameter: one number per channel, written."""

Kernel: TypeAlias = Callable[..., Any]

_internal: Any = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}

inline: Any = njit(forceinline=True, **_internal)
"""A step that becomes part of the kernels which call it."""

step: Any = njit(**_internal)
"""A larger step, for the optimiser to inline or not."""


def build(function: FunctionType, ndim: int, dtype: np.dtype[Any], *, parallel: bool) -> Kernel:
    """Compile ``function`` for arrays of ``ndim`` dimensions of ``dtype``, or load it from disk.

    The arrays may be read-only where the annotation says `Read` or `ReadVector`. The compiled
    function gives up the GIL.
    """
    element = numba.from_dtype(dtype)
    kinds = {
        "Read": types.Array(element, ndim, "C", readonly=True),
        "Write": types.Array(element, ndim, "C"),
        "ReadVector": types.Array(types.float64, 1, "C", readonly=True),
        "WriteVector": types.Array(types.float64, 1, "C"),
        "float": types.float64,
        "int": types.intp,
        "bool": types.boolean,
    }
    annotations = function.__annotations__.items()
    parameters = [kinds[kind] for name, kind in annotations if name != "return"]
    # Numba's cache knows when the file of a kernel changes, but not the files of its steps. It
    # keeps one entry per name, so the name carries a digest of them all.
    kernel = FunctionType(function.__code__, function.__globals__, function.__name__)
    kernel.__module__ = function.__module__
    variant = "parallel" if parallel else "serial"
    kernel.__qualname__ = f"{function.__name__}-{variant}-{_digest()}"
    compile_ = functools.partial(
        njit,
        tuple(parameters),
        error_model="numpy",
        nogil=True,
        no_cfunc_wrapper=True,
        parallel=parallel,
    )
    try:
        compiled: Kernel = compile_(cache=True)(kernel)
    except Exception:
        # No directory for the cache can be written, the disk is full, or a file is damaged, which
        # can raise anything. An error of the kernel itself is raised again here.
        compiled = compile_(cache=False)(kernel)
    return compiled


@functools.cache
def _digest() -> str:
    """Return a digest of the sources in this folder."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
