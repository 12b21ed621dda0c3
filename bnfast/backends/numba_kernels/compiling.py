"""From a kernel's source to machine code: signatures, the disk cache, and its failures.

Every kernel is compiled for one explicit signature, taken from its annotations. Left to itself,
Numba would compile anew, within the user's call, for a read-only array or for None.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, TypeAlias

import llvmlite
import numba
import numpy as np
from numba import njit, types
from numba.core.registry import cpu_target
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

_announcement = threading.Lock()  # taken by whoever logs that the cache fails, and never given back

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
    variant = "parallel" if parallel else "serial"
    kernel = FunctionType(function.__code__, function.__globals__, function.__name__)
    kernel.__module__ = function.__module__
    # Numba keeps an index of files for each name, and two processes that add to one index at a time
    # can leave it pointing at each other's files. So a name stands for one file: it has the dtype,
    # and in the digest the CPU. It also has the steps, changes of which Numba would not notice.
    kernel.__qualname__ = f"{function.__name__}-{dtype}-{variant}-{_digest()}"
    options = {"error_model": "numpy", "nogil": True, "no_cfunc_wrapper": True}
    options["parallel"] = parallel
    for again in (False, True):
        try:
            return _compiled(kernel, signature, options, cache=True)
        except _DamagedError as error:
            if again:
                _report(error)
            else:
                name = function.__name__
                _log().info("replacing what Numba's disk cache has of %s: %s", name, error)
        except Exception as error:
            _report(error)
            break
    # An error of the kernel itself is raised again here.
    return _compiled(kernel, signature, options, cache=False)


class _DamagedError(Exception):
    """What the disk cache holds cannot be used, and has been dropped from it."""


def _compiled(kernel: Kernel, signature: Any, options: dict[str, Any], *, cache: bool) -> Kernel:
    """Return the machine code of a kernel; with ``cache``, loaded from disk or saved there.

    No directory for the cache can be written, the disk is full, or a file is damaged or another's,
    which can raise anything.
    """
    dispatcher: Any = njit(cache=cache, **options)(kernel)
    try:
        dispatcher.compile(signature)
        entry: Kernel = dispatcher.overloads[signature.args].entry_point
    except Exception as error:
        if not cache:
            raise
        dispatcher._cache.flush()
        raise _DamagedError(f"{type(error).__name__}: {error}") from error
    return entry


def _report(error: Exception) -> None:
    """Log, once, that nothing can be kept on disk."""
    if _announcement.acquire(blocking=False):
        reason = " ".join(str(error).split())
        _log().warning(
            "Numba's disk cache cannot be used, so this process compiles for itself: %s: %s",
            type(error).__name__,
            reason,
        )


def _log() -> Any:
    import logging

    return logging.getLogger("bnfast")


def _address_of(dtype: str) -> Address:
    if dtype in STORAGE_DTYPES:
        return Address(types.float32, dtype)
    return Address(numba.from_dtype(np.dtype(dtype)))


@functools.cache
def _digest() -> str:
    """Return a digest of what machine code depends on: the sources in this folder, and the CPU."""
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    cpu: Any = cpu_target.target_context.codegen().magic_tuple()
    digest = hashlib.sha256(b"".join(sources))
    digest.update(repr((cpu, numba.__version__, llvmlite.__version__)).encode())
    return digest.hexdigest()[:12]
