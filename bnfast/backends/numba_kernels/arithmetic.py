"""The arithmetic that rows and columns share.

Most steps take numbers or `lanes.Lanes` alike: the operators mean the same for both.

Moments
    Of each block: the mean, how far it is off (the mean of the deviations from it), and m2 about
    the true mean. Blocks are merged by Chan's formula (Chan, Golub and LeVeque 1979). The running
    mean and m2 are each kept in two parts, value and rounding error, since a plain sum over the
    10,000 blocks of 1e7 equal elements drifts by 2,500 units of 2^-53.
Tables
    The numbers by which each channel is transformed, computed once per call: ``table`` in the dtype
    of x, ``wide`` in float64. The last row of ``table``, safe, is 0 for a channel whose numbers
    float32 cannot hold well: its elements are computed from ``wide`` and rounded once.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import numpy as np

from bnfast.backends.numba_kernels.compiling import inline
from bnfast.backends.numba_kernels.lanes import (
    cast,
    muladd,
    put,
    rectify,
    unless_zero,
)

LARGEST = 2.0**100
SMALLEST = 2.0**-100


@inline
def share(units, thread, threads):
    """Return the first of ``units`` that a thread handles; its last is before the next's first."""
    return units * thread // threads


@inline
def put_all(into, index, values):
    """Store numbers from a flat index on."""
    for value in values:
        put(into, index, value)
        index += 1


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
def settle(value, low):
    """Return value + low; ``low`` means nothing where the value overflowed or met an inf."""
    return value + low if np.isfinite(low) else value


@inline
def moderate(factor):
    """Return whether float32 products with a factor neither overflow nor lose bits below 2^-126."""
    return factor == 0 or SMALLEST <= abs(factor) <= LARGEST


@inline
def fill_forward(table, wide, c, mean, var, weight, bias, eps):
    """Fill column c of the tables: how a channel is normalised.

    ``table`` gets head, scale, shift and safe, in the dtype of x; ``wide`` mean, scale and bias.
    Where head is the mean rounded to that dtype,
    (x - mean) scale + bias = (x - head) scale + (bias - (mean - head) scale).
    """
    scale = weight[c] / np.sqrt(var + eps)
    head = cast(mean, table)
    table[0, c] = head
    table[1, c] = scale
    table[2, c] = bias[c] if mean == head else bias[c] - (mean - head) * scale
    table[3, c] = table.itemsize == 8 or (
        moderate(scale) and abs(mean) <= LARGEST and abs(bias[c]) <= LARGEST
    )
    wide[0, c] = mean
    wide[1, c] = scale
    wide[2, c] = bias[c]


@inline
def fill_backward(table, wide, c, mean, invstd, weight, means):
    """Fill column c of the tables: how the gradient of a channel is made.

    ``table`` gets head, slope, offset, factor and safe; ``wide`` mean and the next three:
    dx = factor g + ((x - mean) slope + offset). ``means`` are the two sums divided by the count.
    """
    factor = weight[c] * invstd[c]
    slope = -factor * (invstd[c] * means[1])
    offset = -factor * means[0]
    head = cast(mean[c], table)
    table[0, c] = head
    table[1, c] = slope
    exact = mean[c] == head or slope == 0
    table[2, c] = offset if exact else offset - (mean[c] - head) * slope
    table[3, c] = factor
    table[4, c] = table.itemsize == 8 or (
        moderate(slope) and moderate(factor) and abs(mean[c]) <= LARGEST and abs(offset) <= LARGEST
    )
    wide[0, c] = mean[c]
    wide[1, c] = slope
    wide[2, c] = offset
    wide[3, c] = factor


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
    common = muladd(unless_zero(slope, cast(x, head) - head), slope, offset)
    return cast(muladd(cast(g, head), factor, common), x)
