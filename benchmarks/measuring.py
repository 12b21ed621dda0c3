"""How the contenders of a case are timed: in turns, in steady state; and the clock that replays it.

A round gives every contender a turn, in an order that rotates from round to round, so that none
always follows the same one. A turn is

1. a pause, until no thread of this process spins any more: those of whoever came before do so for
   a while on the core that the next one needs (seen: OpenMP's for 10 ms, onnxruntime's for 20);
2. calls that do not count, which fill the cache and wake the threads;
3. calls back to back for `TURN` seconds, in batches of `BATCH` seconds or one call, whichever is
   longer, so that reading the clock costs nothing; a result lives until the next one is made.

The figure of a turn is the median over its batches, that of a contender the median over the rounds.
A round's figures stand side by side in the saved file, so that the ratio of two contenders can be
taken round by round: a machine that slows down for a while slows both.

pytest-benchmark times one test after the other. To have turns nevertheless, the first test of a
case measures all its rows, and each test plays its row back: `PlayedBack` is a clock that stands
still, except that each call of `play` moves it by the next recorded time. As the ``timer`` of the
marker, with `play` as the function to time, it makes pytest-benchmark see the recorded rounds.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from statistics import median
from typing import Any, TypeVar

PAUSE = 0.006
"""Seconds of one look at the process's CPU time: Linux counts that of a running thread in steps of
up to 4 ms."""

PAUSES = 50
"""How often to look before the turn begins regardless."""

SETTLE = 0.002
"""Seconds of calls at the start of a turn that do not count, at least; and one batch, at least."""

TURN = 0.05
"""Seconds of calls in a turn that count, at least; and one batch, at least."""

BATCH = 0.0002
"""Seconds between two readings of the clock: a tenth of a scheduler's time slice."""

Call = Callable[[], Any]
Name = TypeVar("Name")


def take_turns(calls: dict[Name, Call], rounds: int) -> dict[Name, list[float]]:
    """Return the seconds that each contender took, one figure for each round.

    A call that does its work several times has an attribute ``repeat``, which says how often. One
    that this clock would not see the end of has a method ``seconds``, which times so many calls.
    """
    names = list(calls)
    batches = {name: _batch(call) for name, call in calls.items()}
    times: dict[Name, list[float]] = {name: [] for name in names}
    collects = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                _wait_for_spinning_threads()
                elapsed = _take_turn(calls[name], batches[name])
                times[name].append(elapsed / getattr(calls[name], "repeat", 1))
            gc.collect()
    finally:
        if collects:
            gc.enable()
    return times


def _wait_for_spinning_threads() -> None:
    for _ in range(PAUSES):
        before = time.process_time()
        time.sleep(PAUSE)
        if time.process_time() - before < PAUSE / 10:
            return


def _take_turn(call: Call, batch: int) -> float:
    _samples(call, batch, SETTLE)
    return median(_samples(call, batch, TURN))


def _samples(call: Call, batch: int, at_least: float) -> list[float]:
    """Return the seconds per call of each batch; batches are made for ``at_least`` seconds."""
    samples: list[float] = []
    while not samples or sum(samples) * batch < at_least:
        samples.append(_seconds(call, batch) / batch)
    return samples


def _batch(call: Call) -> int:
    """Return how many calls take `BATCH` seconds."""
    count = 1
    while (elapsed := _seconds(call, count)) < BATCH / 2:
        count *= 2
    return max(1, round(count * BATCH / elapsed))


def _seconds(call: Call, count: int) -> float:
    if hasattr(call, "seconds"):
        return float(call.seconds(count))
    start = time.perf_counter()
    for _ in range(count):
        result = call()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


class PlayedBack:
    """A clock for recorded times; see above."""

    def __init__(self) -> None:
        self.now = 0.0
        self.recorded: list[float] = []

    def __call__(self) -> float:
        """Return the time, which stands still."""
        return self.now

    def __repr__(self) -> str:
        return "PlayedBack"

    def load(self, times: list[float]) -> None:
        """Take the times to play."""
        self.now, self.recorded = 0.0, list(times)

    def play(self) -> None:
        """Let the next recorded time pass."""
        self.now += self.recorded.pop(0)


CLOCK = PlayedBack()
