"""Kernels for channels-last arrays (M, C): a channel is a column.

Rows are read whole, sixteen columns at a time, in the order of memory. Few channels would leave
lanes empty, so rows are laid side by side until their elements fill them: C = 3 becomes rows of 48,
in which columns c, c + 3, c + 6, ... are the same channel. What is left over when the rows run out
is handled element by element::

    M = 37, C = 3       two wide rows [ 48 ][ 48 ] and a rest of 15 elements

Sums are taken over blocks of a few hundred rows by at most `TILE` columns: small enough to be read
a second time from the L2 cache. A part is a run of such blocks, merged as they come; the parts, at
most `PARTS`, are what threads share. The last step merges the columns of a channel.

A row whose width is no multiple of sixteen ends in a group that fills its last lanes only.
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
    get,
    load,
    load_last,
    muladd,
    prefetch,
    put,
    rectify,
    store,
    where_nonzero,
    where_positive,
    zeros,
)

TILE = 512
"""Columns of a block, at most."""

BLOCK = 32768
"""Elements of a block: 128 KiB of float32, 256 KiB of float64."""

ROWS = 192
"""Rows of a block, at most."""

PARTS = 64
"""Parts times tiles, at most: more threads than that would have nothing to do."""

STRIP = 8
"""Rows that are added up before their sum is added to that of the block; half as many where two
arrays are read. A term then takes part in at most 8 + 192 / 8 or 4 + 192 / 4 additions, each of
which errs by up to half a unit; `spec.SUM_UNITS` is 32. Sorted data with mean/std = 100 has shown
0.4 units for each, all of one sign."""

AHEAD = 16
"""Rows by which memory is asked for ahead, into the L2 cache. The hardware does not foresee the way
through a strip: without this the sums over a 100 MB array took three times as long."""


@inline
def wide_rows(x):
    """Return the width and the number of wide rows."""
    rows, channels = x.shape
    width = channels
    while width < 2 * LANES * LANES and width % LANES:
        width += channels
    if width % LANES or channels >= 2 * LANES:
        width = channels
    return width, rows * channels // width


@inline
def parts_of(x):
    """Return rows of a block, number of parts, of tiles, and the width in whole groups of lanes."""
    width, rows = wide_rows(x)
    tiles = -(-width // TILE)
    block = min(ROWS, BLOCK // min(width, TILE))
    parts = max(1, min(-(-rows // block), PARTS // tiles))
    return block, parts, tiles, -(-width // LANES) * LANES


@inline
def rows_of_part(x, part):
    """Return the first row of a part, and the first after it."""
    rows = wide_rows(x)[1]
    block, parts, _, _ = parts_of(x)
    blocks = -(-rows // block)
    return share(blocks, part, parts) * block, min(share(blocks, part + 1, parts) * block, rows)


@inline
def group(x, row, at, width):
    """Return the elements of a wide row from column ``at``."""
    start = row * width + at
    if at + LANES <= width:
        return load(x, start)
    return load_last(x, start + width - at, width - at)


@inline
def column_at(c, width, padded):
    """Return where column ``c`` is among whole groups."""
    return c if c < width // LANES * LANES else c + padded - width


@step
def measure_block(x, first, stop, left, right, width, scratch):
    """Put the sums of columns, then those of deviations and of their squares, in ``scratch``."""
    room = scratch.shape[1]
    count = float(stop - first)
    for at in range(0, right - left, LANES):
        for quantity in range(3):
            store(scratch, quantity * room + at, zeros())
    for strip in range(first, stop, STRIP):
        for at in range(left, right, LANES):
            sums = zeros()
            for row in range(strip, min(strip + STRIP, stop)):
                prefetch(x, (row + AHEAD) * width + at)
                sums = sums + cast(group(x, row, at, width), sums)
            store(scratch, at - left, load(scratch, at - left) + sums)
    for at in range(0, right - left, LANES):
        store(scratch, at, load(scratch, at) / count)
    for strip in range(first, stop, STRIP):
        for at in range(left, right, LANES):
            mean = load(scratch, at - left)
            deviations = zeros()
            squares = zeros()
            for row in range(strip, min(strip + STRIP, stop)):
                d = cast(group(x, row, at, width), mean) - mean
                deviations = deviations + d
                squares = muladd(d, d, squares)
            into = room + at - left
            store(scratch, into, load(scratch, into) + deviations)
            into += room
            store(scratch, into, load(scratch, into) + squares)


@inline
def merge_group(state, into, count, other_count, mean, low, m2, plain):
    """Merge sixteen columns into rows mean, low, m2, m2_low and plain of ``state``.

    Flat index ``into`` is the first of their means. What is there is of ``count`` elements each.
    """
    room = state.shape[2]
    m2_low = zeros()
    if count != 0:
        own = load(state, into), load(state, into + room)
        own_m2 = load(state, into + 2 * room), load(state, into + 3 * room)
        mean, low, m2, m2_low = merge(
            float(count), own[0], own[1], own_m2[0], own_m2[1], float(other_count), mean, low, m2
        )
        plain = plain + load(state, into + 4 * room)
    store(state, into, mean)
    store(state, into + room, low)
    store(state, into + 2 * room, m2)
    store(state, into + 3 * room, m2_low)
    store(state, into + 4 * room, plain)


@step
def measure_part(x, part, tile, state):
    """Put mean, low, m2, m2_low and plain of the columns of a tile into ``state[part]``."""
    width, _ = wide_rows(x)
    block, _, _, padded = parts_of(x)
    left, right = tile * TILE, min((tile + 1) * TILE, padded)
    begin, end = rows_of_part(x, part)
    scratch = np.empty((3, right - left))
    room = right - left
    for first in range(begin, end, block):
        stop = min(first + block, end)
        measure_block(x, first, stop, left, right, width, scratch)
        count = stop - first
        for at in range(0, room, LANES):
            mean, deviation = load(scratch, at), load(scratch, room + at)
            low = deviation / count
            m2 = rectify(load(scratch, 2 * room + at) - deviation * low)
            into = part * 5 * padded + left + at
            merge_group(state, into, first - begin, count, mean, low, m2, mean * count)


@step
def merge_parts(x, state):
    """Merge all parts into the first."""
    parts, _, padded = state.shape
    rows = rows_of_part(x, 0)[1]
    for part in range(1, parts):
        begin, end = rows_of_part(x, part)
        for at in range(0, padded, LANES):
            own = part * 5 * padded + at
            mean, low = load(state, own), load(state, own + padded)
            m2 = load(state, own + 2 * padded) + load(state, own + 3 * padded)
            plain = load(state, own + 4 * padded)
            merge_group(state, at, rows, end - begin, mean, low, m2, plain)
        rows = end


@step
def merge_columns(x, state, mean, m2):
    """Compute mean and m2 of every channel from its columns and from the rest of the elements."""
    channels = x.shape[1]
    width, rows = wide_rows(x)
    _, _, padded = state.shape
    for channel in range(channels):
        count, center, low, spread, spread_low, plain = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        for c in range(channel, width if rows else 0, channels):
            at = column_at(c, width, padded)
            own_mean, own_low = state[0, 0, at], state[0, 1, at]
            own_m2 = settle(state[0, 2, at], state[0, 3, at])
            if c == channel:
                center, low, spread = own_mean, own_low, own_m2
            else:
                center, low, spread, spread_low = merge(
                    count, center, low, spread, spread_low, float(rows), own_mean, own_low, own_m2
                )
            count += rows
            plain += state[0, 4, at]
        for i in range(rows * width + channel, x.size, channels):
            value = cast(get(x, i), 0.0)
            if count == 0.0:
                center, spread = value, value - value  # m2 of NaN or inf alone is NaN, too
            else:
                center, low, spread, spread_low = merge(
                    count, center, low, spread, spread_low, 1.0, value, 0.0, 0.0
                )
            count += 1.0
            plain += value
        # Deviations from an infinite mean are NaN; the mean itself is not.
        mean[channel] = center + low if np.isfinite(center + low) else plain / count
        m2[channel] = settle(spread, spread_low)


@inline
def output_at(x, residual, i, table, wide, exact, at, add, relu):
    """Return sixteen elements of y from ``i``, by the numbers from column ``at`` of the tables."""
    width = table.shape[1]
    values, other = load(x, i), load(residual, i)
    head, scale = load(table, at), load(table, width + at)
    if not exact:
        return output(values, other, head, scale, load(table, 2 * width + at), add, relu)
    nearly = output(values, other, head, scale, load(table, 2 * width + at), add, relu)
    center, scale64 = load(wide, at), load(wide, width + at)
    precisely = output(values, other, center, scale64, load(wide, 2 * width + at), add, relu)
    return where_nonzero(load(table, 3 * width + at), nearly, precisely)


@step
def normalize_rows(x, residual, y, table, wide, exact, add, relu, thread, threads):
    """Transform a thread's share of the rows."""
    width, rows = wide_rows(x)
    rest = width % LANES
    for row in range(share(rows, thread, threads), share(rows, thread + 1, threads)):
        start = row * width
        # The last sixteen may overlap those before them. They are computed before anything
        # is written, since y may be x.
        last = start + width - LANES
        if rest:
            final = output_at(x, residual, last, table, wide, exact, width - LANES, add, relu)
        for at in range(0, width - rest, LANES):
            result = output_at(x, residual, start + at, table, wide, exact, at, add, relu)
            store(y, start + at, result)
        if rest:
            store(y, last, final)
    if thread == threads - 1:
        for i in range(rows * width, x.size):
            at = (i - rows * width) % x.shape[1]
            value, other = get(x, i), get(residual, i)
            if table[3, at] != 0:
                head, scale, shift = table[0, at], table[1, at], table[2, at]
                put(y, i, output(value, other, head, scale, shift, add, relu))
            else:
                center, scale64, bias = wide[0, at], wide[1, at], wide[2, at]
                put(y, i, output(value, other, center, scale64, bias, add, relu))


