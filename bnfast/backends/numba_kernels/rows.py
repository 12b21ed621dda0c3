"""Kernels for channels-first arrays (N, C, S): a channel is N runs of S adjacent elements.

Blocks of up to 768 elements of one channel: a piece of one run where runs are long, several whole
runs where they are short. Block b of a channel is piece ``b % across`` of the group of runs
``b // across``::

    S = 2000                            S = 200
    n = 0   [ b0 ][ b1 ][ b2 ]          n = 0..2   [ b0 ]
    n = 1   [ b3 ][ b4 ][ b5 ]          n = 3..5   [ b1 ]

A block is read twice, the second time from the L1 cache. The fused kernels give each thread whole
channels where there are enough of them, so that a channel is transformed while it is still in the
L2 cache (a group of channels where runs are short); else the threads share the blocks of every
channel, and meet in between.
"""

# mypy: disable-error-code="no-untyped-def"

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
    put_all,
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
    data,
    last_lanes,
    load,
    load_last,
    muladd,
    prefetch,
    rectify,
    store,
    store_last,
    total,
    where_positive,
    zeros,
)

BLOCK = 48
"""Vectors of sixteen elements in a block, at most: 48 additions to a lane and 4 across them, each
of which errs by up to half a unit; `spec.SUM_UNITS` is 32."""


AHEAD = 2048
"""Elements by which memory is asked for ahead, into the L2 cache."""

FORESEEN = 16384
"""Length of a run from which on the hardware's own foresight is enough."""

ADJACENT = 2048
"""Elements, at least, that the fused kernels write one after the other: with runs of 49 elements,
they took half as long again when they went channel by channel."""

CACHED = 131072
"""Elements of a group of channels, at most: 512 KiB of float32."""


