"""Sums over the threads of a block, through shared memory: the same code runs in the simulator."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from bnfast.backends.cuda_kernels.driver import barrier, device

FAN = 8
"""Numbers that a thread adds up in one go: more means fewer barriers and longer chains."""


@device
def fold(numbers, count, width, thread, threads):
    """Add up ``count`` rows of ``width`` numbers in shared memory; the sums are in the first row.

    ::

        count = 5     a b c d e          count = 1     a + b + c + d + e

    Every thread of the block has to call it. Its own numbers may have been written without a
    barrier, and the sums may be read without one.
    """
    while count > 1:
        barrier()
        rows = (count + FAN - 1) // FAN
        for i in range(thread, rows * width, threads):
            total = numbers[i]
            for other in range(i + rows * width, count * width, rows * width):
                total += numbers[other]
            numbers[i] = total
        count = rows
    barrier()


@device
def total(value, numbers, thread, threads):
    """Return the sum of a number of each thread, to all of them."""
    numbers[thread] = value
    fold(numbers, threads, 1, thread, threads)
    result = numbers[0]
    barrier()
    return result
