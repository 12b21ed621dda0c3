"""Kernels for channels-first arrays (N, C, S): a channel is N runs of S adjacent elements.

Blocks of about `BLOCK` elements of one channel: a piece of one run where runs are long, several
whole runs where they are short. Block b of a channel is piece ``b % across`` of the group of runs
``b // across``::

    S = 2500, BLOCK = 1024              S = 300
    n = 0   [ b0 ][ b1 ][ b2 ]          n = 0..2   [ b0 ]
    n = 1   [ b3 ][ b4 ][ b5 ]          n = 3..5   [ b1 ]

A block is read twice, the second time from the L1 cache. The fused kernels give each thread whole
channels where there are enough of them, so that a channel is transformed while it is still in the
L2 cache; else the threads share the blocks of every channel, and meet in between.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import numpy as np
from numba import prange

from bnfast.backends.numba_kernels.arithmetic import (
    accumulate,
    fill_backward,
    fill_forward,
    gradient,
    merge,
    output,
    settle,
    share,
)
from bnfast.backends.numba_kernels.compiling import (
    Read,
    ReadVector,
    Write,
    WriteVector,
    inline,
    step,
)
from bnfast.backends.numba_kernels.lanes import (
    LANES,
    cast,
    last_lanes,
    load,
    load_last,
    muladd,
    store,
    store_last,
    total,
    where_positive,
    zeros,
)

BLOCK = 1024
"""Elements of a block: 64 additions a lane, which errs by less than `spec.SUM_UNITS`."""


@inline
def blocks_of(x):
    """Return the runs and the length of a block, and how many blocks a channel has."""
    samples, _, size = x.shape
    if size < BLOCK:
        runs, length = BLOCK // size, size
    else:
        pieces = -(-size // BLOCK)
        runs, length = 1, -(-size // (pieces * LANES)) * LANES
    across = -(-size // length)
    return runs, length, across, -(-samples // runs) * across


@inline
def block_at(x, channel, block):
    """Return where a block starts, its runs, the step between them, and their length."""
    samples, channels, size = x.shape
    runs, length, across, _ = blocks_of(x)
    group, piece = block // across, block % across
    start = (group * runs * channels + channel) * size + piece * length
    return (
        start,
        min(runs, samples - group * runs),
        channels * size,
        min(length, size - piece * length),
    )


@step
def measure_block(x, channel, block, into):
    """Put count, mean, its error and m2 of a block into four numbers."""
    start, runs, stride, length = block_at(x, channel, block)
    rest = length % LANES
    count = runs * length
    values = zeros()
    for first in range(start, start + runs * stride, stride):
        stop = first + length
        for i in range(first, stop - rest, LANES):
            values = values + cast(load(x, i), values)
        if rest:
            values = values + cast(load_last(x, stop, rest), values)
    mean = total(values) / count
    deviations = zeros()
    squares = zeros()
    for first in range(start, start + runs * stride, stride):
        stop = first + length
        for i in range(first, stop - rest, LANES):
            d = cast(load(x, i), values) - mean
            deviations = deviations + d
            squares = muladd(d, d, squares)
        if rest:
            d = last_lanes(cast(load_last(x, stop, rest), values) - mean, rest)
            deviations = deviations + d
            squares = muladd(d, d, squares)
    deviation = total(deviations)
    into[0] = count
    into[1] = mean
    into[2] = deviation / count
    m2 = total(squares) - deviation * (deviation / count)
    into[3] = 0.0 if m2 < 0.0 else m2


@step
def merge_blocks(blocks, channel, mean, m2):
    """Merge the blocks of a channel in order."""
    count, center, low, spread = blocks[0]
    spread_low = 0.0
    plain = count * center
    for block in range(1, len(blocks)):
        other_count, other_mean, other_low, other_m2 = blocks[block]
        center, low, spread, spread_low = merge(
            count, center, low, spread, spread_low, other_count, other_mean, other_low, other_m2
        )
        count += other_count
        plain += other_count * other_mean
    # Deviations from an infinite mean are NaN; the mean itself is not.
    mean[channel] = center + low if np.isfinite(center + low) else plain / count
    m2[channel] = settle(spread, spread_low)


def moments(x: Read, mean: WriteVector, m2: WriteVector, threads: int) -> None:
    """Compute the mean and m2 of every channel."""
    channels = x.shape[1]
    per_channel = blocks_of(x)[3]
    units = channels * per_channel
    blocks = np.empty((channels, per_channel, 4))
    for thread in prange(threads):
        for unit in range(share(units, thread, threads), share(units, thread + 1, threads)):
            channel, block = unit // per_channel, unit % per_channel
            measure_block(x, channel, block, blocks[channel, block])
    for channel in range(channels):
        merge_blocks(blocks[channel], channel, mean, m2)


@step
def normalize_run(x, residual, y, start, stop, head, scale, shift, add, relu):
    """Transform the elements of one channel from ``start`` to ``stop``."""
    count = stop - start
    if count < LANES:
        value, other = load_last(x, stop, count), load_last(residual, stop, count)
        store_last(y, stop, output(value, other, head, scale, shift, add, relu), count)
        return
    # The last sixteen may overlap those before them. They are computed before anything is
    # written, since y may be x.
    last = stop - LANES
    final = output(load(x, last), load(residual, last), head, scale, shift, add, relu)
    for i in range(start, last, LANES):
        store(y, i, output(load(x, i), load(residual, i), head, scale, shift, add, relu))
    store(y, last, final)


@step
def normalize_piece(x, residual, y, start, stop, table, wide, c, add, relu):
    """Transform the elements of channel ``c`` from ``start`` to ``stop`` by its row of the table."""
    if table[3, c] != 0:
        head, scale, shift = table[0, c], table[1, c], table[2, c]
        normalize_run(x, residual, y, start, stop, head, scale, shift, add, relu)
    else:
        center, scale, bias = wide[0, c], wide[1, c], wide[2, c]
        normalize_run(x, residual, y, start, stop, center, scale, bias, add, relu)


@step
def normalize_pieces(x, residual, y, table, wide, add, relu, thread, threads):
    """Transform a thread's share of the array, in the order of memory."""
    _, channels, size = x.shape
    _, length, across, _ = blocks_of(x)
    units = x.shape[0] * channels * across
    for unit in range(share(units, thread, threads), share(units, thread + 1, threads)):
        run, piece = unit // across, unit % across
        start = run * size + piece * length
        stop = run * size + min((piece + 1) * length, size)
        normalize_piece(x, residual, y, start, stop, table, wide, run % channels, add, relu)


