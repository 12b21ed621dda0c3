"""The Numba backend: kernels compiled on the user's machine, for its CPU, at first use.

This module is the front: it picks the kernel for the form and dtype of an array and for the number
of threads. What a kernel is to compute, it sees from which arrays are None. The loops are in
`bnfast.backends.numba_kernels`.

Threads
    With one thread the serial build of a kernel runs, which never enters Numba's threading layer.
    With more, Numba's own setting, which belongs to the calling thread, is put back after the call.
    Where Numba cannot start any (a threading layer was asked for that is not installed), the serial
    builds run, after one line in the log.
Fork
    On the ``omp`` layer a child that was forked from a process with worker threads is killed as
    soon as it asks for some itself, and a grandchild waits for ever. Such processes run the serial
    builds: the same bits, on one thread. A fork waits until nothing is being compiled in another
    thread, whose lock on the compiler the child would find taken for good.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

import numba
from numba.core import compiler_lock

from bnfast import forks
from bnfast.backends import caches
from bnfast.backends.host_arrays import accepts, empty, view
from bnfast.backends.numba_kernels import columns, compiling, rows, team
from bnfast.backends.numba_kernels.lanes import instruction_set
from bnfast.backends.numba_kernels.storage import STORAGE_DTYPES
from bnfast.spec import Channels, Floats

__all__ = [
    "STORAGE_DTYPES",
    "accepts",
    "assume_caches",
    "backward",
    "backward_input",
    "backward_sums",
    "empty",
    "instruction_set",
    "moments",
    "normalize",
    "train",
    "unavailable",
    "view",
]

_FORMS: dict[int, ModuleType] = {3: rows, 2: columns}
_DTYPES: dict[int | str, str] = {4: "float32", 8: "float64", "e": "float16", "E": "bfloat16"}
_numba: Any = numba  # which does not declare its public names to type checkers
_compiler_lock: Any = compiler_lock.global_compiler_lock
_caches = caches.sizes()
_most_threads: int = _numba.config.NUMBA_NUM_THREADS


def unavailable() -> str | None:
    """Return None: where Numba is missing, importing this module has failed."""
    return None


def assume_caches(core: int, last: int) -> None:
    """Cut the work for caches of so many bytes; the results do not depend on it."""
    global _caches
    _caches = caches.Caches(core, last)


def moments(x: Floats, *, mean: Channels, m2: Channels, num_threads: int) -> None:
    """See `bnfast.spec.Kernels.moments`."""
    if x.size == 0:
        mean[:] = m2[:] = 0.0
        return
    given = (x, None, None, None, None, 0.0, None)
    _run("forward", num_threads, x, (*given, None, mean, m2, False))


def normalize(
    x: Floats,
    mean: Channels,
    var: Channels,
    weight: Channels,
    bias: Channels,
    eps: float,
    residual: Floats | None,
    *,
    y: Floats,
    relu: bool,
    num_threads: int,
) -> None:
    """See `bnfast.spec.Kernels.normalize`."""
    if x.size == 0:
        return
    given = (x, mean, var, weight, bias, eps, residual)
    _run("forward", num_threads, x, (*given, y, None, None, relu))


def train(
    x: Floats,
    weight: Channels,
    bias: Channels,
    eps: float,
    residual: Floats | None,
    *,
    y: Floats,
    mean: Channels,
    m2: Channels,
    relu: bool,
    num_threads: int,
) -> None:
    """See `bnfast.spec.Kernels.train`."""
    if x.size == 0:
        mean[:] = m2[:] = 0.0
        return
    given = (x, None, None, weight, bias, eps, residual)
    _run("forward", num_threads, x, (*given, y, mean, m2, relu))


def backward_sums(
    dy: Floats,
    x: Floats,
    y: Floats | None,
    mean: Channels,
    invstd: Channels,
    *,
    sum_dy: Channels,
    sum_dy_xhat: Channels,
    relu: bool,
    num_threads: int,
) -> None:
    """See `bnfast.spec.Kernels.backward_sums`."""
    if x.size == 0:
        sum_dy[:] = sum_dy_xhat[:] = 0.0
        return
    given = (dy, x, y if relu else None, mean, invstd, None)
    _run("backward", num_threads, x, (*given, sum_dy, sum_dy_xhat, True, 1.0, None, None))


def backward_input(
    dy: Floats,
    x: Floats,
    y: Floats | None,
    mean: Channels,
    invstd: Channels,
    weight: Channels,
    sum_dy: Channels,
    sum_dy_xhat: Channels,
    count: int,
    *,
    dx: Floats,
    dresidual: Floats | None,
    relu: bool,
    num_threads: int,
) -> None:
    """See `bnfast.spec.Kernels.backward_input`."""
    if x.size == 0:
        return
    given = (dy, x, y if relu else None, mean, invstd, weight)
    _run("backward", num_threads, x, (*given, sum_dy, sum_dy_xhat, False, count, dx, dresidual))


def backward(
    dy: Floats,
    x: Floats,
    y: Floats | None,
    mean: Channels,
    invstd: Channels,
    weight: Channels,
    *,
    dx: Floats,
    dresidual: Floats | None,
    sum_dy: Channels,
    sum_dy_xhat: Channels,
    relu: bool,
    num_threads: int,
) -> None:
    """See `bnfast.spec.Kernels.backward`."""
    if x.size == 0:
        sum_dy[:] = sum_dy_xhat[:] = 0.0
        return
    given = (dy, x, y if relu else None, mean, invstd, weight)
    count = x.size // x.shape[1]
    _run("backward", num_threads, x, (*given, sum_dy, sum_dy_xhat, True, count, dx, dresidual))


def _run(name: str, num_threads: int, x: Floats, arguments: tuple[Any, ...]) -> None:
    """Call the build of a kernel that fits ``x`` and the number of threads."""
    # Sizes instead of dtypes, whose hash takes 40 ns; letters where the size does not tell.
    kind: int | str = x.itemsize
    if kind == 2:
        kind = x.dtype.char
    if num_threads == 1 or _serial_only or _most_threads == 1 or not _starts_threads():
        _kernel(name, x.ndim, kind, False)(*arguments, x, *_caches, 1)
        return
    threads = min(num_threads, _most_threads)
    kernel = _kernel(name, x.ndim, kind, True)
    before = _exchange()(threads)
    try:
        kernel(*arguments, x, *_caches, threads)
    finally:
        if before != threads:
            _exchange()(before)


@functools.cache
def _kernel(name: str, ndim: int, kind: int | str, parallel: bool) -> compiling.Kernel:
    return compiling.build(getattr(_FORMS[ndim], name), _DTYPES[kind], parallel=parallel)


@functools.cache
def _starts_threads() -> bool:
    """Start Numba's threads, and return whether that went well."""
    try:
        _numba.get_num_threads()
    except Exception as error:  # ValueError for a layer that is missing; a layer can raise anything
        import logging

        reason = " ".join(str(error).split())
        logging.getLogger("bnfast").warning("Numba cannot start threads, one is used: %s", reason)
        return False
    return True


@functools.cache
def _exchange() -> compiling.Kernel:
    return compiling.build(team.exchange, "float64", parallel=False)


def _uses_openmp() -> bool:
    try:
        return bool(_numba.threading_layer() == "omp")
    except ValueError:  # no worker thread has been started
        return False


_serial_only = forks.forked() and _uses_openmp()


def _after_fork_in_child() -> None:
    global _serial_only
    _compiler_lock.release()
    _serial_only = _serial_only or _uses_openmp()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_compiler_lock.acquire,
        after_in_parent=_compiler_lock.release,
        after_in_child=_after_fork_in_child,
    )
