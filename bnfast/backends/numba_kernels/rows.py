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
    fence,
    get,
    itemsize_of,
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
    add_tiles,
    ahead_of,
    measure_share,
    measure_tiles,
    merge_tiles,
    most_of,
    scratch_of,
    side_by_side,
    sum_share,
    sum_tiles,
    tiles_of,
)
from bnfast.backends.numba_kernels.walks import (
    BEYOND,
    cycle_width,
    gradient_by_cycle,
    gradient_by_runs,
    lines_ahead,
    normalize_by_cycle,
    normalize_by_runs,
    past_cache,
    stretch,
    table_for,
)

CYCLES = 4
"""Samples from which on short runs are worth a table of the numbers of a whole sample."""


@inline
def slab_of(channels, channel, core, large, threads):
    """Return how many adjacent channels, of so many bytes each, a thread does at a time.

    As many as fit into a share of its cache, in slabs that the threads can share evenly. The share
    is half, or, where memory has to be asked for, a quarter: the next slab comes in while this one
    is written.
    """
    fitting = max(1, core // (4 if large else 2) // channel)
    rounds = -(-channels // (fitting * threads))
    return -(-channels // (rounds * threads))


@inline
def keeps_channels_whole(channels, slab, threads):
    """Return whether each channel is best done by one thread: not if threads would idle."""
    slabs = -(-channels // slab)
    return slabs % threads == 0 or slabs >= 8 * threads


@step
def train_share(
    x, weight, bias, eps, residual, y, mean, m2, relu, shape, moments, numbers, wide, slab, past,
    large, thread, threads,
):  # fmt: skip
    """Measure and transform a thread's share of the slabs of channels, one after the other."""
    samples, channels, size, _, _ = shape
    slabs = -(-channels // slab)
    begin, end = share(slabs, thread, threads) * slab, share(slabs, thread + 1, threads) * slab
    ahead = slab * size if large else 0
    scratch = scratch_of(shape)
    for first in range(begin, min(end, channels), slab):
        stop = min(first + slab, channels)
        for c in range(first, stop, side_by_side(channels, size)):
            for tile in range(moments.shape[1]):
                end_ = min(c + side_by_side(channels, size), stop)
                measure_tiles(x, shape, tile, c, end_, moments, scratch)
        for c in range(first, stop):
            merge_tiles(moments, c, mean, m2)
        n = float(samples * size)
        safe = fill_forward(numbers, wide, mean, m2, n, weight, bias, eps, first, stop)
        for sample in range(samples):
            from_, to = (sample * channels + first) * size, (sample * channels + stop) * size
            normalize_by_runs(
                x, residual, y, from_, to, size, numbers, wide, safe, relu, past, ahead
            )
    fence()


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
    core: int,
    last: int,
    threads: int,
) -> None:
    """Compute mean and m2 where these are present; y where that is, by them or what is given."""
    samples, channels, size = get(dimensions, 0), get(dimensions, 1), get(dimensions, 2)
    elements = samples * channels * size
    numbers, wide = room(x, 4, channels), np.empty((5, channels))
    most = most_of(itemsize_of(x), size)
    far = ahead_of(samples, channels, size, itemsize_of(x), core)
    shape = samples, channels, size, far, most
    bytes_ = elements * itemsize_of(x)
    large = bytes_ * (3 if present(residual) else 2) > last
    past, ahead = past_cache(y, x, residual, large), lines_ahead(x, large)
    n = 1.0
    if present(mean):
        moments = np.empty((channels, tiles_of(samples, size, most)[3], 4))
        slab = slab_of(channels, bytes_ // channels, core, large, threads)
        if present(y) and keeps_channels_whole(channels, slab, threads):
            for thread in prange(threads):
                train_share(
                    x, weight, bias, eps, residual, y, mean, m2, relu, shape, moments, numbers,
                    wide, slab, past, large, thread, threads,
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
        width = cycle_width(channels * size)
        table, wide_table = table_for(y, width, past), wide
        stretch(numbers, size, table)
        if not safe:
            wide_table = np.empty((5, width + BEYOND))
            stretch(wide, size, wide_table)
        for thread in prange(threads):
            begin, end = share(elements, thread, threads), share(elements, thread + 1, threads)
            normalize_by_cycle(
                x, residual, y, begin, end, table, wide_table, safe, relu, past, ahead
            )
        return
    for thread in prange(threads):
        begin, end = share(elements, thread, threads), share(elements, thread + 1, threads)
        normalize_by_runs(x, residual, y, begin, end, size, numbers, wide, safe, relu, past, ahead)
        fence()


@step
def backward_share(
    dy, x, y, mean, invstd, weight, dx, dresidual, sum_dy, sum_dy_xhat, shape, sums, numbers,
    wide, slab, past, large, thread, threads,
):  # fmt: skip
    """Sum and transform a thread's share of the slabs of channels, one after the other."""
    samples, channels, size, _, _ = shape
    slabs = -(-channels // slab)
    begin, end = share(slabs, thread, threads) * slab, share(slabs, thread + 1, threads) * slab
    ahead = slab * size if large else 0
    scratch = scratch_of(shape)
    n = float(samples * size)
    for first in range(begin, min(end, channels), slab):
        stop = min(first + slab, channels)
        for c in range(first, stop, side_by_side(channels, size)):
            for tile in range(sums.shape[1]):
                end_ = min(c + side_by_side(channels, size), stop)
                sum_tiles(dy, x, y, shape, tile, c, end_, mean, sums, scratch)
        for c in range(first, stop):
            add_tiles(sums, c, invstd, sum_dy, sum_dy_xhat)
        safe = fill_backward(
            numbers, wide, mean, invstd, weight, sum_dy, sum_dy_xhat, n, first, stop
        )
        for sample in range(samples):
            from_, to = (sample * channels + first) * size, (sample * channels + stop) * size
            gradient_by_runs(
                dy, x, y, dx, dresidual, from_, to, size, numbers, wide, safe, past, ahead
            )
    fence()


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
    core: int,
    last: int,
    threads: int,
) -> None:
    """Take the sums, if ``measure``; make dx by the sums over n, and dresidual, where present."""
    samples, channels, size = get(dimensions, 0), get(dimensions, 1), get(dimensions, 2)
    elements = samples * channels * size
    numbers, wide = room(x, 4, channels), np.empty((5, channels))
    most = most_of(itemsize_of(x), size)
    far = ahead_of(samples, channels, size, itemsize_of(x), core)
    shape = samples, channels, size, far, most
    bytes_ = elements * itemsize_of(x)
    inputs = 3 if present(y) else 2
    large = bytes_ * (inputs + 1) > last
    past, ahead = past_cache(dx, dy, x, large), lines_ahead(x, large)
    if measure:
        sums = np.empty((channels, tiles_of(samples, size, most)[3], 2))
        slab = slab_of(channels, bytes_ // channels * inputs, core, large, threads)
        if present(dx) and keeps_channels_whole(channels, slab, threads):
            for thread in prange(threads):
                backward_share(
                    dy, x, y, mean, invstd, weight, dx, dresidual, sum_dy, sum_dy_xhat, shape,
                    sums, numbers, wide, slab, past, large, thread, threads,
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
        width = cycle_width(channels * size)
        table, wide_table = table_for(dx, width, past), wide
        stretch(numbers, size, table)
        if not safe:
            wide_table = np.empty((5, width + BEYOND))
            stretch(wide, size, wide_table)
        for thread in prange(threads):
            begin, end = share(elements, thread, threads), share(elements, thread + 1, threads)
            gradient_by_cycle(
                dy, x, y, dx, dresidual, begin, end, table, wide_table, safe, past, ahead
            )
        return
    for thread in prange(threads):
        begin, end = share(elements, thread, threads), share(elements, thread + 1, threads)
        gradient_by_runs(
            dy, x, y, dx, dresidual, begin, end, size, numbers, wide, safe, past, ahead
        )
        fence()
