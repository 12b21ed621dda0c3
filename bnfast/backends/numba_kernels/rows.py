"""Kernels for channels-first arrays (N, C, S), whose reductions are in `tiles`.

The fused kernels give each thread whole channels where there are enough of them, so that a group of
channels is transformed while it is still in the cache; else the threads share the tiles of every
channel, and meet in between.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np
from numba import prange

from bnfast.backends.numba_kernels.addresses import (
    get,
    present,
    room,
)
from bnfast.backends.numba_kernels.arithmetic import (
    fill_backward,
    fill_forward,
    share,
)
from bnfast.backends.numba_kernels.compiling import Array, Shape, Vector, inline, step
from bnfast.backends.numba_kernels.lanes import (
    LANES,
)
from bnfast.backends.numba_kernels.tiles import (
    ADJACENT,
    add_tiles,
    measure_share,
    measure_tiles,
    merge_tiles,
    scratch_of,
    side_by_side,
    sum_share,
    sum_tiles,
    tiles_of,
)
from bnfast.backends.numba_kernels.walks import (
    cycle_width,
    gradient_by_cycle,
    gradient_by_runs,
    normalize_by_cycle,
    normalize_by_runs,
    outgrows,
    past_cache,
    stretch,
)

CACHED = 524288
"""Bytes of a group of channels, at most."""

CYCLES = 4
"""Samples from which on short runs are worth a table of the numbers of a whole sample."""


@inline
def group_of(samples, size, itemsize, arrays):
    """Return how many channels the fused kernels handle together."""
    return max(1, min(ADJACENT // size, CACHED // (samples * size * itemsize * arrays)))


@inline
def enough_channels(channels, size, threads):
    """Return whether threads should take whole channels.

    Where they finish at about the same time, and runs are not short: of 7x7 planes that fit the
    cache, the second pass in the order of memory takes two thirds of the time in training.
    """
    return size >= 128 and (channels % threads == 0 or channels >= 8 * threads)


@step
def train_share(
    x, weight, bias, eps, residual, y, mean, m2, relu, shape, moments, numbers, wide, past,
    thread, threads,
):  # fmt: skip
    """Measure and transform a thread's share of the channels, one group after the other."""
    samples, channels, size = shape
    begin, end = share(channels, thread, threads), share(channels, thread + 1, threads)
    group = group_of(samples, size, numbers.itemsize, 1)
    scratch = scratch_of(shape)
    for first in range(begin, end, group):
        stop = min(first + group, end)
        for c in range(first, stop, side_by_side(shape)):
            for tile in range(moments.shape[1]):
                end_ = min(c + side_by_side(shape), stop)
                measure_tiles(x, shape, tile, c, end_, moments, scratch)
        for c in range(first, stop):
            merge_tiles(moments, c, mean, m2)
        n = float(samples * size)
        safe = fill_forward(numbers, wide, mean, m2, n, weight, bias, eps, first, stop)
        for sample in range(samples):
            from_, to = (sample * channels + first) * size, (sample * channels + stop) * size
            normalize_by_runs(x, residual, y, from_, to, size, numbers, wide, safe, relu, past)


def forward(
    x: Array,
    given_mean: Vector,
    given_var: Vector,
    weight: Vector,
    bias: Vector,
    eps: float,
    residual: Array,
    y: Array,
    mean: Vector,
    m2: Vector,
    relu: bool,
    dimensions: Shape,
    threads: int,
) -> None:
    """Compute mean and m2 where these are present; y where that is, by them or what is given."""
    samples, channels, size = get(dimensions, 0), get(dimensions, 1), get(dimensions, 2)
    shape = (samples, channels, size)
    elements = samples * channels * size
    numbers, wide = room(x, 4, channels), np.empty((5, channels))
    big = outgrows(elements, 3 if present(residual) else 2, numbers.itemsize)
    past = past_cache(y, x, residual, big)
    n = 1.0
    if present(mean):
        moments = np.empty((channels, tiles_of(samples, size)[3], 4))
        if present(y) and enough_channels(channels, size, threads):
            for thread in prange(threads):
                train_share(
                    x, weight, bias, eps, residual, y, mean, m2, relu, shape, moments, numbers,
                    wide, past, thread, threads,
                )  # fmt: skip
            return
        for thread in prange(threads):
            measure_share(x, shape, moments, thread, threads)
        for c in range(channels):
            merge_tiles(moments, c, mean, m2)
        given_mean, given_var, n = mean, m2, float(samples * size)
    if not present(y):
        return
    safe = fill_forward(numbers, wide, given_mean, given_var, n, weight, bias, eps, 0, channels)
    if size < LANES and samples >= CYCLES:
        width = cycle_width(channels * size) + LANES
        table, wide_table = room(x, 4, width), wide
        stretch(numbers, size, table)
        if not safe:
            wide_table = np.empty((5, width))
            stretch(wide, size, wide_table)
        for thread in prange(threads):
            begin, end = share(elements, thread, threads), share(elements, thread + 1, threads)
            normalize_by_cycle(x, residual, y, begin, end, table, wide_table, safe, relu, past)
        return
    for thread in prange(threads):
        begin, end = share(elements, thread, threads), share(elements, thread + 1, threads)
        normalize_by_runs(x, residual, y, begin, end, size, numbers, wide, safe, relu, past)