@inline
def blocks_of(shape):
    """Return the runs and the length of a block, its pieces per run, and blocks per channel."""
    samples, _, size = shape
    vectors = -(-size // LANES)
    across = -(-vectors // BLOCK)
    length = min(-(-vectors // across) * LANES, size)
    runs = max(1, BLOCK // vectors)
    return runs, length, across, -(-samples // runs) * across


@inline
def block_at(shape, channel, block):
    """Return where a block starts, its runs, the step between them, and their length."""
    samples, channels, size = shape
    runs, length, across, _ = blocks_of(shape)
    group, piece = block // across, block % across
    start = (group * runs * channels + channel) * size + piece * length
    return (
        start,
        min(runs, samples - group * runs),
        channels * size,
        min(length, size - piece * length),
    )


@inline
def group_of(shape):
    """Return how many channels the fused kernels handle together."""
    samples, _, size = shape
    return max(min(ADJACENT // size, CACHED // (samples * size)), 1)


@inline
def next_needed(shape, at):
    """Return how far from an element of a run that one is which should be asked for with it.

    That is the same element `AHEAD` elements on in the channel; after its last run comes the first
    run of the next channel. The hardware foresees the way within a run, so long runs need no help.
    """
    samples, channels, size = shape
    if size > FORESEEN:
        return 0
    distance = min(max(AHEAD // size, 1), samples) * channels * size
    beyond = at + distance >= samples * channels * size
    return distance + size - samples * channels * size if beyond else distance


@step
def measure_block(x, shape, channel, block):
    """Return count, mean, the error of the mean, and m2 of a block."""
    start, runs, stride, length = block_at(shape, channel, block)
    rest = length % LANES
    count = float(runs * length)
    values = zeros()
    for first in range(start, start + runs * stride, stride):
        stop = first + length
        ahead = next_needed(shape, first)
        for i in range(first, stop - rest, LANES):
            prefetch(x, i + ahead)
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
    low = deviation / count
    return count, mean, low, rectify(total(squares) - deviation * low)


@step
def measure_blocks(x, blocks, thread, threads):
    """Measure a thread's share of the blocks of all channels."""
    channels, per_channel, _ = blocks.shape
    units = channels * per_channel
    for unit in range(share(units, thread, threads), share(units, thread + 1, threads)):
        channel, block = unit // per_channel, unit % per_channel
        put_all(blocks, unit * 4, measure_block(data(x), x.shape, channel, block))


@inline
def merge_blocks(blocks, channel):
    """Return mean and m2 of a channel: its blocks merged in order."""
    count = blocks[channel, 0, 0]
    mean, low, m2, m2_low = blocks[channel, 0, 1], blocks[channel, 0, 2], blocks[channel, 0, 3], 0.0
    plain = count * mean
    for block in range(1, blocks.shape[1]):
        other_count, other_mean = blocks[channel, block, 0], blocks[channel, block, 1]
        other_low, other_m2 = blocks[channel, block, 2], blocks[channel, block, 3]
        mean, low, m2, m2_low = merge(
            count, mean, low, m2, m2_low, other_count, other_mean, other_low, other_m2
        )
        count += other_count
        plain += other_count * other_mean
    # Deviations from an infinite mean are NaN; the mean itself is not.
    return mean + low if np.isfinite(mean + low) else plain / count, settle(m2, m2_low)


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


@inline
def normalize_piece(x, residual, y, start, stop, table, wide, c, add, relu):
    """Transform the elements of channel ``c`` from ``start`` to ``stop`` by the tables."""
    if table[3, c] != 0:
        head, scale, shift = table[0, c], table[1, c], table[2, c]
        normalize_run(x, residual, y, start, stop, head, scale, shift, add, relu)
    else:
        center, scale64, bias64 = wide[0, c], wide[1, c], wide[2, c]
        normalize_run(x, residual, y, start, stop, center, scale64, bias64, add, relu)


@step
def normalize_pieces(x, residual, y, table, wide, add, relu, thread, threads):
    """Transform a thread's share of the array, in the order of memory."""
    samples, channels, size = x.shape
    _, length, across, _ = blocks_of(x.shape)
    units = samples * channels * across
    at = data(x), data(residual), data(y)
    for unit in range(share(units, thread, threads), share(units, thread + 1, threads)):
        run, piece = unit // across, unit % across
        start = run * size + piece * length
        stop = run * size + min((piece + 1) * length, size)
        normalize_piece(*at, start, stop, table, wide, run % channels, add, relu)


@step
def train_channels(
    x, weight, bias, eps, residual, y, mean, m2, blocks, table, wide, add, relu, thread, threads
):
    """Measure and transform a thread's share of the channels, one group after the other."""
    samples, channels, size = x.shape
    at = data(x), data(residual), data(y)
    begin, end = share(channels, thread, threads), share(channels, thread + 1, threads)
    for first in range(begin, end, group_of(x.shape)):
        stop = min(first + group_of(x.shape), end)
        for c in range(first, stop):
            for block in range(blocks.shape[1]):
                base = (c * blocks.shape[1] + block) * 4
                put_all(blocks, base, measure_block(at[0], x.shape, c, block))
            mean[c], m2[c] = merge_blocks(blocks, c)
            var = m2[c] / (samples * size)
            fill_forward(table, wide, c, mean[c], var, weight, bias, eps)
        for n in range(samples):
            for c in range(first, stop):
                start = (n * channels + c) * size
                normalize_piece(*at, start, start + size, table, wide, c, add, relu)


@inline
def enough_channels(channels, threads):
    """Return whether threads that take whole channels finish at about the same time."""
    return channels % threads == 0 or channels >= 8 * threads


def forward(
    x: Read,
    weight: ReadVector,
    bias: ReadVector,
    given_mean: ReadVector,
    given_var: ReadVector,
    eps: float,
    residual: Read,
    y: Write,
    mean: WriteVector,
    m2: WriteVector,
    measure: bool,
    transform: bool,
    add: bool,
    relu: bool,
    threads: int,
) -> None:
    """If ``measure``, compute mean and m2; if ``transform``, y, by them or by what is given."""
    samples, channels, size = x.shape
    table = np.empty((4, channels), x.dtype)
    wide = np.empty((3, channels))
    blocks = np.empty((channels, blocks_of(x.shape)[3], 4))
    if measure and transform and enough_channels(channels, threads):
        for thread in prange(threads):
            train_channels(
                x, weight, bias, eps, residual, y, mean, m2, blocks, table, wide, add, relu,
                thread, threads,
            )  # fmt: skip
        return
    if measure:
        for thread in prange(threads):
            measure_blocks(x, blocks, thread, threads)
        for c in range(channels):
            mean[c], m2[c] = merge_blocks(blocks, c)
    if transform:
        for c in range(channels):
            center = mean[c] if measure else given_mean[c]
            var = m2[c] / (samples * size) if measure else given_var[c]
            fill_forward(table, wide, c, center, var, weight, bias, eps)
        for thread in prange(threads):
            normalize_pieces(x, residual, y, table, wide, add, relu, thread, threads)


@step
def sum_block(dy, x, y, shape, channel, block, center, relu):
    """Return the sums of g and of g * (x - mean) over a block."""
    start, runs, stride, length = block_at(shape, channel, block)
    rest = length % LANES
    sums = zeros()
    products = zeros()
    for first in range(start, start + runs * stride, stride):
        stop = first + length
        ahead = next_needed(shape, first)
        for i in range(first, stop - rest, LANES):
            prefetch(dy, i + ahead)
            prefetch(x, i + ahead)
            g = load(dy, i)
            if relu:
                g = where_positive(load(y, i), g)
            wide = cast(g, sums)
            sums = sums + wide
            products = muladd(wide, cast(load(x, i), sums) - center, products)
        if rest:
            g = load_last(dy, stop, rest)
            if relu:
                g = where_positive(load_last(y, stop, rest), g)
            wide = cast(g, sums)
            sums = sums + wide
            d = last_lanes(cast(load_last(x, stop, rest), sums) - center, rest)
            products = muladd(wide, d, products)
    return total(sums), total(products)


@step
def sum_blocks(dy, x, y, mean, relu, blocks, thread, threads):
    """Sum a thread's share of the blocks of all channels."""
    channels, per_channel, _ = blocks.shape
    units = channels * per_channel
    at = data(dy), data(x), data(y)
    for unit in range(share(units, thread, threads), share(units, thread + 1, threads)):
        c, block = unit // per_channel, unit % per_channel
        put_all(blocks, unit * 2, sum_block(*at, x.shape, c, block, mean[c], relu))


@inline
def add_blocks(blocks, channel):
    """Return the two sums of a channel: its blocks added in order."""
    first, first_low, second, second_low = 0.0, 0.0, 0.0, 0.0
    for block in range(blocks.shape[1]):
        first, first_low = accumulate(first, first_low, blocks[channel, block, 0])
        second, second_low = accumulate(second, second_low, blocks[channel, block, 1])
    return settle(first, first_low), settle(second, second_low)


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


@inline
def gradient_piece(dy, x, y, dx, dresidual, start, stop, table, wide, c, relu, both):
    """Transform the gradients of channel ``c`` from ``start`` to ``stop`` by the tables."""
    if table[4, c] != 0:
        head, slope, offset, factor = table[0, c], table[1, c], table[2, c], table[3, c]
        gradient_run(dy, x, y, dx, dresidual, start, stop, head, slope, offset, factor, relu, both)
    else:
        center, slope64, offset64, factor64 = wide[0, c], wide[1, c], wide[2, c], wide[3, c]
        gradient_run(
            dy, x, y, dx, dresidual, start, stop, center, slope64, offset64, factor64, relu, both
        )


@step
def gradient_pieces(dy, x, y, dx, dresidual, table, wide, relu, both, thread, threads):
    """Transform a thread's share of the gradients, in the order of memory."""
    samples, channels, size = x.shape
    _, length, across, _ = blocks_of(x.shape)
    units = samples * channels * across
    at = data(dy), data(x), data(y), data(dx), data(dresidual)
    for unit in range(share(units, thread, threads), share(units, thread + 1, threads)):
        run, piece = unit // across, unit % across
        start = run * size + piece * length
        stop = run * size + min((piece + 1) * length, size)
        gradient_piece(*at, start, stop, table, wide, run % channels, relu, both)


@step
def backward_channels(
    dy, x, y, mean, invstd, weight, dx, dresidual, sum_dy, sum_dy_xhat, blocks, table, wide, relu,
    both, thread, threads,
):  # fmt: skip
    """Sum and transform a thread's share of the channels, one group after the other."""
    samples, channels, size = x.shape
    count = samples * size
    at = data(dy), data(x), data(y), data(dx), data(dresidual)
    begin, end = share(channels, thread, threads), share(channels, thread + 1, threads)
    for first in range(begin, end, group_of(x.shape)):
        stop = min(first + group_of(x.shape), end)
        for c in range(first, stop):
            for block in range(blocks.shape[1]):
                sums = sum_block(at[0], at[1], at[2], x.shape, c, block, mean[c], relu)
                put_all(blocks, (c * blocks.shape[1] + block) * 2, sums)
            one, other = add_blocks(blocks, c)
            sum_dy[c], sum_dy_xhat[c] = one, other * invstd[c]
            means = one / count, sum_dy_xhat[c] / count
            fill_backward(table, wide, c, mean, invstd, weight, means)
        for n in range(samples):
            for c in range(first, stop):
                start = (n * channels + c) * size
                gradient_piece(*at, start, start + size, table, wide, c, relu, both)


def backward(
    x: Read,
    dy: Read,
    y: Read,
    mean: ReadVector,
    invstd: ReadVector,
    weight: ReadVector,
    given_dy: ReadVector,
    given_dy_xhat: ReadVector,
    count: int,
    dx: Write,
    dresidual: Write,
    sum_dy: WriteVector,
    sum_dy_xhat: WriteVector,
    measure: bool,
    transform: bool,
    relu: bool,
    both: bool,
    threads: int,
) -> None:
    """If ``measure``, compute the sums; if ``transform``, dx, by them or by what is given.

    dresidual is written if ``both``.
    """
    channels = x.shape[1]
    table = np.empty((5, channels), x.dtype)
    wide = np.empty((4, channels))
    blocks = np.empty((channels, blocks_of(x.shape)[3], 2))
    if measure and transform and enough_channels(channels, threads):
        for thread in prange(threads):
            backward_channels(
                dy, x, y, mean, invstd, weight, dx, dresidual, sum_dy, sum_dy_xhat, blocks, table,
                wide, relu, both, thread, threads,
            )  # fmt: skip
        return
    if measure:
        for thread in prange(threads):
            sum_blocks(dy, x, y, mean, relu, blocks, thread, threads)
        for c in range(channels):
            first, second = add_blocks(blocks, c)
            sum_dy[c], sum_dy_xhat[c] = first, second * invstd[c]
    if transform:
        for c in range(channels):
            first = sum_dy[c] if measure else given_dy[c]
            second = sum_dy_xhat[c] if measure else given_dy_xhat[c]
            fill_backward(table, wide, c, mean, invstd, weight, (first / count, second / count))
        for thread in prange(threads):
            gradient_pieces(dy, x, y, dx, dresidual, table, wide, relu, both, thread, threads)
