"""Sums over channels-first arrays (N, C, S): a channel is N runs of S adjacent elements.

Sums are taken over tiles of up to `TILE` elements of one channel: a piece of one run where runs are
long, several whole runs where they are short. Tile t of a channel is piece ``t % across`` of the
group of runs ``t // across``::

    S = 20000                           S = 2000
    n = 0   [ t0 ][ t1 ][ t2 ]          n = 0..3   [ t0 ]
    n = 1   [ t3 ][ t4 ][ t5 ]          n = 4..7   [ t1 ]

Where runs are short, a tile of several channels is worked on side by side, in the order of memory.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np

from bnfast.backends.numba_kernels.addresses import (
    get,
    itemsize_of,
    load,
    load_some,
    load_terms,
    load_wide,
    prefetch,
    present,
    put,
    store,
)
from bnfast.backends.numba_kernels.arithmetic import (
    accumulate,
    corrected,
    merge,
    share,
)
from bnfast.backends.numba_kernels.compiling import inline, step
from bnfast.backends.numba_kernels.lanes import (
    LANES,
    PAIRED,
    cast,
    first_lanes,
    muladd,
    opaque,
    settle,
    total,
    where_positive,
    zeros,
)

CHAIN = 1024 if PAIRED else 512
"""Elements that go through the lanes before these are emptied: 32 additions to a lane, 16 to what
it is emptied into, 5 across lanes, each of which errs by up to half a unit; `spec.SUM_UNITS` is 32.
Runs of 16 elements empty them 64 times, after 8 additions each.
"""

TILE = 8192
"""Elements of a tile, at most; of runs shorter than the lanes, as if each filled these. Of 16 bits
it is `CHAIN` times 16, where that is more and runs are not short: beside what is read, beginning
and ending a tile counts for more (moments in the cache take 0.9 of the time; of float32 1.1, of
float64 1.2)."""

RUNS = 4
"""Runs that go through the lanes, at most, twice as many below 64 elements, unless they are shorter
than the lanes: more of them, and memory is read less in order."""

AHEAD = 2048
"""Elements by which memory is asked for ahead."""

UNASKED = 4
"""Times the size of a core's own cache up to which nothing is asked for: it would take longer than
it saves."""

ADJACENT = 2048
"""Elements, at least, that are read or written one after the other: where runs are short, those of
several channels. With runs of 49 elements that took a third off the time of training."""


@inline
def most_of(itemsize, size):
    """Return the elements of a tile, at most."""
    return max(TILE, 16 * CHAIN) if itemsize == 2 and size >= CHAIN // RUNS else TILE


@inline
def tiles_of(samples, size, most):
    """Return the runs and the length of a tile, its pieces per run, and tiles per channel."""
    pieces = -(-size // most)
    length = min(-(-size // (pieces * LANES)) * LANES, size)
    across = -(-size // length)
    groups = -(-samples // max(1, most // max(size, LANES)))
    runs = -(-samples // groups)
    return runs, length, across, -(-samples // runs) * across


@inline
def ahead_of(samples, channels, size, itemsize, core):
    """Return how far ahead memory is asked for: `AHEAD` elements as they are read.

    Where the runs of a channel are shorter: so many whole runs, and at least those that are next.
    """
    if samples * channels * size * itemsize <= UNASKED * core:
        return 0
    if size >= AHEAD:
        return AHEAD
    runs = max(-(-AHEAD // (side_by_side(channels, size) * size)), chain_of(size)[0])
    return min(runs, samples) * channels * size


@inline
def next_needed(shape, ahead, at, offset):
    """Return how far from an element, ``offset`` into its run, to ask for memory.

    That is ``ahead`` elements on in the channel, in one of the next runs; after its last run comes
    the first run of the channel that is next in its place.
    """
    samples, channels, size, _, _ = shape
    if size >= AHEAD and offset + ahead >= size:
        ahead += channels * size - size
    beyond = at + ahead >= samples * channels * size
    next_ = side_by_side(channels, size) * size - samples * channels * size
    return ahead + next_ if beyond else ahead


@inline
def chain_of(length):
    """Return how many runs, and how many elements of each, go through the lanes at a time."""
    pieces = -(-length // CHAIN)
    # A run shorter than the lanes is one addition to the odd ones.
    most = 2 * RUNS if length < 64 else RUNS
    runs = max(1, min(CHAIN // length, most)) if length >= LANES else 512 // LANES
    return runs, -(-length // (pieces * LANES)) * LANES


@inline
def steps_of(first, length):
    """Return where in a run pairs of steps end, and where whole steps do."""
    pairs = length // (2 * LANES) if PAIRED else 0
    return first + pairs * 2 * LANES, first + length // LANES * LANES


@inline
def total_of(x, start, runs, stride, length):
    """Return the sum over a tile."""
    sums = zeros()
    group, piece = chain_of(length)
    for run in range(0, runs, group):
        for first in range(0, length, piece):
            some, odd = zeros(), zeros()
            count = min(piece, length - first)
            for r in range(run, min(run + group, runs)):
                begin = start + r * stride + first
                paired, whole = steps_of(begin, count)
                for i in range(begin, paired, 2 * LANES):
                    some, odd = some + load_wide(x, i), odd + load_wide(x, i + LANES)
                for i in range(paired, whole, LANES):
                    some = some + load_wide(x, i)
                if whole < begin + count:
                    odd = odd + cast(load_some(x, whole, begin + count - whole), odd)
            sums = sums + (some + odd)
    return total(sums)


@inline
def first_mean(x, start, runs, stride, length):
    """Return about what to take the moments of a tile.

    For float64 its mean, since deviations from a guess would round. Else the mean of its first
    elements, rounded to float32: deviations from a float32 are exact in float64, and so are their
    squares where the mean is not near 0. What an outlier among the first costs (10 bits) leaves m2
    within `spec.M2_RELATIVE_FLOAT32`.
    """
    if itemsize_of(x) == 8:
        return total_of(x, start, runs, stride, length) / (runs * length)
    count = min(length, LANES)
    some = min(runs, -(-LANES // count))
    sums = zeros()
    for r in range(some):
        sums = sums + cast(load_some(x, start + r * stride, count), sums)
    return float(np.float32(total(sums) / (some * count)))


@inline
def tile_at(shape, c, tile):
    """Return where a tile starts, its runs, and their length."""
    samples, channels, size, _, most = shape
    runs, length, across, _ = tiles_of(samples, size, most)
    group, piece = tile // across, tile % across
    start = (group * runs * channels + c) * size + piece * length
    return start, min(runs, samples - group * runs), min(length, size - piece * length)


@inline
def ask_two(x, i):
    """Ask for two steps of sixteen elements; of 16 bits they are one cache line."""
    prefetch(x, i)
    if itemsize_of(x) > 2:
        prefetch(x, i + LANES)


@inline
def plus(x, a, b, one):
    """Return a + b; where ``x`` holds 16 bits, from the units that multiply by ``one`` and add.

    Converting keeps those busy that only add: moments of float16 take 0.85 of the time.
    """
    return muladd(a, one, b) if PAIRED and itemsize_of(x) == 2 else a + b


@inline
def measure_piece(x, shape, start, offset, runs, length, far, center):
    """Return the sums of deviations and of their squares over pieces of runs."""
    stride = shape[1] * shape[2]
    deviations, odd_deviations = zeros(), zeros()
    squares, odd_squares = zeros(), zeros()
    one, minus = opaque(1.0), 0.0 - center
    for first in range(start, start + runs * stride, stride):
        stop = first + length
        paired, whole = steps_of(first, length)
        ahead = next_needed(shape, far, first, offset)
        for i in range(first, paired, 2 * LANES):
            if ahead != 0:
                ask_two(x, i + ahead)
            d = plus(x, load_terms(x, i), minus, one)
            odd = plus(x, load_terms(x, i + LANES), minus, one)
            deviations = plus(x, d, deviations, one)
            odd_deviations = plus(x, odd, odd_deviations, one)
            squares, odd_squares = muladd(d, d, squares), muladd(odd, odd, odd_squares)
        for i in range(paired, whole, LANES):
            if ahead != 0:
                prefetch(x, i + ahead)
            d = load_terms(x, i) - center
            deviations = deviations + d
            squares = muladd(d, d, squares)
        if whole < stop:
            d = cast(load_some(x, whole, stop - whole), squares) - center
            d = first_lanes(stop - whole, d, 0.0)
            odd_deviations = odd_deviations + d
            odd_squares = muladd(d, d, odd_squares)
    return deviations + odd_deviations, squares + odd_squares


@step
def measure_tiles(x, shape, tile, begin, end, moments, scratch):
    """Measure one tile of each of some adjacent channels: a first mean, its error, m2, count."""
    _, channels, size, far, _ = shape
    start, runs, length = tile_at(shape, begin, tile)
    stride, into = channels * size, start % size
    for c in range(begin, end):
        at = start + (c - begin) * size
        moments[c, tile, 0] = first_mean(x, at, runs, stride, length)
    scratch[:] = 0.0
    group, piece = chain_of(length)
    for run in range(0, runs, group):
        some = min(group, runs - run)
        for c in range(begin, end):
            deviations, squares = zeros(), zeros()
            at = start + run * stride + (c - begin) * size
            for i in range(0, length, piece):
                count = min(piece, length - i)
                center = moments[c, tile, 0]
                sums = measure_piece(x, shape, at + i, into + i, some, count, far, center)
                deviations, squares = deviations + sums[0], squares + sums[1]
            add_to(scratch, c - begin, deviations, squares)
    for c in range(begin, end):
        deviation, square = totals_of(scratch, c - begin)
        count = float(runs * length)
        _, low, m2 = corrected(moments[c, tile, 0], deviation, square, count)
        moments[c, tile, 1], moments[c, tile, 2], moments[c, tile, 3] = low, m2, count


@inline
def add_to(scratch, index, one, other):
    """Add to the two rows of lanes of a channel."""
    at = index * 2 * LANES
    store(scratch, at, load(scratch, at) + one)
    store(scratch, at + LANES, load(scratch, at + LANES) + other)


@inline
def totals_of(scratch, index):
    """Return the sums over the two rows of lanes of a channel."""
    at = index * 2 * LANES
    return total(load(scratch, at)), total(load(scratch, at + LANES))


@inline
def scratch_of(shape):
    """Return room for the sums of as many channels as are measured side by side."""
    return np.empty((side_by_side(shape[1], shape[2]), 2 * LANES))


@inline
def side_by_side(channels, size):
    """Return how many channels of a tile are measured at a time: where runs are short, many.

    Channel by channel, runs of 49 elements would be read from places that are far apart.
    """
    return max(1, min(ADJACENT // size, channels))


@step
def measure_share(x, shape, moments, thread, threads):
    """Measure a thread's share of the tiles of all channels."""
    channels, tiles, _ = moments.shape
    scratch = scratch_of(shape)
    units = channels * tiles
    unit, last = share(units, thread, threads), share(units, thread + 1, threads)
    while unit < last:
        tile, c = unit // channels, unit % channels
        stop = min(c + side_by_side(channels, shape[2]), channels, c + last - unit)
        measure_tiles(x, shape, tile, c, stop, moments, scratch)
        unit += stop - c


