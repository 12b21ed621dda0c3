"""How many threads a call uses, and the one rule for concurrency.

Count
    ``use_num_threads() > set_num_threads() > BNFAST_NUM_THREADS > OMP_NUM_THREADS > the CPUs that
    this process may use`` (its affinity and its control group's CPU quota): the one expression in
    `current`. It is resolved here, in Python, and passed to kernels as an argument; no OpenMP or
    Numba setting of the process is changed.
Concurrency
    A process-wide try-lock guards the parallel region. A call asks `claim` how many threads to
    use, runs its kernel, and gives the answer back in a ``finally``, by
    ``free[num_threads > 1] = True``; `run` is these steps as a function. A caller that does not get
    the lock runs serially, which computes the same bits. So N Python threads never start N teams,
    nesting is safe, and a runtime that aborts on concurrent entry (Numba's ``workqueue`` layer)
    never sees one.
Interrupts
    The lock is a key of the dict `free`: to delete it is to take the lock, to set it, to give it
    back. Either is one step of the interpreter. Around a call of a function there are moments when
    Python handles an interrupt, and Ctrl-C in one of these would leave the lock taken for good.
Fork
    Before a fork, every backend module in use that defines a function ``before_fork()`` is called:
    the place to end a pool of worker threads that a child would wait for in vain (libgomp's, for
    one). The child starts with a new lock, since the thread that held the old one may not exist
    there. Where nothing could be ended (bnfast was imported after the fork, or the fork was one of
    a C program that calls no hooks before it) and OpenMP is in the process already, the thread that
    came from the fork is an orphan: its calls are serial. Threads that are started later are not.
Cost
    To claim and to give back together take about 0.3 microseconds (``benchmarks/test_choice.py``).
"""

from __future__ import annotations

import functools
import math
import operator
import os
import posixpath
import threading
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, Final, NamedTuple, SupportsIndex

from bnfast import forks, registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SERIAL_BELOW: Final = 98_304
"""Elements below which a call is serial: waking a team takes longer than what it would save. Two
threads take 1.65 times as long as one for 65,536 elements in inference, 0.73 for 131,072."""

MAX_THREADS: Final = 4096
"""The most threads that can be asked for. Where a thread cannot be started, OpenMP runtimes end
the process; this turns a slip such as bytes for threads into an error instead."""


class ThreadCount(NamedTuple):
    """A number of threads, and who asked for it."""

    number: int
    source: str


_process_count: ThreadCount | None = None
_context_count: ContextVar[ThreadCount | None] = ContextVar("bnfast_num_threads", default=None)
free: Final[dict[bool, bool]] = {True: True}
"""Has the key True while no call is in the parallel region. Other keys mean nothing."""

_ended = False  # whether a fork is under way before which worker threads were ended
_orphan = threading.main_thread().ident if forks.forked() and forks.openmp_is_loaded() else None


def get_num_threads() -> int:
    """Return the number of threads that a call may use here and now.

    Small problems, and calls made while another one is using the threads, run on one.

    Raises
    ------
    ValueError
        If ``BNFAST_NUM_THREADS`` decides, and is not a whole number of 1 or more.

    Examples
    --------
    >>> with bnfast.use_num_threads(2):
    ...     bnfast.get_num_threads()
    2
    """
    return current().number


def set_num_threads(num_threads: SupportsIndex | None) -> None:
    """Set the number of threads for the whole process.

    Parameters
    ----------
    num_threads : int or None
        1 to 4096; None leaves the number to the environment again.

    Raises
    ------
    TypeError
        If it is not a whole number (a bool is not one).
    ValueError
        If it is out of range.

    Examples
    --------
    >>> bnfast.set_num_threads(1)
    >>> bnfast.get_num_threads()
    1
    >>> bnfast.set_num_threads(None)
    """
    global _process_count
    _process_count = None if num_threads is None else _checked(num_threads, "set_num_threads()")


@contextmanager
def use_num_threads(num_threads: SupportsIndex) -> Iterator[None]:
    """Set the number of threads inside a ``with`` block.

    The number lives in a `contextvars.ContextVar`: asyncio tasks and `asyncio.to_thread` inherit
    it, other tasks do not see it, and a new `threading.Thread` starts without it (it inherits
    where ``sys.flags.thread_inherit_context`` is set).

    Parameters
    ----------
    num_threads : int
        1 to 4096.

    Raises
    ------
    TypeError, ValueError
        As for `set_num_threads`, on entering the block.

    Examples
    --------
    >>> with bnfast.use_num_threads(1):
    ...     y = bnfast.BatchNorm2d(3)(np.ones((2, 3, 4, 4), np.float32))
    """
    token = _context_count.set(_checked(num_threads, "use_num_threads()"))
    try:
        yield
    finally:
        _context_count.reset(token)


class beside_spinning:
    """One thread inside a ``with`` block, for a call between those of a library with threads.

    Those of OpenBLAS spin for milliseconds after a matrix product. Where they hold the cores, a
    team waits for its second thread as long: 28 ms for the batch norms of a ResNet-50 in ONNX's
    evaluator, on two cores, where one thread takes 1.8. A number that somebody has set is left
    alone, and so are calls on `FEW` elements or more, which outlast the spinning.
    """

    FEW: Final = 2**22

    __slots__ = ("_token",)

    def __init__(self, elements: int) -> None:
        self._token: Token[ThreadCount | None] | None = None
        if SERIAL_BELOW <= elements < self.FEW and current() is _available():
            self._token = _context_count.set(ThreadCount(1, "threads of others that spin"))

    def __enter__(self) -> None:
        """Begin the block."""

    def __exit__(self, *error: object) -> None:
        """Take the number back."""
        if self._token is not None:
            _context_count.reset(self._token)


