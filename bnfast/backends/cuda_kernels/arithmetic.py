"""Device functions on one element, one vector of elements, one channel: no barriers, no indices.

What each channel is transformed by is found in float64. Elements are computed in their own type,
where the mean may have more digits: its head is subtracted, its tail is in the shift. A channel
whose numbers float32 cannot hold well is computed in float64 and rounded once.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from bnfast.backends.cuda_kernels.driver import (
    VECTOR,
    cast,
    device,
    divide,
    float32,
    float64,
    fma,
    int32,
    sqrt,
)
from bnfast.backends.cuda_kernels.elements import get, load_vector, put, store_vector

LARGEST = 2.0**100
SMALLEST = 2.0**-100
"""Between these, float32 products with a factor neither overflow nor lose bits below 2^-126."""

HALF = float32(0.5)


@device
def quotient(n, inverse):
    """Return n // d for ``inverse`` = float32(1 / d) and 0 <= n < 2^20.

    (n + 1/2) / d is at least 1 / 2d away from a whole number, and float32 errs by less.
    """
    return int32((float32(int32(n)) + HALF) * inverse)


@device
def remainder(a, b):
    """Return a % b, for a >= 0 and b > 0."""
    return a - divide(a, b) * b


@device
def load(x, i, end, aligned, values, at):
    """Copy x[i : i + VECTOR] to ``values[at:]``, with 0 from ``end`` on."""
    if aligned and i + VECTOR <= end:
        load_vector(x, i, values, at)
    else:
        for k in range(VECTOR):
            values[at + k] = 0.0
            if i + k < end:
                values[at + k] = get(x, i + k)


@device
def store(x, i, end, aligned, values, at):
    """Copy ``values[at : at + VECTOR]`` to x[i:], but nothing from ``end`` on."""
    if aligned and i + VECTOR <= end:
        store_vector(x, i, values, at)
    else:
        for k in range(VECTOR):
            if i + k < end:
                put(x, i + k, values[at + k])


@device
def fits(value):
    """Return whether float32 holds a number well; NaN is as well computed either way."""
    size = abs(value)
    return not (size > LARGEST or (size < SMALLEST and size != 0.0))


@device
def affine_fits(mean, scale, bias):
    """Return whether float32 does for `output`; a bias is only added, so it may be small."""
    return fits(mean) and fits(scale) and not abs(bias) > LARGEST


@device
def line_fits(mean, scale, slope, offset):
    """Return whether float32 does for `gradient_on`."""
    return fits(mean) and fits(scale) and fits(slope) and fits(offset)


@device
def affine_of(moments, affine, divisor, eps, channels, c):
    """Return mean, scale and bias of a channel; ``moments`` has variances times ``divisor``."""
    scale = affine[c] / sqrt(moments[channels + c] / divisor + eps)
    return moments[c], scale, affine[channels + c]


@device
def line_of(factors, sums, count, channels, c):
    """Return mean, scale, slope and offset: dx = scale g + (slope (x - mean) + offset).

    ``factors`` holds mean, invstd and weight; ``sums`` the two sums over ``count`` elements.
    """
    invstd = factors[channels + c]
    scale = factors[2 * channels + c] * invstd
    slope = -scale * (invstd * (sums[channels + c] / count))
    return factors[c], scale, slope, -scale * (sums[c] / count)


@device
def moved(offset, tail, factor):
    """Return the offset with the tail of the mean folded in; nothing is done to an exact one."""
    return offset if tail == 0.0 or factor == 0.0 else fma(-tail, factor, offset)


@device
def tail_of(mean, head):
    """Return what the type of ``head`` leaves of a mean; infinity leaves nothing."""
    return 0.0 if mean == float64(head) else mean - float64(head)


@device
def run_of(i, left, inverse):
    """Return the run of element ``i``, if ``left`` are of run 0 and 1 / inverse of each other."""
    return 0 if i < left else 1 + quotient(i - left, inverse)


@device
def output(x, residual, head, scale, shift, add, relu):
    """Return y for one element."""
    return finish(fma(x - head, scale, shift), residual, add, relu)


@device
def output_of(x, residual, moments, affine, divisor, eps, channels, c, add, relu):
    """Return y for one element of channel ``c``, which float32 may not fit."""
    mean, scale, bias = affine_of(moments, affine, divisor, eps, channels, c)
    if affine_fits(mean, scale, bias):
        head = cast(mean, x)
        shift = moved(bias, tail_of(mean, head), scale)
        return output(x, residual, head, cast(scale, x), cast(shift, x), add, relu)
    return finish(cast(fma(float64(x) - mean, scale, bias), x), residual, add, relu)


@device
def finish(value, residual, add, relu):
    """Add the residual and cut off what is negative; NaN passes."""
    total = value + residual if add else value
    return cast(0.0, total) if relu and total <= 0 else total


@device
def masked(dy, y, relu):
    """Return g, the gradient behind the ReLU."""
    return dy if not relu or y > 0 else cast(0.0, dy)


@device
def gradient_on(g, x, head, slope, factor, shift):
    """Return dx for one element. Where ``slope`` is 0, x does not matter, whatever it holds."""
    off = cast(0.0, x) if slope == 0 else x - head
    return fma(g, factor, fma(off, slope, shift))


@device
def gradient_of(g, x, factors, sums, count, channels, c):
    """Return dx for one element of channel ``c``, which float32 may not fit."""
    mean, scale, slope, offset = line_of(factors, sums, count, channels, c)
    if line_fits(mean, scale, slope, offset):
        head = cast(mean, x)
        shift = moved(offset, tail_of(mean, head), slope)
        return gradient_on(g, x, head, cast(slope, x), cast(scale, x), cast(shift, x))
    off = 0.0 if slope == 0 else float64(x) - mean
    return cast(fma(float64(g), scale, fma(off, slope, offset)), x)
