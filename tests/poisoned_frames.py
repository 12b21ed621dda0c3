"""A pytest plugin for a build with AddressSanitizer: the frames around arrays become forbidden.

`bnfast.testing.guard` hands every array to a kernel inside a longer buffer. For the sanitizer the
whole of that is one piece of memory, in which any access is fine. Here what lies outside the array
is poisoned for the time of the call: exactly behind the array, and in front of it up to 7 bytes
off, since poison ends on multiples of 8.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from bnfast.testing import guard
from bnfast.testing.cases import OPERATIONS

_runtime = ctypes.CDLL(None)
_poison = _runtime.__asan_poison_memory_region
_unpoison = _runtime.__asan_unpoison_memory_region
_poison.argtypes = _unpoison.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_run = guard.run


class _Poisoning:
    """Kernels whose every call runs with the frames of its arrays poisoned."""

    def __init__(self, kernels: ModuleType) -> None:
        self._kernels = kernels

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._kernels, name)
        return _guarded(function) if name in OPERATIONS else function


def _guarded(function: Callable[..., None]) -> Callable[..., None]:
    def call(*arguments: Any, **keywords: Any) -> None:
        with ExitStack() as stack:
            for value in (*arguments, *keywords.values()):
                if isinstance(value, np.ndarray) and value.base is not None:
                    stack.enter_context(_frames_of(value))
            function(*arguments, **keywords)

    return call


@contextmanager
def _frames_of(array: np.ndarray) -> Iterator[None]:
    buffer = array.base
    first, start = buffer.ctypes.data, array.ctypes.data
    end, last = start + array.nbytes, first + buffer.nbytes
    assert first <= start
    assert end <= last
    _poison(first, start - first)
    _poison(end, last - end)
    try:
        yield
    finally:
        _unpoison(first, buffer.nbytes)


def _run_poisoned(kernels: Any, *arguments: Any, **keywords: Any) -> guard.Outputs:
    return _run(_Poisoning(kernels), *arguments, **keywords)


guard.run = _run_poisoned
