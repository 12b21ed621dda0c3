"""Sums over the threads of a block, through shared memory: the same code runs in the simulator."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from bnfast.backends.cuda_kernels.driver import MOST_THREADS, barrier, device, divide

FAN = 8
"""Numbers that a thread adds up in one go: more means fewer barriers and longer chains."""

NUMBERS = 2 * MOST_THREADS
"""Numbers in shared memory that `totals` needs."""


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
        rows = divide(count + FAN - 1, FAN)
        i = thread
        while i < rows * width:
            total = numbers[i]
            other = i + rows * width
            while other < count * width:
                total += numbers[other]
                other += rows * width
            numbers[i] = total
            i += threads
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


@device
def totals(one, other, numbers, thread, threads):
    """Return the sums of two numbers of each thread, to all of them."""
    numbers[2 * thread] = one
    numbers[2 * thread + 1] = other
    fold(numbers, threads, 2, thread, threads)
    first, second = numbers[0], numbers[1]
    barrier()
    return first, second
