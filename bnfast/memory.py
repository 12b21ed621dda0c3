"""Large arrays on recycled memory: a block comes back when the last array that views it dies.

Memory that is fresh from the system costs a page fault for every page written to. For outputs of
50 MB and more that takes longer than batch norm itself.

The way of a block
    `empty` takes an idle block of the right size, or allocates one, and hands out an array that
    views a `_Loan` of it. Whatever is made of that array (a slice, a transpose, a memoryview, a
    DLPack capsule) keeps the loan alive. When nothing does any more, the loan's last act is to
    give the block back.
Bound
    Idle blocks hold `LIMIT` bytes at most, or what ``BNFAST_CACHE_BYTES`` says: beyond it, those
    that have been idle longest are freed. Blocks in use do not count.
Concurrency
    There is no lock. A loan can die in any thread and at any moment, in a garbage collection or a
    signal handler that interrupts this very module as well, and would then wait for a lock that
    its own thread holds. Instead each step is one operation on a dict, which the interpreter makes
    atomic, and a block belongs to whoever pops it. After a fork each process has its own dict, and
    its own copy of the memory.
Shutdown
    What runs when a loan dies uses no global names: the last ones die after those are gone.
Cost
    About 2 microseconds an array, of a call that takes 60 or more.
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

SMALLEST: Final = 2**20
"""Bytes from which an array is worth a block. Below, the C library recycles memory by itself."""

LIMIT: Final = 2**28
"""Bytes that idle blocks may hold unless ``BNFAST_CACHE_BYTES`` says otherwise."""

_ALIGNMENT: Final = 64  # bytes: a cache line, and the widest vector
_DIGITS: Final = 18  # of BNFAST_CACHE_BYTES, at most: more than any memory

_Block = NDArray[np.uint8]


class Limit(NamedTuple):
    """How many bytes idle blocks may hold, and who says so."""

    size: int
    source: str


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an uninitialised array in C order on a block of its own, aligned to 64 bytes.

    Sizes are rounded up to 16 steps per power of two, so that arrays of nearly the same size share
    blocks; the surplus, 6 % at most, is never written to.

    Parameters
    ----------
    shape : tuple of int
        Its shape.
    dtype : numpy.dtype
        Its dtype. The array has `SMALLEST` bytes or more.

    Raises
    ------
    ValueError
        If ``BNFAST_CACHE_BYTES`` is not a number of bytes.
    MemoryError
        If there is no memory, even once the idle blocks are freed.
    """
    needed = math.prod(shape) * dtype.itemsize
    step = 1 << (needed.bit_length() - 5)
    size = -(-needed // step) * step
    block = _cache.take(size)
    if block is None:
        try:
            block = _allocate(size)
        except MemoryError:
            _cache.clear()
            block = _allocate(size)
    # Not an array on the loan itself: once made read-only, it could not be made writeable again.
    return np.ndarray(shape, dtype, np.asarray(_Loan(block, _cache)))


def empty_cache() -> None:
    """Free the memory that is kept for the outputs of later calls.

    Arrays in use are not affected. Their memory is kept, in its turn, when they die.

    Examples
    --------
    >>> bnfast.empty_cache()
    >>> bnfast.show_config("dict")["cache"]["idle"]
    0
    """
    _cache.clear()


@functools.cache
def current() -> Limit:
    """Return the bound in force, and who set it."""
    text = os.environ.get("BNFAST_CACHE_BYTES", "").strip()
    if not text:
        return Limit(LIMIT, "the default")
    if not (text.isascii() and text.isdecimal() and len(text) <= _DIGITS):
        raise ValueError(
            "the environment variable BNFAST_CACHE_BYTES must be a whole number of bytes, such as "
            f"{LIMIT}, or 0 to keep nothing, not {text!r}; unset it for {LIMIT}"
        )
    return Limit(int(text), "the environment variable BNFAST_CACHE_BYTES")


def idle() -> int:
    """Return the bytes that idle blocks hold now."""
    return _cache.size


class _Cache:
    """The idle blocks, the one that has been idle longest first."""

    def __init__(self) -> None:
        self._idle: dict[int, _Block] = {}

    @functools.cached_property
    def limit(self) -> int:
        """Bytes that may be held: kept here, because `give` may not use global names."""
        return current().size

    @property
    def size(self) -> int:
        """Bytes that are held."""
        return sum(block.nbytes for block in self._blocks())

    def take(self, size: int) -> _Block | None:
        """Return an idle block of exactly ``size`` bytes, the one used last; None if none is."""
        if size <= self.limit:
            for block in reversed(self._blocks()):
                if block.nbytes == size and self._idle.pop(id(block), None) is not None:
                    return block
        return None

    def give(self, block: _Block) -> None:
        """Keep a block that nothing refers to any more, and free what is too much."""
        if block.nbytes > self.limit:
            return
        self._idle[id(block)] = block
        blocks = self._blocks()
        excess = -self.limit
        for block in blocks:
            excess += block.nbytes
        for oldest in blocks:
            if excess <= 0:
                break
            # Gone already if another thread took or freed it; then it is not idle either.
            self._idle.pop(id(oldest), None)
            excess -= oldest.nbytes

    def clear(self) -> None:
        """Free the blocks."""
        self._idle.clear()

    def _blocks(self) -> list[_Block]:
        """Return what is idle at this moment. The list keeps ids from being used anew."""
        return list(self._idle.values())


class _Loan:
    """What an array on a block views, and all its views through it: a block in use."""

    __slots__ = ("_block", "_cache")

    def __init__(self, block: _Block, cache: _Cache) -> None:
        self._block = block
        self._cache = cache

    def __del__(self) -> None:
        self._cache.give(self._block)

    @property
    def __array_struct__(self) -> Any:
        return self._block.__array_struct__


def _allocate(size: int) -> _Block:
    """Return a new block. `numpy.empty` asks for huge pages where a block has 4 MB or more."""
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size]


_cache = _Cache()


def _reset() -> None:
    """Return to the state right after import, so that a test can start from it."""
    global _cache
    current.cache_clear()
    _cache = _Cache()