@step
def merge_tiles(moments, c, mean, m2):
    """Find mean and m2 of a channel: its tiles merged in order."""
    center, low, spread, spread_low = moments[c, 0, 0], moments[c, 0, 1], moments[c, 0, 2], 0.0
    count = moments[c, 0, 3]
    for tile in range(1, moments.shape[1]):
        other_count = moments[c, tile, 3]
        center, low, spread, spread_low = merge(
            count, center, low, spread, spread_low,
            other_count, moments[c, tile, 0], moments[c, tile, 1], moments[c, tile, 2],
        )  # fmt: skip
        count += other_count
    put(mean, c, center + low)
    put(m2, c, settle(spread, spread_low))


@inline
def sum_piece(dy, x, y, shape, start, offset, runs, length, far, center):
    """Return the sums of g and of g * (x - mean) over pieces of runs."""
    stride = shape[1] * shape[2]
    relu = present(y)
    plain, odd_plain = zeros(), zeros()
    products, odd_products = zeros(), zeros()
    for first in range(start, start + runs * stride, stride):
        stop = first + length
        paired, whole = steps_of(first, length)
        ahead = next_needed(shape, far, first, offset)
        for i in range(first, paired, 2 * LANES):
            if ahead != 0:
                ask_two(dy, i + ahead)
                ask_two(x, i + ahead)
            g, odd = load_wide(dy, i), load_wide(dy, i + LANES)
            if relu:
                g = where_positive(load(y, i), g)
                odd = where_positive(load(y, i + LANES), odd)
            plain, odd_plain = plain + g, odd_plain + odd
            products = muladd(g, load_wide(x, i) - center, products)
            odd_products = muladd(odd, load_wide(x, i + LANES) - center, odd_products)
        for i in range(paired, whole, LANES):
            if ahead != 0:
                prefetch(dy, i + ahead)
                prefetch(x, i + ahead)
            g = load_wide(dy, i)
            if relu:
                g = where_positive(load(y, i), g)
            plain = plain + g
            products = muladd(g, load_wide(x, i) - center, products)
        if whole < stop:
            count = stop - whole
            g = cast(load_some(dy, whole, count), plain)
            if relu:
                g = where_positive(load_some(y, whole, count), g)
            odd_plain = odd_plain + g
            d = cast(load_some(x, whole, count), plain) - center
            odd_products = muladd(g, first_lanes(count, d, 0.0), odd_products)
    return plain + odd_plain, products + odd_products