def normalize(
    x: Read,
    mean: ReadVector,
    var: ReadVector,
    weight: ReadVector,
    bias: ReadVector,
    eps: float,
    residual: Read,
    y: Write,
    add: bool,
    relu: bool,
    threads: int,
) -> None:
    """Transform every channel by given statistics."""
    table = np.empty((4, x.shape[1]), x.dtype)
    wide = np.empty((3, x.shape[1]))
    fill_forward(table, wide, mean, var, weight, bias, eps, 0, x.shape[1])
    for thread in prange(threads):
        normalize_pieces(x, residual, y, table, wide, add, relu, thread, threads)


@inline
def enough_channels(channels, threads):
    """Return whether threads that take whole channels finish at about the same time."""
    return channels % threads == 0 or channels >= 8 * threads


def train(
    x: Read,
    weight: ReadVector,
    bias: ReadVector,
    eps: float,
    residual: Read,
    y: Write,
    mean: WriteVector,
    m2: WriteVector,
    add: bool,
    relu: bool,
    threads: int,
) -> None:
    """Compute the moments of every channel and transform it by them."""
    samples, channels, size = x.shape
    count = samples * size
    per_channel = blocks_of(x)[3]
    blocks = np.empty((channels, per_channel, 4))
    var = np.empty(channels)
    table = np.empty((4, channels), x.dtype)
    wide = np.empty((3, channels))
    whole = enough_channels(channels, threads)
    units = channels if whole else channels * per_channel
    for thread in prange(threads):
        for unit in range(share(units, thread, threads), share(units, thread + 1, threads)):
            if whole:
                for block in range(per_channel):
                    measure_block(x, unit, block, blocks[unit, block])
                merge_blocks(blocks[unit], unit, mean, m2)
                var[unit] = m2[unit] / count
                fill_forward(table, wide, mean, var, weight, bias, eps, unit, unit + 1)
                for n in range(samples):
                    at = (n * channels + unit) * size
                    normalize_piece(x, residual, y, at, at + size, table, wide, unit, add, relu)
            else:
                channel, block = unit // per_channel, unit % per_channel
                measure_block(x, channel, block, blocks[channel, block])
    if whole:
        return
    for channel in range(channels):
        merge_blocks(blocks[channel], channel, mean, m2)
        var[channel] = m2[channel] / count
    fill_forward(table, wide, mean, var, weight, bias, eps, 0, channels)
    for thread in prange(threads):
        normalize_pieces(x, residual, y, table, wide, add, relu, thread, threads)