def claim(elements: int) -> int:
    """Return the number of threads for a kernel on so many elements, to be given back to `free`.

    1 if the problem is small, if one thread is all there is, or if another call is in the parallel
    region. Raises what `get_num_threads` raises; then nothing is held.
    """
    if elements < SERIAL_BELOW:
        return 1
    count = current().number
    if count == 1:
        return 1
    try:
        del free[True]
    except KeyError:
        return 1
    return count


def run(kernel: Callable[..., None], elements: int, *arguments: Any, **more: Any) -> None:
    """Call a kernel on so many elements, with the threads that it can claim."""
    num_threads = claim(elements)
    try:
        kernel(*arguments, **more, num_threads=num_threads)
    finally:
        free[num_threads > 1] = True


def current() -> ThreadCount:
    """Return the count in force, and who asked for it: the last expression is the precedence."""
    if _orphan is not None and _orphan == threading.get_ident():
        return ThreadCount(1, "a fork, which took OpenMP's threads away from this one")
    return _context_count.get() or _process_count or _environment() or _available()


@functools.cache
def _environment() -> ThreadCount | None:
    """Return what the environment asks for; None if it does not."""
    text = os.environ.get("BNFAST_NUM_THREADS", "").strip()
    if text:
        count = _whole_number(text)
        if count is None:
            raise ValueError(
                f"the environment variable BNFAST_NUM_THREADS must be a whole number from 1 to "
                f"{MAX_THREADS}, not {text!r}; unset it to use the CPUs that are available"
            )
        return ThreadCount(count, "the environment variable BNFAST_NUM_THREADS")
    # A list gives a number for each nesting level. A malformed value is passed over, as OpenMP
    # runtimes do: the variable is theirs.
    count = _whole_number(os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip())
    if count is not None:
        return ThreadCount(count, "the environment variable OMP_NUM_THREADS")
    return None


@functools.cache
def _available() -> ThreadCount:
    """Return the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = _cgroup_quota()
    if quota < count:
        return ThreadCount(max(1, math.ceil(quota)), "the CPU quota of this control group")
    return ThreadCount(count, "the CPUs that this process may use")


def _cgroup_quota(membership: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> float:
    """Return the CPU time per time that Linux control groups grant this process; inf: no limit.

    A line of ``membership`` is ``id:controllers:path``: version 2 has no controllers, version 1
    has ``cpu`` among them. A limit on any group above ours binds us too. A container often mounts
    its own group as the root, under which the rest of the path does not exist.
    """
    quotas = [math.inf]
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        hierarchy = posixpath.join(root, "cpu") if controllers else root
        # A group outside of our namespace is shown with a leading "..", which normpath drops.
        groups = posixpath.normpath("/" + path.lstrip("/")).split("/")
        for depth in range(1, len(groups) + 1):
            quotas.append(_quota_of(hierarchy + "/".join(groups[:depth])))
    return min(quotas)


def _quota_of(directory: str) -> float:
    """Return the CPU limit in the files of one control group; inf: none."""
    limit = _read(directory, "cpu.max") or " ".join(
        (_read(directory, "cpu.cfs_quota_us"), _read(directory, "cpu.cfs_period_us"))
    )
    match limit.split():
        case [quota, period] if quota.isdecimal() and period.isdecimal() and int(period) > 0:
            return int(quota) / int(period)
        case _:  # "max" in version 2, "-1" in version 1, or no such files
            return math.inf


def _read(*path: str) -> str:
    """Return the text of a small file, or "" if it cannot be read."""
    try:
        with open(posixpath.join(*path), encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""


def _whole_number(text: str) -> int | None:
    """Return a number of threads written in decimal digits; None if the text is anything else."""
    if text.isascii() and text.isdecimal() and 1 <= int(text) <= MAX_THREADS:
        return int(text)
    return None


def _checked(num_threads: SupportsIndex, source: str) -> ThreadCount:
    if isinstance(num_threads, bool) or not hasattr(num_threads, "__index__"):
        raise TypeError(
            f"{source} takes a whole number of threads, "
            f"not {type(num_threads).__name__}: {num_threads!r}"
        )
    count = operator.index(num_threads)
    if not 1 <= count <= MAX_THREADS:
        raise ValueError(f"{source} takes from 1 to {MAX_THREADS} threads, not {count}")
    return ThreadCount(count, source)


def _before_fork() -> None:
    global _ended
    if _orphan == threading.get_ident():
        return  # to end threads that do not exist would wait for them
    for kernels in registry.loaded():
        before_fork = getattr(kernels, "before_fork", None)
        if before_fork is not None:
            before_fork()
            _ended = True


def _after_fork_in_parent() -> None:
    global _ended
    _ended = False


def _after_fork_in_child() -> None:
    global _ended, _orphan
    free[True] = True
    if _orphan != threading.get_ident():
        lost = not _ended and forks.openmp_is_loaded()
        _orphan = threading.get_ident() if lost else None
    _ended = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )


def _reset() -> None:
    """Return to the state right after import, so that a test can start from it."""
    global _process_count
    _process_count = None
    _environment.cache_clear()
    _available.cache_clear()
