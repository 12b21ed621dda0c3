"""The row ``limit``: the time that moving the bytes of a case takes, and nothing else.

Batch norm does almost no arithmetic, so no implementation is faster than reading its inputs and
writing its output once. How fast that is, `limit.c` finds out: it copies an array (backward, or
with a residual: reads two and writes one) with the widest instructions that the CPU has, on as many
threads as bnfast uses. Ordinary stores win where the arrays fit the cache, stores past the cache
where they do not, one thread where waking a second takes longer than the copy: each of these is
measured like a contender of its own, and the row shows the fastest.

The source is compiled when it is first needed, by the compiler in ``CC`` or ``cc``; without one
there is no limit, and the row fails.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cases import Problem
from numpy.typing import NDArray

SOURCE = Path(__file__).with_name("limit.c")
LINE = 64

PARALLEL_FROM = 2**14
SERIAL_UP_TO = 2**20
"""Elements. Outside of these bounds the answer is known: a team takes microseconds to wake, and one
core cannot use all of the memory."""

BYTES_PER_CALL = 2**24
"""Bytes to move in a call through ctypes, at least: then the call itself, 1 us, is below 1 %."""


@functools.cache
def library() -> ctypes.CDLL:
    """Compile and load `limit.c`."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory(prefix="bnfast-limit-") as folder:
        built = Path(folder, "limit.so")
        command = [*compiler, "-O3", "-fopenmp", "-fPIC", "-shared", str(SOURCE), "-o", str(built)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            message = f"the row 'limit' needs a C compiler: {compiler[0]} was not found; set CC"
            raise RuntimeError(message) from error
        except subprocess.CalledProcessError as error:
            message = f"compiling the row 'limit' failed: {shlex.join(command)}\n{error.stderr}"
            raise RuntimeError(message) from error
        loaded = ctypes.CDLL(str(built))
    loaded.limit_move.argtypes = [ctypes.c_void_p] * 3 + [
        ctypes.c_ssize_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_ssize_t,
    ]
    loaded.limit_move.restype = None
    loaded.limit_instruction_set.restype = ctypes.c_char_p
    return loaded


def instruction_set() -> str:
    """Return the name of the instructions in use."""
    return str(library().limit_instruction_set().decode())


class Move:
    """One way to move the bytes of a problem; `repeat` says how often a call moves them."""

    def __init__(
        self, problem: Problem, arrays: Sequence[NDArray[Any]], streams: bool, threads: int
    ):
        self.repeat = max(1, BYTES_PER_CALL // problem.case.bytes)
        self.arrays = arrays  # keeps them alive: what follows are addresses
        target, first, *second = (array.ctypes.data for array in arrays)
        lines = arrays[0].size // LINE
        self.arguments = (target, first, second[0] if second else None, lines, streams, threads)
        self.move = library().limit_move

    def __call__(self) -> None:
        self.move(*self.arguments, self.repeat)

    def check(self) -> None:
        """Raise AssertionError unless all bytes are moved."""
        target, *sources = self.arrays
        target[:] = 0
        self.move(*self.arguments, 1)
        np.testing.assert_array_equal(target, functools.reduce(np.bitwise_xor, sources))


def moves(problem: Problem, threads: int) -> dict[str, Move]:
    """Return the ways to move the bytes of a problem that may be the fastest, by name."""
    case = problem.case
    arrays = [_aligned(problem.x.nbytes) for _ in range(1 + len(problem.inputs))]
    for array, values in zip(arrays[1:], problem.inputs, strict=True):
        array[:] = values.ravel("K").view(np.uint8)
    counts = [1] if threads == 1 or case.elements <= SERIAL_UP_TO else []
    counts += [threads] if threads > 1 and case.elements >= PARALLEL_FROM else []
    kinds = {"ordinary": False, "non-temporal": True}
    if not library().limit_can_stream():
        del kinds["non-temporal"]
    return {
        f"{kind} copy, {count} thread{'s' * (count > 1)}": Move(problem, arrays, streams, count)
        for kind, streams in kinds.items()
        for count in counts
    }


def _aligned(size: int) -> NDArray[Any]:
    """Return ``size`` bytes that begin at a cache line."""
    block = np.empty(size + LINE, np.uint8)
    return block[-block.ctypes.data % LINE :][:size]