@step
def sum_tiles(dy, x, y, shape, tile, begin, end, mean, sums, scratch):
    """Sum g and g * (x - mean) over one tile of each of some adjacent channels."""
    _, channels, size, far, _ = shape
    start, runs, length = tile_at(shape, begin, tile)
    stride, into = channels * size, start % size
    scratch[:] = 0.0
    group, piece = chain_of(length)
    for run in range(0, runs, group):
        some = min(group, runs - run)
        for c in range(begin, end):
            plain, products = zeros(), zeros()
            at = start + run * stride + (c - begin) * size
            for i in range(0, length, piece):
                count = min(piece, length - i)
                center = get(mean, c)
                own = sum_piece(dy, x, y, shape, at + i, into + i, some, count, far, center)
                plain, products = plain + own[0], products + own[1]
            add_to(scratch, c - begin, plain, products)
    for c in range(begin, end):
        sums[c, tile, 0], sums[c, tile, 1] = totals_of(scratch, c - begin)


@step
def sum_share(dy, x, y, shape, mean, sums, thread, threads):
    """Take a thread's share of the sums over tiles of all channels."""
    channels, tiles, _ = sums.shape
    scratch = scratch_of(shape)
    units = channels * tiles
    unit, last = share(units, thread, threads), share(units, thread + 1, threads)
    while unit < last:
        tile, c = unit // channels, unit % channels
        stop = min(c + side_by_side(channels, shape[2]), channels, c + last - unit)
        sum_tiles(dy, x, y, shape, tile, c, stop, mean, sums, scratch)
        unit += stop - c


@step
def add_tiles(sums, c, invstd, sum_dy, sum_dy_xhat):
    """Find the two sums of a channel: its tiles added in order."""
    first, first_low, second, second_low = 0.0, 0.0, 0.0, 0.0
    for tile in range(sums.shape[1]):
        first, first_low = accumulate(first, first_low, sums[c, tile, 0])
        second, second_low = accumulate(second, second_low, sums[c, tile, 1])
    put(sum_dy, c, settle(first, first_low))
    put(sum_dy_xhat, c, settle(second, second_low) * get(invstd, c))
