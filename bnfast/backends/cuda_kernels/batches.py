"""Device functions on a batch: several vectors of a thread, asked for before the first is used.

Of each vector some elements count, those from ``lows[b]`` to ``highs[b]``: a run may begin and end
within one. ``fresh`` is how many count in all.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from bnfast.backends.cuda_kernels.driver import VECTOR, device, float64

BATCH = 4
"""Vectors of a batch."""

BATCHED = BATCH * VECTOR
"""Elements of a batch. Numba takes names for sizes, but no products."""

PAIR = 2
"""Vectors of each array that an elementwise pass asks for at a time."""

PAIRED = PAIR * VECTOR
"""Elements of so many."""


@device
def mean_of(values, lows, highs, fresh):
    """Return the mean of a batch."""
    total = 0.0
    if fresh == BATCHED:
        for j in range(BATCHED):
            total += float64(values[j])
        return total / BATCHED
    for j in range(BATCHED):
        if lows[j // VECTOR] <= j % VECTOR < highs[j // VECTOR]:
            total += float64(values[j])
    return total / max(fresh, 1)


@device
def deviations(values, lows, highs, fresh, guess, off, squares):
    """Return ``off`` and ``squares`` with the distances to ``guess``, and their squares, added."""
    if fresh == BATCHED:
        for j in range(BATCHED):
            d = float64(values[j]) - guess
            off += d
            squares += d * d
    else:
        for j in range(BATCHED):
            if lows[j // VECTOR] <= j % VECTOR < highs[j // VECTOR]:
                d = float64(values[j]) - guess
                off += d
                squares += d * d
    return off, squares