@step
def backward_share(
    dy, x, y, mean, invstd, weight, dx, dresidual, sum_dy, sum_dy_xhat, shape, sums, numbers,
    wide, past, thread, threads,
):  # fmt: skip
    """Sum and transform a thread's share of the channels, one group after the other."""
    samples, channels, size = shape
    begin, end = share(channels, thread, threads), share(channels, thread + 1, threads)
    group = group_of(samples, size, numbers.itemsize, 2)
    scratch = scratch_of(shape)
    n = float(samples * size)
    for first in range(begin, end, group):
        stop = min(first + group, end)
        for c in range(first, stop, side_by_side(shape)):
            for tile in range(sums.shape[1]):
                end_ = min(c + side_by_side(shape), stop)
                sum_tiles(dy, x, y, shape, tile, c, end_, mean, sums, scratch)
        for c in range(first, stop):
            add_tiles(sums, c, invstd, sum_dy, sum_dy_xhat)
        safe = fill_backward(
            numbers, wide, mean, invstd, weight, sum_dy, sum_dy_xhat, n, first, stop
        )
        for sample in range(samples):
            from_, to = (sample * channels + first) * size, (sample * channels + stop) * size
            gradient_by_runs(dy, x, y, dx, dresidual, from_, to, size, numbers, wide, safe, past)


def backward(
    dy: Array,
    x: Array,
    y: Array,
    mean: Vector,
    invstd: Vector,
    weight: Vector,
    sum_dy: Vector,
    sum_dy_xhat: Vector,
    measure: bool,
    n: float,
    dx: Array,
    dresidual: Array,
    dimensions: Shape,
    threads: int,
) -> None:
    """Take the sums, if ``measure``; make dx by the sums over n, and dresidual, where present."""
    samples, channels, size = get(dimensions, 0), get(dimensions, 1), get(dimensions, 2)
    shape = (samples, channels, size)
    elements = samples * channels * size
    numbers, wide = room(x, 4, channels), np.empty((5, channels))
    past = past_cache(dx, dy, x, outgrows(elements, 3, numbers.itemsize))
    if measure:
        sums = np.empty((channels, tiles_of(samples, size)[3], 2))
        if present(dx) and enough_channels(channels, size, threads):
            for thread in prange(threads):
                backward_share(
                    dy, x, y, mean, invstd, weight, dx, dresidual, sum_dy, sum_dy_xhat, shape,
                    sums, numbers, wide, past, thread, threads,
                )  # fmt: skip
            return
        for thread in prange(threads):
            sum_share(dy, x, y, shape, mean, sums, thread, threads)
        for c in range(channels):
            add_tiles(sums, c, invstd, sum_dy, sum_dy_xhat)
    if not present(dx):
        return
    safe = fill_backward(numbers, wide, mean, invstd, weight, sum_dy, sum_dy_xhat, n, 0, channels)
    if size < LANES and samples >= CYCLES:
        width = cycle_width(channels * size) + LANES
        table, wide_table = room(x, 4, width), wide
        stretch(numbers, size, table)
        if not safe:
            wide_table = np.empty((5, width))
            stretch(wide, size, wide_table)
        for thread in prange(threads):
            begin, end = share(elements, thread, threads), share(elements, thread + 1, threads)
            gradient_by_cycle(dy, x, y, dx, dresidual, begin, end, table, wide_table, safe, past)
        return
    for thread in prange(threads):
        begin, end = share(elements, thread, threads), share(elements, thread + 1, threads)
        gradient_by_runs(dy, x, y, dx, dresidual, begin, end, size, numbers, wide, safe, past)
