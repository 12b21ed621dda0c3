"""Numba's CUDA simulator, ten times faster.

A thread of the simulator is one of Python, and the one that runs a block asks all of them in turn,
round and round, whether they wait for each other: nearly all of the time goes there. Here it waits
too. Nor are shared arrays found by their line of source through `traceback`, which reads files.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from numba.cuda.simulator import kernel, kernelapi

PATIENCE = 20.0
"""Seconds after which threads that wait for one that has left the kernel give up."""


@contextmanager
def quick() -> Iterator[None]:
    """Run simulated kernels like this inside a ``with`` block."""
    with (
        mock.patch.object(kernel.BlockManager, "run", _run),
        mock.patch.object(kernel.BlockThread, "syncthreads", _syncthreads),
        mock.patch.object(kernelapi.FakeCUDAShared, "array", _shared_array),
    ):
        yield


def _run(self: Any, grid_point: Any, *arguments: Any) -> None:
    """Run the threads of a block to their end; raise what one of them raised."""
    points = list(np.ndindex(*self._block_dim))
    self.meeting = threading.Barrier(len(points), timeout=PATIENCE)

    def target() -> None:
        try:
            self._f(*arguments)
        except BaseException:
            self.meeting.abort()
            raise

    threads = [kernel.BlockThread(target, self, grid_point, point, self._debug) for point in points]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [thread.exception for thread in threads if thread.exception]
    # Those that waited for a thread that failed say only that they did.
    errors.sort(key=lambda error: isinstance(error[0], threading.BrokenBarrierError))
    for error, trace in errors[:1]:
        raise error.with_traceback(trace)


def _syncthreads(self: Any) -> None:
    self._manager.meeting.wait()


def _shared_array(self: Any, shape: Any, dtype: Any) -> Any:
    frame = sys._getframe(1)
    kind = dtype if isinstance(dtype, type) else kernelapi.numpy_support.as_dtype(dtype)
    # Whoever reads what no thread has written gets NaN. Of two threads that come at the same time,
    # both get the array of one.
    fresh = np.full(shape, np.nan, kind)
    return self._allocations.setdefault((frame.f_code, frame.f_lineno), fresh)
