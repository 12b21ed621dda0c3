"""The arithmetic that rows and columns share. Most of it takes numbers or `lanes.Lanes` alike.

Moments
    Of each part of a channel: a first mean, how far it is off (the mean of the deviations from
    it), and m2 about the true mean. Parts are merged by Chan's formula (Chan, Golub and LeVeque
    1979). The running mean and m2 are each kept in two parts, value and rounding error, since a
    plain sum over the 10,000 parts of 1e7 equal elements drifts by 2,500 units of 2^-53.
Numbers
    What each channel is transformed by, four numbers, computed once per call: ``numbers`` in the
    dtype of x, ``wide`` in float64. Row `MISFIT` of ``wide`` is not 0 for a channel whose numbers
    float32 cannot hold well: its elements are computed from ``wide`` and rounded once.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from bnfast.backends.numba_kernels.addresses import load_some, store_some
from bnfast.backends.numba_kernels.compiling import inline
from bnfast.backends.numba_kernels.lanes import (
    LANES,
    cast,
    difference,
    first_lanes,
    misfit,
    muladd,
    quiet,
    rectify,
    square_root,
    total,
    where_nonzero,
    zeros,
)

LARGEST = 2.0**100
SMALLEST = 2.0**-100
"""Between these, float32 products with a factor neither overflow nor lose bits below 2^-126."""

MISFIT = 4


@inline
def share(units, thread, threads):
    """Return the first of ``units`` that a thread handles; its last is before the next's first."""
    return units * thread // threads


@inline
def corrected(first, deviation, squares, count):
    """Return first mean, its error, and m2, from the sums of deviations and of their squares."""
    low = deviation / count
    return first, low, rectify(squares - deviation * low)


@inline
def merge(count, mean, low, m2, m2_low, other_count, other_mean, other_low, other_m2):
    """Return mean, low, m2, m2_low of two sets of elements together.

    The mean of the first set is ``mean + low``, its m2 is ``m2 + m2_low``; ``count`` may not be 0.
    """
    part = other_count / (count + other_count)
    delta = (other_mean - mean) + (other_low - low)
    change = delta * part
    merged_mean = mean + change
    low = low + (change - (merged_mean - mean))
    gain = other_m2 + delta * delta * (count * part)
    merged_m2 = m2 + gain
    m2_low = m2_low + (gain - (merged_m2 - m2))
    return merged_mean, low, merged_m2, m2_low


@inline
def accumulate(value, low, term):
    """Return value + term and the collected rounding errors (Knuth's two-sum)."""
    result = value + term
    other = result - value
    return result, low + ((value - (result - other)) + (term - other))


@inline
def fill_forward(numbers, wide, mean, var, divisor, weight, bias, eps, begin, end):
    """Find how the channels from ``begin`` to ``end`` are normalised, with var / divisor.

    ``numbers`` gets head, scale, shift; ``wide`` mean, scale, bias. Where head is the mean rounded
    to the dtype of x, (x - mean) scale + bias = (x - head) scale + (bias - (mean - head) scale).
    Returns whether every channel is safe.
    """
    channels = numbers.shape[1]
    misfits = zeros()
    for c in range(begin, end, LANES):
        count = min(end - c, LANES)
        center = quiet(load_some(mean, c, count))
        spread = first_lanes(count, load_some(var, c, count) / divisor + eps, 1.0)
        scale = quiet(load_some(weight, c, count) / square_root(spread))
        offset = quiet(load_some(bias, c, count))
        head = cast(cast(center, numbers), center)
        tail = difference(center, head)
        store_some(numbers, c, center, count)
        store_some(numbers, channels + c, scale, count)
        shift = where_nonzero(tail, offset - tail * scale, offset)
        store_some(numbers, 2 * channels + c, shift, count)
        store_some(wide, c, center, count)
        store_some(wide, channels + c, scale, count)
        store_some(wide, 2 * channels + c, offset, count)
        bad = misfit(where_nonzero(scale, scale, 1.0), SMALLEST, LARGEST)
        bad = bad + misfit(center, 0.0, LARGEST) + misfit(offset, 0.0, LARGEST)
        store_some(wide, MISFIT * channels + c, bad, count)
        misfits = misfits + bad
    return numbers.itemsize == 8 or total(misfits) == 0.0


@inline
def fill_backward(numbers, wide, mean, invstd, weight, sum_dy, sum_dy_xhat, n, begin, end):
    """Find how the gradients of the channels from ``begin`` to ``end`` are made, from sums over n.

    ``numbers`` gets head, slope, offset, factor; ``wide`` mean and the next three:
    dx = factor g + ((x - mean) slope + offset). Returns whether every channel is safe.
    """
    channels = numbers.shape[1]
    misfits = zeros()
    for c in range(begin, end, LANES):
        count = min(end - c, LANES)
        center = quiet(load_some(mean, c, count))
        inverse = load_some(invstd, c, count)
        factor = quiet(load_some(weight, c, count) * inverse)
        slope = quiet(0.0 - factor * (inverse * (load_some(sum_dy_xhat, c, count) / n)))
        offset = quiet(0.0 - factor * (load_some(sum_dy, c, count) / n))
        head = cast(cast(center, numbers), center)
        tail = where_nonzero(slope, difference(center, head), 0.0)
        store_some(numbers, c, center, count)
        store_some(numbers, channels + c, slope, count)
        shift = where_nonzero(tail, offset - tail * slope, offset)
        store_some(numbers, 2 * channels + c, shift, count)
        store_some(numbers, 3 * channels + c, factor, count)
        store_some(wide, c, center, count)
        store_some(wide, channels + c, slope, count)
        store_some(wide, 2 * channels + c, offset, count)
        store_some(wide, 3 * channels + c, factor, count)
        bad = misfit(where_nonzero(slope, slope, 1.0), SMALLEST, LARGEST)
        bad = bad + misfit(where_nonzero(factor, factor, 1.0), SMALLEST, LARGEST)
        bad = bad + misfit(center, 0.0, LARGEST) + misfit(offset, 0.0, LARGEST)
        store_some(wide, MISFIT * channels + c, bad, count)
        misfits = misfits + bad
    return numbers.itemsize == 8 or total(misfits) == 0.0


@inline
def output(x, residual, head, scale, shift, add, relu):
    """Return y in the dtype of x; the affine step runs in the dtype of ``head``."""
    value = cast(muladd(cast(x, head) - head, scale, shift), x)
    if add:
        value = value + residual
    return rectify(value) if relu else value


@inline
def gradient(g, x, head, slope, offset, factor):
    """Return dx in the dtype of x, computed in the dtype of ``head``.

    Where slope is 0, as in eval mode, x and head do not matter, not even if they are infinite.
    """
    d = where_nonzero(slope, cast(x, head) - head, 0.0)
    return cast(muladd(cast(g, head), factor, muladd(d, slope, offset)), x)
