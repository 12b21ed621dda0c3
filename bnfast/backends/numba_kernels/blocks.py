"""Sums over channels-last arrays (M, C): a channel is a column.

Rows are read sixteen columns at a time, in the order of memory. Few channels would leave lanes
empty, so rows are laid side by side until their elements fill them: C = 3 becomes rows of 48, in
which columns c, c + 3, c + 6, ... are the same channel. What is left over when the rows run out is
handled element by element::

    M = 37, C = 3       two wide rows [ 48 ][ 48 ] and a rest of 15 elements

Sums are taken over blocks of a few hundred rows by at most `TILE` columns. A part is a run of such
blocks, merged as they come; the parts, at most `PARTS`, are what threads share. The last step
merges the parts, and the columns of a channel.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np

from bnfast.backends.numba_kernels.addresses import (
    get,
    itemsize_of,
    load,
    load_some,
    load_wide,
    prefetch,
    present,
    put,
    store,
    store_some,
)
from bnfast.backends.numba_kernels.arithmetic import (
    accumulate,
    corrected,
    merge,
    share,
)
from bnfast.backends.numba_kernels.compiling import inline, step
from bnfast.backends.numba_kernels.lanes import LANES, cast, muladd, settle, where_positive, zeros

TILE = 512
"""Columns of a block, at most."""

BLOCK = 32768
"""Elements of a block, at most: 128 KiB of float32, 256 KiB of float64."""

ROWS = 240
"""Rows of a block, at most."""

PARTS = 64
"""Parts times tiles, at most: more threads than that would have nothing to do."""

STRIP = 4
"""Rows that are added up, in registers, before their sum is added to that of the block. A term then
takes part in at most 8 + 240 / 8 additions, each of which errs by up to half a unit;
`spec.SUM_UNITS` is 32."""

AHEAD_ROWS = 8

AHEAD = 4096
"""Rows, at least, and elements by which memory is asked for ahead. The hardware
does not foresee the way through a strip: without this the sums over a 100 MB array took three times
as long."""


@inline
def wide_rows(rows, channels):
    """Return the width and the number of wide rows."""
    width = channels
    while width < 2 * LANES * LANES and width % LANES:
        width += channels
    if width % LANES or channels >= 2 * LANES:
        width = channels
    return width, rows * channels // width


@inline
def parts_of(rows, width):
    """Return the rows of a block, the number of parts, and of tiles."""
    tiles = -(-width // TILE)
    most = min(ROWS, BLOCK // min(width, TILE))
    # Eight blocks, or a multiple, where there are many: threads then have equally many.
    blocks = -(-rows // most)
    if blocks > 2:
        blocks = -(-blocks // 8) * 8
    block = max(1, -(-rows // max(1, blocks)))
    blocks = -(-rows // block)
    return block, max(1, min(blocks, PARTS // tiles, max(8, blocks // 4))), tiles


@inline
def ahead_of(width, large):
    """Return how many elements ahead memory is asked for: a number of whole rows, or 0."""
    return max(AHEAD_ROWS, AHEAD // width) * width if large else 0


@inline
def wide_at(x, i, count):
    """Return ``count`` elements in float64, zeros after them."""
    return load_wide(x, i) if count == LANES else cast(load_some(x, i, count), 0.0)


@inline
def rows_of_part(rows, block, part, parts):
    """Return the first row of a part, and the first after it."""
    blocks = -(-rows // block)
    return share(blocks, part, parts) * block, min(share(blocks, part + 1, parts) * block, rows)


@inline
def add_strip(x, i, width, rows, count):
    """Return the sums of ``count`` columns over rows, from element ``i`` on."""
    sums = zeros()
    for row in range(rows):
        sums = sums + wide_at(x, i + row * width, count)
    return sums


@inline
def measure_strip(x, i, width, rows, count, ahead, mean):
    """Return the sums of deviations and of their squares of columns over rows."""
    deviations = zeros()
    squares = zeros()
    for row in range(rows):
        at = i + row * width
        if ahead != 0:
            prefetch(x, at + ahead)
        d = wide_at(x, at, count) - mean
        deviations = deviations + d
        squares = muladd(d, d, squares)
    return deviations, squares


@step
def measure_block(x, first, stop, left, right, width, ahead, scratch):
    """Put first means of columns, sums of deviations and of their squares, in ``scratch``.

    The first mean of float64 takes a pass of its own; for float32 that of the first rows will do,
    where there are more than a few, rounded as in `tiles.first_mean`.
    """
    space = scratch.shape[1]
    scratch[:] = 0.0
    sample = stop if itemsize_of(x) == 8 or stop - first <= LANES else first + 4
    for strip in range(first, sample, STRIP):
        rows = min(STRIP, sample - strip)
        for at in range(left, right, LANES):
            sums = add_strip(x, strip * width + at, width, rows, min(LANES, right - at))
            store(scratch, at - left, load(scratch, at - left) + sums)
    for at in range(0, space, LANES):
        mean = load(scratch, at) / (sample - first)
        store(scratch, at, mean if itemsize_of(x) == 8 else cast(cast(mean, np.float32(0.0)), 0.0))
    for strip in range(first, stop, STRIP):
        rows = min(STRIP, stop - strip)
        for at in range(left, right, LANES):
            count = min(LANES, right - at)
            mean = load(scratch, at - left)
            # Constants let the optimiser unroll the strip.
            if rows == STRIP and count == LANES:
                sums = measure_strip(x, strip * width + at, width, STRIP, LANES, ahead, mean)
            else:
                sums = measure_strip(x, strip * width + at, width, rows, count, ahead, mean)
            into = space + at - left
            store(scratch, into, load(scratch, into) + sums[0])
            into += space
            store(scratch, into, load(scratch, into) + sums[1])


@inline
def merge_group(state, into, count, other_count, mean, low, m2):
    """Merge sixteen columns into rows mean, low, m2 and m2_low of ``state``.

    Flat index ``into`` is the first of their means. What is there is of ``count`` elements each.
    """
    space = state.shape[2]
    m2_low = zeros()
    if count != 0:
        own = load(state, into), load(state, into + space)
        own_m2 = load(state, into + 2 * space), load(state, into + 3 * space)
        mean, low, m2, m2_low = merge(
            float(count), own[0], own[1], own_m2[0], own_m2[1], float(other_count), mean, low, m2
        )
    store(state, into, mean)
    store(state, into + space, low)
    store(state, into + 2 * space, m2)
    store(state, into + 3 * space, m2_low)


@step
def measure_part(x, rows, width, ahead, part, tile, state):
    """Put mean, low, m2 and m2_low of the columns of a tile into ``state[part]``."""
    space = state.shape[2]
    block, parts, _ = parts_of(rows, width)
    left, right = tile * TILE, min((tile + 1) * TILE, width)
    begin, end = rows_of_part(rows, block, part, parts)
    padded = -(-(right - left) // LANES) * LANES
    scratch = np.empty((3, padded))
    for first in range(begin, end, block):
        stop = min(first + block, end)
        measure_block(x, first, stop, left, right, width, ahead, scratch)
        count = stop - first
        for at in range(0, padded, LANES):
            mean, low, m2 = corrected(
                load(scratch, at),
                load(scratch, padded + at),
                load(scratch, 2 * padded + at),
                float(count),
            )
            merge_group(state, part * 4 * space + left + at, first - begin, count, mean, low, m2)


@step
def measure_share(x, rows, width, ahead, state, thread, threads):
    """Measure a thread's share of the parts."""
    tiles = parts_of(rows, width)[2]
    units = state.shape[0] * tiles
    for unit in range(share(units, thread, threads), share(units, thread + 1, threads)):
        measure_part(x, rows, width, ahead, unit // tiles, unit % tiles, state)


@inline
def merge_channel(x, rows, width, channels, elements, state, channel):
    """Return mean and m2 of a channel, from its columns and the elements that are left over.

    First the mean, from differences to one of those that are merged, then the squares about it. To
    merge one column after the other would round as often as there are columns.
    """
    if elements == 0:
        return 0.0, 0.0
    columns, rest = width if rows else 0, rows * width + channel
    center = state[0, 0, channel] if rows else cast(get(x, rest), 0.0)
    count = float(elements // channels)
    moved = 0.0
    for c in range(channel, columns, channels):
        moved += rows * ((state[0, 0, c] - center) + state[0, 1, c])
    for i in range(rest, elements, channels):
        moved += cast(get(x, i), 0.0) - center
    center, low = accumulate(center, 0.0, moved / count)
    moved, spread, spread_low = 0.0, 0.0, 0.0
    for c in range(channel, columns, channels):
        d = (state[0, 0, c] - center) + (state[0, 1, c] - low)
        moved += rows * d
        own = settle(state[0, 2, c], state[0, 3, c])
        spread, spread_low = accumulate(spread, spread_low, own + rows * d * d)
    for i in range(rest, elements, channels):
        d = (cast(get(x, i), 0.0) - center) - low
        moved += d
        spread, spread_low = accumulate(spread, spread_low, d * d)
    return center + (low + moved / count), settle(spread, spread_low)


@step
def merge_columns(x, rows, width, channels, elements, state, begin, end, mean, m2):
    """Find mean and m2 of channels, from the parts, their columns, and the rest of the elements."""
    parts, _, space = state.shape
    block = parts_of(rows, width)[0]
    for at in range(begin, end if width == channels else width, LANES):
        count = rows_of_part(rows, block, 0, parts)[1]
        for part in range(1, parts):
            first, stop = rows_of_part(rows, block, part, parts)
            own = part * 4 * space + at
            own_m2 = load(state, own + 2 * space) + load(state, own + 3 * space)
            own_mean, own_low = load(state, own), load(state, own + space)
            merge_group(state, at, count, stop - first, own_mean, own_low, own_m2)
            count = stop
        if width == channels:
            some = min(LANES, end - at)
            store_some(mean, at, load(state, at) + load(state, at + space), some)
            spread = settle(load(state, at + 2 * space), load(state, at + 3 * space))
            store_some(m2, at, spread, some)
    if width == channels:
        return
    for channel in range(begin, end):
        center, spread = merge_channel(x, rows, width, channels, elements, state, channel)
        put(mean, channel, center)
        put(m2, channel, spread)


@inline
def sum_strip(dy, x, y, i, width, rows, count, ahead, mean):
    """Return the sums of g and of g * (x - mean) of columns over rows."""
    sums = zeros()
    products = zeros()
    for row in range(rows):
        at = i + row * width
        if ahead != 0:
            prefetch(dy, at + ahead)
            prefetch(x, at + ahead)
        g = wide_at(dy, at, count)
        if present(y):
            g = where_positive(load_some(y, at, count), g)
        sums = sums + g
        products = muladd(g, wide_at(x, at, count) - mean, products)
    return sums, products


@step
def sum_part(dy, x, y, all_rows, width, ahead, part, tile, center, state):
    """Put the sums of g, of g * (x - mean), and their rounding errors into ``state[part]``."""
    space = state.shape[2]
    block, parts, _ = parts_of(all_rows, width)
    left, right = tile * TILE, min((tile + 1) * TILE, width)
    begin, end = rows_of_part(all_rows, block, part, parts)
    padded = -(-(right - left) // LANES) * LANES
    scratch = np.empty((2, padded))
    state[part, :, left : left + padded] = 0.0
    for first in range(begin, end, block):
        stop = min(first + block, end)
        scratch[:] = 0.0
        for strip in range(first, stop, STRIP):
            rows = min(STRIP, stop - strip)
            for at in range(left, right, LANES):
                count = min(LANES, right - at)
                i = strip * width + at
                mean = load(center, at)
                if rows == STRIP and count == LANES:
                    sums = sum_strip(dy, x, y, i, width, STRIP, LANES, ahead, mean)
                else:
                    sums = sum_strip(dy, x, y, i, width, rows, count, ahead, mean)
                into = at - left
                store(scratch, into, load(scratch, into) + sums[0])
                into += padded
                store(scratch, into, load(scratch, into) + sums[1])
        for at in range(0, padded, LANES):
            for quantity in range(2):
                into = (part * 4 + quantity) * space + left + at
                value, low = accumulate(
                    load(state, into),
                    load(state, into + 2 * space),
                    load(scratch, quantity * padded + at),
                )
                store(state, into, value)
                store(state, into + 2 * space, low)


@step
def sum_share(dy, x, y, rows, width, ahead, center, state, thread, threads):
    """Take the sums over a thread's share of the parts."""
    tiles = parts_of(rows, width)[2]
    units = state.shape[0] * tiles
    for unit in range(share(units, thread, threads), share(units, thread + 1, threads)):
        sum_part(dy, x, y, rows, width, ahead, unit // tiles, unit % tiles, center, state)


@step
def add_columns(
    dy, x, y, rows, width, channels, elements, state, mean, invstd, begin, end, sum_dy, sum_dy_xhat
):
    """Find the sums of channels, from the parts, their columns, and the rest of the elements."""
    parts, _, space = state.shape
    for at in range(begin, end if width == channels else width, LANES):
        for quantity in range(2):
            into = quantity * space + at
            value, low = load(state, into), load(state, into + 2 * space)
            for part in range(1, parts):
                own = part * 4 * space + into
                value, low = accumulate(value, low, load(state, own))
                low = low + load(state, own + 2 * space)
            store(state, into, value)
            store(state, into + 2 * space, low)
    for channel in range(begin, end):
        first, first_low, second, second_low = 0.0, 0.0, 0.0, 0.0
        for c in range(channel, width if rows else 0, channels):
            first, first_low = accumulate(first, first_low, state[0, 0, c])
            second, second_low = accumulate(second, second_low, state[0, 1, c])
            first_low += state[0, 2, c]
            second_low += state[0, 3, c]
        for i in range(rows * width + channel, elements, channels):
            g = get(dy, i)
            if present(y):
                g = where_positive(get(y, i), g)
            first, first_low = accumulate(first, first_low, cast(g, 0.0))
            product = g * (get(x, i) - get(mean, channel))
            second, second_low = accumulate(second, second_low, product)
        put(sum_dy, channel, settle(first, first_low))
        put(sum_dy_xhat, channel, settle(second, second_low) * get(invstd, channel))