@step
def sum_block(dy, x, y, channel, block, center, relu, into):
    """Put the sums of g and of g * (x - mean) over a block into two numbers."""
    start, runs, stride, length = block_at(x, channel, block)
    rest = length % LANES
    sums = zeros()
    products = zeros()
    for first in range(start, start + runs * stride, stride):
        stop = first + length
        for i in range(first, stop - rest, LANES):
            g = load(dy, i)
            if relu:
                g = where_positive(load(y, i), g)
            g = cast(g, sums)
            sums = sums + g
            products = muladd(g, cast(load(x, i), sums) - center, products)
        if rest:
            g = load_last(dy, stop, rest)
            if relu:
                g = where_positive(load_last(y, stop, rest), g)
            g = cast(g, sums)
            sums = sums + g
            d = last_lanes(cast(load_last(x, stop, rest), sums) - center, rest)
            products = muladd(g, d, products)
    into[0] = total(sums)
    into[1] = total(products)


@step
def add_blocks(blocks, channel, invstd, sum_dy, sum_dy_xhat):
    """Add up the blocks of a channel in order."""
    first, first_low, second, second_low = 0.0, 0.0, 0.0, 0.0
    for block in range(len(blocks)):
        first, first_low = accumulate(first, first_low, blocks[block, 0])
        second, second_low = accumulate(second, second_low, blocks[block, 1])
    sum_dy[channel] = settle(first, first_low)
    sum_dy_xhat[channel] = settle(second, second_low) * invstd[channel]


def backward_sums(
    dy: Read,
    x: Read,
    y: Read,
    mean: ReadVector,
    invstd: ReadVector,
    sum_dy: WriteVector,
    sum_dy_xhat: WriteVector,
    relu: bool,
    threads: int,
) -> None:
    """Sum g and g * xhat over every channel."""
    channels = x.shape[1]
    per_channel = blocks_of(x)[3]
    units = channels * per_channel
    blocks = np.empty((channels, per_channel, 2))
    for thread in prange(threads):
        for unit in range(share(units, thread, threads), share(units, thread + 1, threads)):
            channel, block = unit // per_channel, unit % per_channel
            into = blocks[channel, block]
            sum_block(dy, x, y, channel, block, mean[channel], relu, into)
    for channel in range(channels):
        add_blocks(blocks[channel], channel, invstd, sum_dy, sum_dy_xhat)


@step
def gradient_run(dy, x, y, dx, dresidual, start, stop, head, slope, offset, factor, relu, both):
    """Transform the gradients of one channel from ``start`` to ``stop``."""
    count = stop - start
    if count < LANES:
        g = load_last(dy, stop, count)
        if relu:
            g = where_positive(load_last(y, stop, count), g)
        value = gradient(g, load_last(x, stop, count), head, slope, offset, factor)
        store_last(dx, stop, value, count)
        if both:
            store_last(dresidual, stop, g, count)
        return
    # As in `normalize_run`: dx may be dy.
    last = stop - LANES
    final_g = load(dy, last)
    if relu:
        final_g = where_positive(load(y, last), final_g)
    final = gradient(final_g, load(x, last), head, slope, offset, factor)
    for i in range(start, last, LANES):
        g = load(dy, i)
        if relu:
            g = where_positive(load(y, i), g)
        store(dx, i, gradient(g, load(x, i), head, slope, offset, factor))
        if both:
            store(dresidual, i, g)
    store(dx, last, final)
    if both:
        store(dresidual, last, final_g)


