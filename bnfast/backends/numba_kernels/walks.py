"""The elementwise half of both kernels: the walk along the flat output.

An array is transformed in steps of a cache line, but of at least sixteen elements, wherever
channels begin and end, so that between the first line of a share and its last every store is a
whole vector, and with large arrays goes past the cache. The two array forms differ in how the
numbers of a step are found::

    by_runs     runs of 16 and more    n0 n0 n0 n0 | n0 n0 n0 n1 n1 | n1 n1 ...
                A step within a run has one channel's numbers, at its end those of two.
    by_cycle    columns, short runs    n0 n1 n2 n3 | n4 n0 n1 n2 | n3 ...
                The numbers of all elements up to where they repeat are a table; a step reads
                its own from any place of it.

Each comes a second time, ``..._exactly``, for arrays with a channel that does not fit float32.

What is done is an operation: ``make`` computes up to sixteen elements, a ``count`` that is 16
almost everywhere, where the optimiser drops the mask; ``write`` stores as many, and ``write_whole``
a step of one or two sixteens; ``ask`` asks for what a step reads.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from bnfast.backends.numba_kernels.addresses import (
    LINE,
    fence,
    itemsize_of,
    load,
    load_some,
    prefetch,
    present,
    room,
    same,
    store_some,
    stream,
    stream_two,
    to_line,
)
from bnfast.backends.numba_kernels.arithmetic import MISFIT, gradient, output
from bnfast.backends.numba_kernels.compiling import inline, step
from bnfast.backends.numba_kernels.lanes import LANES, first_lanes, where_nonzero, where_positive

CYCLE = 256
"""Elements of a cycle, at least, so that it is not begun anew all the time."""

LINES_AHEAD = 16384
"""Bytes of each array that are asked for ahead: all of it is less than a first-level cache of 48 KB
holds."""

BEYOND = 2 * LANES
"""Elements of a table behind a cycle, which a step that begins in it may reach."""


@inline
def line_of(y):
    """Return the elements of a cache line, but at least 16."""
    return max(LANES, LINE // itemsize_of(y))


@inline
def write_some(y, i, value, count, past):
    """Store ``count`` elements; whole vectors past the cache if ``past``."""
    if past and count == LANES:
        stream(y, i, value)
    else:
        store_some(y, i, value, count)


@inline
def write_step(y, i, value, other, past):
    """Store a step of `line_of` elements; ``other`` is its second half, where it has one."""
    if line_of(y) == LANES:
        write_some(y, i, value, LANES, past)
    elif past:
        stream_two(y, i, value, other)
    else:
        store_some(y, i, value, LANES)
        store_some(y, i + LANES, other, LANES)


@inline
def make_output(arrays, i, count, numbers):
    """Return y from element ``i`` on, and nothing else. ``arrays``: x, residual, y, add, relu."""
    x, residual, _, add, relu = arrays
    head, scale, shift, _ = numbers
    value = load_some(x, i, count)
    other = load_some(residual, i, count) if add else value
    return output(value, other, head, scale, shift, add, relu), value


@inline
def write_output(arrays, i, count, made, past):
    """Store what `make_output` made."""
    write_some(arrays[2], i, made[0], count, past)


@inline
def write_outputs(arrays, i, made, more, past):
    """Store what `make_output` made of a step."""
    write_step(arrays[2], i, made[0], more[0], past)


@inline
def make_gradient(arrays, i, count, numbers):
    """Return dx from element ``i`` on, and g. ``arrays``: dy, x, y, dx, dresidual, relu, both."""
    dy, x, y, _, _, relu, _ = arrays
    head, slope, offset, factor = numbers
    g = load_some(dy, i, count)
    if relu:
        g = where_positive(load_some(y, i, count), g)
    return gradient(g, load_some(x, i, count), head, slope, offset, factor), g


@inline
def write_gradient(arrays, i, count, made, past):
    """Store what `make_gradient` made."""
    write_some(arrays[3], i, made[0], count, past)
    if arrays[6]:
        store_some(arrays[4], i, made[1], count)


@inline
def write_gradients(arrays, i, made, more, past):
    """Store what `make_gradient` made of a step."""
    write_step(arrays[3], i, made[0], more[0], past)
    if arrays[6]:
        write_step(arrays[4], i, made[1], more[1], False)


@inline
def ask_output(arrays, i):
    """Ask for what `make_output` reads, but for the residual, which is read only once."""
    prefetch(arrays[0], i)


@inline
def ask_gradient(arrays, i):
    """Ask for what `make_gradient` reads."""
    prefetch(arrays[0], i)
    prefetch(arrays[1], i)


@inline
def numbers_of(table, c):
    """Return the numbers of a channel."""
    return table[0, c], table[1, c], table[2, c], table[3, c]


@inline
def numbers_from(table, at):
    """Return the numbers of sixteen elements, from entry ``at`` of a cycle."""
    width = table.shape[1]
    return (
        load(table, at),
        load(table, at + width),
        load(table, at + 2 * width),
        load(table, at + 3 * width),
    )


@inline
def joined(count, a, b):
    """Return numbers: ``a`` for the first ``count`` lanes, ``b`` for the others."""
    return (
        first_lanes(count, a[0], b[0]),
        first_lanes(count, a[1], b[1]),
        first_lanes(count, a[2], b[2]),
        first_lanes(count, a[3], b[3]),
    )


def walks(make, write, write_whole, ask):
    """Return the four walks for an operation: by_runs, by_runs_exactly, by_cycle, ..._exactly.

    They transform the elements from ``start`` to ``stop``; ``to`` is the array of which cache
    lines are to be filled if ``past``. If ``ahead`` is not 0, what lies so many elements on is
    asked for: memory is then read while it is written.
    """

    @step
    def by_runs(arrays, to, start, stop, size, numbers, past, ahead):
        channels = numbers.shape[1]
        c = start // size % channels
        edge = (start // size + 1) * size
        i = start
        line = line_of(to)
        left = to_line(to, start) if past else 0
        while i < stop:
            whole = (min(edge, stop) - i) // line * line if left == 0 else 0
            if whole > 0:
                own = numbers_of(numbers, c)
                for at in range(i, i + whole, line):
                    if ahead != 0:
                        ask(arrays, at + ahead)
                    made = make(arrays, at, LANES, own)
                    more = make(arrays, at + LANES, LANES, own) if line > LANES else made
                    write_whole(arrays, at, made, more, past)
                i += whole
            elif edge == i:
                c = c + 1 if c + 1 < channels else 0
                edge += size
            else:
                left = left if left > 0 else line
                count = min((left - 1) % LANES + 1, stop - i)
                after = c + 1 if c + 1 < channels else 0
                both = joined(edge - i, numbers_of(numbers, c), numbers_of(numbers, after))
                if ahead != 0:
                    ask(arrays, i + ahead)
                write(arrays, i, count, make(arrays, i, count, both), past)
                i += count
                left -= count
                if i > edge:
                    c = after
                    edge += size

    @step
    def by_runs_exactly(arrays, start, stop, size, numbers, wide):
        channels = numbers.shape[1]
        i = start
        while i < stop:
            c = i // size % channels
            edge = min((i // size + 1) * size, stop)
            for at in range(i, edge, LANES):
                count = min(edge - at, LANES)
                if wide[MISFIT, c] == 0.0:
                    made = make(arrays, at, count, numbers_of(numbers, c))
                else:
                    made = make(arrays, at, count, numbers_of(wide, c))
                write(arrays, at, count, made, False)
            i = edge

    @step
    def by_cycle(arrays, to, start, stop, table, past, ahead):
        width = table.shape[1] - BEYOND
        at = start % width
        i = start
        line = line_of(to)
        left = to_line(to, start) if past else 0
        while i < stop:
            steps = min((width - at + line - 1) // line, (stop - i) // line)
            if left == 0 and steps > 0:
                for _ in range(steps):
                    if ahead != 0:
                        ask(arrays, i + ahead)
                    made = make(arrays, i, LANES, numbers_from(table, at))
                    more = made
                    if line > LANES:
                        more = make(arrays, i + LANES, LANES, numbers_from(table, at + LANES))
                    write_whole(arrays, i, made, more, past)
                    i += line
                    at += line
            else:
                left = left if left > 0 else line
                count = min((left - 1) % LANES + 1, stop - i)
                made = make(arrays, i, count, numbers_from(table, at))
                write(arrays, i, count, made, past)
                i += count
                at += count
                left -= count
            if at >= width:
                at -= width
        if past:
            fence()

    @step
    def by_cycle_exactly(arrays, start, stop, table, wide):
        width = table.shape[1] - BEYOND
        for i in range(start, stop, LANES):
            at = i % width
            count = min(stop - i, LANES)
            nearly, extra = make(arrays, i, count, numbers_from(table, at))
            precisely, _ = make(arrays, i, count, numbers_from(wide, at))
            bad = load(wide, MISFIT * wide.shape[1] + at)
            write(arrays, i, count, (where_nonzero(bad, precisely, nearly), extra), False)

    return by_runs, by_runs_exactly, by_cycle, by_cycle_exactly


_normalize = walks(make_output, write_output, write_outputs, ask_output)
_gradient = walks(make_gradient, write_gradient, write_gradients, ask_gradient)
normalize_runs, normalize_runs_exactly, normalize_cycle, normalize_cycle_exactly = _normalize
gradient_runs, gradient_runs_exactly, gradient_cycle, gradient_cycle_exactly = _gradient


@step
def normalize_by_runs(x, residual, y, begin, end, size, numbers, wide, safe, relu, past, ahead):
    """Normalise a part of an array of runs."""
    arrays = (x, residual, y, present(residual), relu)
    if safe and size >= LANES:
        normalize_runs(arrays, y, begin, end, size, numbers, past, ahead)
    else:
        normalize_runs_exactly(arrays, begin, end, size, numbers, wide)


@step
def normalize_by_cycle(x, residual, y, begin, end, table, wide, safe, relu, past, ahead):
    """Normalise a part of an array whose numbers repeat."""
    arrays = (x, residual, y, present(residual), relu)
    if safe:
        normalize_cycle(arrays, y, begin, end, table, past, ahead)
    else:
        normalize_cycle_exactly(arrays, begin, end, table, wide)


@step
def gradient_by_runs(dy, x, y, dx, dresidual, begin, end, size, numbers, wide, safe, past, ahead):
    """Make the gradients of a part of an array of runs."""
    arrays = (dy, x, y, dx, dresidual, present(y), present(dresidual))
    if safe and size >= LANES:
        gradient_runs(arrays, dx, begin, end, size, numbers, past, ahead)
    else:
        gradient_runs_exactly(arrays, begin, end, size, numbers, wide)


@step
def gradient_by_cycle(dy, x, y, dx, dresidual, begin, end, table, wide, safe, past, ahead):
    """Make the gradients of a part of an array whose numbers repeat."""
    arrays = (dy, x, y, dx, dresidual, present(y), present(dresidual))
    if safe:
        gradient_cycle(arrays, dx, begin, end, table, past, ahead)
    else:
        gradient_cycle_exactly(arrays, begin, end, table, wide)


@inline
def cycle_width(channels):
    """Return the elements of a cycle of columns: whole rows of them."""
    return channels * max(1, CYCLE // channels)


@inline
def table_for(y, width, past):
    """Return room for the numbers of a cycle of ``width`` elements.

    Where whole cache lines of y are made, a line of numbers is read for each, not parts of two.
    """
    columns = width + BEYOND
    flat = room(y, 1, 4 * columns + 2 * LANES)[0]
    line = LINE // flat.itemsize
    first = to_line(flat, 0) + (line - to_line(y, 0) % line if past else 0)
    return flat[first : first + 4 * columns].reshape((4, columns))


@step
def repeat(table, period):
    """Fill the rows of a table, `BEYOND` longer than a cycle, from their first ``period``."""
    rows, width = table.shape
    for row in range(rows):
        if period < LANES:
            for at in range(period, width):
                table[row, at] = table[row, at - period]
        else:
            for at in range(row * width + period, (row + 1) * width, LANES):
                count = min(LANES, (row + 1) * width - at)
                store_some(table, at, load_some(table, at - period, count), count)


@step
def stretch(numbers, size, table):
    """Fill a table of whole cycles with each of the numbers ``size`` times."""
    channels = numbers.shape[1]
    for row in range(numbers.shape[0]):
        for c in range(channels):
            for at in range(c * size, (c + 1) * size):
                table[row, at] = numbers[row, c]
    repeat(table, channels * size)


@inline
def lines_ahead(x, large):
    """Return by how many elements an elementwise pass over large arrays asks for memory ahead."""
    return LINES_AHEAD // itemsize_of(x) if large else 0


@inline
def past_cache(y, x, other, big):
    """Return whether to write y past the cache: not where it is an input, which is in it."""
    return big and not same(y, x) and not same(y, other)