@inline
def repeat_columns(table, wide, channels):
    """Copy the columns of the channels across the tables; return whether any is not safe."""
    last = table.shape[0] - 1
    exact = False
    for at in range(table.shape[1]):
        c = at % channels
        exact |= table[last, c] == 0
        for i in range(table.shape[0]):
            table[i, at] = table[i, c]
        for i in range(wide.shape[0]):
            wide[i, at] = wide[i, c]
    return exact


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
    rows, channels = x.shape
    if measure:
        _, parts, tiles, padded = parts_of(x)
        state = np.empty((parts, 5, padded))
        units = parts * tiles
        for thread in prange(threads):
            for unit in range(share(units, thread, threads), share(units, thread + 1, threads)):
                measure_part(x, unit // tiles, unit % tiles, state)
        merge_parts(x, state)
        merge_columns(x, state, mean, m2)
    if transform:
        width, _ = wide_rows(x)
        table = np.empty((4, width), x.dtype)
        wide = np.empty((3, width))
        for c in range(channels):
            center = mean[c] if measure else given_mean[c]
            var = m2[c] / rows if measure else given_var[c]
            fill_forward(table, wide, c, center, var, weight, bias, eps)
        exact = repeat_columns(table, wide, channels)
        for thread in prange(threads):
            normalize_rows(x, residual, y, table, wide, exact, add, relu, thread, threads)


@inline
def masked(dy, y, row, at, width, relu):
    """Return g of a wide row from column ``at``."""
    g = group(dy, row, at, width)
    return where_positive(group(y, row, at, width), g) if relu else g


@step
def sum_part(dy, x, y, part, tile, center, relu, state):
    """Put the sums of g, of g * (x - mean), and their rounding errors into ``state[part]``."""
    width, _ = wide_rows(x)
    block, _, _, padded = parts_of(x)
    left, right = tile * TILE, min((tile + 1) * TILE, padded)
    begin, end = rows_of_part(x, part)
    room = right - left
    scratch = np.empty((2, room))
    state[part, :, left:right] = 0.0
    for first in range(begin, end, block):
        stop = min(first + block, end)
        scratch[:] = 0.0
        for strip in range(first, stop, STRIP // 2):
            for at in range(left, right, LANES):
                sums = zeros()
                products = zeros()
                mean = load(center, at)
                for row in range(strip, min(strip + STRIP // 2, stop)):
                    prefetch(dy, (row + AHEAD) * width + at)
                    prefetch(x, (row + AHEAD) * width + at)
                    g = cast(masked(dy, y, row, at, width, relu), sums)
                    sums = sums + g
                    d = cast(group(x, row, at, width), sums) - mean
                    products = muladd(g, d, products)
                into = at - left
                store(scratch, into, load(scratch, into) + sums)
                into += room
                store(scratch, into, load(scratch, into) + products)
        for at in range(0, room, LANES):
            for quantity in range(2):
                into = (part * 4 + quantity) * padded + left + at
                value, low = accumulate(
                    load(state, into),
                    load(state, into + 2 * padded),
                    load(scratch, quantity * room + at),
                )
                store(state, into, value)
                store(state, into + 2 * padded, low)


@step
def add_parts(state):
    """Add all parts to the first."""
    parts, _, padded = state.shape
    for part in range(1, parts):
        for at in range(0, 2 * padded, LANES):
            other = part * 4 * padded + at
            value, low = accumulate(
                load(state, at), load(state, at + 2 * padded), load(state, other)
            )
            store(state, at, value)
            store(state, at + 2 * padded, low + load(state, other + 2 * padded))


@step
def add_columns(dy, x, y, state, mean, invstd, relu, sum_dy, sum_dy_xhat):
    """Compute the sums of every channel from its columns and from the rest of the elements."""
    channels = x.shape[1]
    width, rows = wide_rows(x)
    _, _, padded = state.shape
    for channel in range(channels):
        first, first_low, second, second_low = 0.0, 0.0, 0.0, 0.0
        for c in range(channel, width if rows else 0, channels):
            at = column_at(c, width, padded)
            first, first_low = accumulate(first, first_low, state[0, 0, at])
            second, second_low = accumulate(second, second_low, state[0, 1, at])
            first_low += state[0, 2, at]
            second_low += state[0, 3, at]
        for i in range(rows * width + channel, x.size, channels):
            g = get(dy, i)
            if relu:
                g = where_positive(get(y, i), g)
            first, first_low = accumulate(first, first_low, cast(g, 0.0))
            product = g * (get(x, i) - mean[channel])
            second, second_low = accumulate(second, second_low, product)
        sum_dy[channel] = settle(first, first_low)
        sum_dy_xhat[channel] = settle(second, second_low) * invstd[channel]


@inline
def gradient_at(g, x, i, table, wide, exact, at):
    """Return sixteen elements of dx from ``i``, by the numbers from column ``at`` of the tables."""
    width = table.shape[1]
    values = load(x, i)
    head, slope = load(table, at), load(table, width + at)
    offset, factor = load(table, 2 * width + at), load(table, 3 * width + at)
    nearly = gradient(g, values, head, slope, offset, factor)
    if not exact:
        return nearly
    center, slope64 = load(wide, at), load(wide, width + at)
    offset64, factor64 = load(wide, 2 * width + at), load(wide, 3 * width + at)
    precisely = gradient(g, values, center, slope64, offset64, factor64)
    return where_nonzero(load(table, 4 * width + at), nearly, precisely)


@step
def gradient_rows(dy, x, y, dx, dresidual, table, wide, exact, relu, both, thread, threads):
    """Transform a thread's share of the gradients."""
    width, rows = wide_rows(x)
    rest = width % LANES
    for row in range(share(rows, thread, threads), share(rows, thread + 1, threads)):
        start = row * width
        last = start + width - LANES
        if rest:
            final_g = masked(dy, y, row, width - LANES, width, relu)
            final = gradient_at(final_g, x, last, table, wide, exact, width - LANES)
        for at in range(0, width - rest, LANES):
            g = masked(dy, y, row, at, width, relu)
            store(dx, start + at, gradient_at(g, x, start + at, table, wide, exact, at))
            if both:
                store(dresidual, start + at, g)
        if rest:
            store(dx, last, final)
            if both:
                store(dresidual, last, final_g)
    if thread == threads - 1:
        for i in range(rows * width, x.size):
            at = (i - rows * width) % x.shape[1]
            g = get(dy, i)
            if relu:
                g = where_positive(get(y, i), g)
            if table[4, at] != 0:
                head, slope, offset, factor = table[0, at], table[1, at], table[2, at], table[3, at]
                put(dx, i, gradient(g, get(x, i), head, slope, offset, factor))
            else:
                center, slope64, offset64 = wide[0, at], wide[1, at], wide[2, at]
                put(dx, i, gradient(g, get(x, i), center, slope64, offset64, wide[3, at]))
            if both:
                put(dresidual, i, g)


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
    width, _ = wide_rows(x)
    if measure:
        _, parts, tiles, padded = parts_of(x)
        center = np.zeros(padded)
        for c in range(width):
            center[column_at(c, width, padded)] = mean[c % channels]
        state = np.empty((parts, 4, padded))
        units = parts * tiles
        for thread in prange(threads):
            for unit in range(share(units, thread, threads), share(units, thread + 1, threads)):
                sum_part(dy, x, y, unit // tiles, unit % tiles, center, relu, state)
        add_parts(state)
        add_columns(dy, x, y, state, mean, invstd, relu, sum_dy, sum_dy_xhat)
    if transform:
        table = np.empty((5, width), x.dtype)
        wide = np.empty((4, width))
        for c in range(channels):
            first = sum_dy[c] if measure else given_dy[c]
            second = sum_dy_xhat[c] if measure else given_dy_xhat[c]
            fill_backward(table, wide, c, mean, invstd, weight, (first / count, second / count))
        exact = repeat_columns(table, wide, channels)
        for thread in prange(threads):
            gradient_rows(dy, x, y, dx, dresidual, table, wide, exact, relu, both, thread, threads)