@step
def gradient_piece(dy, x, y, dx, dresidual, start, stop, table, wide, c, relu, both):
    """Transform the gradients of channel ``c`` from ``start`` to ``stop`` by the table."""
    if table[4, c] != 0:
        head, slope, offset, factor = table[0, c], table[1, c], table[2, c], table[3, c]
        gradient_run(
            dy, x, y, dx, dresidual, start, stop, head, slope, offset, factor, relu, both
        )
    else:
        center, slope64, offset64, factor64 = wide[0, c], wide[1, c], wide[2, c], wide[3, c]
        gradient_run(
            dy, x, y, dx, dresidual, start, stop, center, slope64, offset64, factor64, relu, both
        )


@step
def gradient_pieces(dy, x, y, dx, dresidual, table, wide, relu, both, thread, threads):
    """Transform a thread's share of the gradients, in the order of memory."""
    _, channels, size = x.shape
    _, length, across, _ = blocks_of(x)
    units = x.shape[0] * channels * across
    for unit in range(share(units, thread, threads), share(units, thread + 1, threads)):
        run, piece = unit // across, unit % across
        at = run * size + piece * length
        stop = run * size + min((piece + 1) * length, size)
        gradient_piece(
            dy, x, y, dx, dresidual, at, stop, table, wide, run % channels, relu, both
        )


def backward_input(
    dy: Read,
    x: Read,
    y: Read,
    mean: ReadVector,
    invstd: ReadVector,
    weight: ReadVector,
    sum_dy: ReadVector,
    sum_dy_xhat: ReadVector,
    count: int,
    dx: Write,
    dresidual: Write,
    relu: bool,
    both: bool,
    threads: int,
) -> None:
    """Compute dx, and g if ``both``, from given sums."""
    channels = x.shape[1]
    table = np.empty((5, channels), x.dtype)
    wide = np.empty((4, channels))
    fill_backward(table, wide, mean, invstd, weight, sum_dy, sum_dy_xhat, count, 0, channels)
    for thread in prange(threads):
        gradient_pieces(dy, x, y, dx, dresidual, table, wide, relu, both, thread, threads)


def backward(
    dy: Read,
    x: Read,
    y: Read,
    mean: ReadVector,
    invstd: ReadVector,
    weight: ReadVector,
    dx: Write,
    dresidual: Write,
    sum_dy: WriteVector,
    sum_dy_xhat: WriteVector,
    relu: bool,
    both: bool,
    threads: int,
) -> None:
    """Compute the sums of every channel, and dx from them."""
    samples, channels, size = x.shape
    count = samples * size
    per_channel = blocks_of(x)[3]
    blocks = np.empty((channels, per_channel, 2))
    table = np.empty((5, channels), x.dtype)
    wide = np.empty((4, channels))
    whole = enough_channels(channels, threads)
    units = channels if whole else channels * per_channel
    for thread in prange(threads):
        for unit in range(share(units, thread, threads), share(units, thread + 1, threads)):
            if whole:
                for block in range(per_channel):
                    into = blocks[unit, block]
                    sum_block(dy, x, y, unit, block, mean[unit], relu, into)
                add_blocks(blocks[unit], unit, invstd, sum_dy, sum_dy_xhat)
                fill_backward(
                    table, wide, mean, invstd, weight, sum_dy, sum_dy_xhat, count, unit, unit + 1
                )
                for n in range(samples):
                    at = (n * channels + unit) * size
                    stop = at + size
                    gradient_piece(
                        dy, x, y, dx, dresidual, at, stop, table, wide, unit, relu, both
                    )
            else:
                channel, block = unit // per_channel, unit % per_channel
                into = blocks[channel, block]
                sum_block(dy, x, y, channel, block, mean[channel], relu, into)
    if whole:
        return
    for channel in range(channels):
        add_blocks(blocks[channel], channel, invstd, sum_dy, sum_dy_xhat)
    fill_backward(table, wide, mean, invstd, weight, sum_dy, sum_dy_xhat, count, 0, channels)
    for thread in prange(threads):
        gradient_pieces(dy, x, y, dx, dresidual, table, wide, relu, both, thread, threads)
