"""The definition of every kernel, in more digits than float64 has.

Arrays are laid out in rows, one channel each: shape ``(C, n)``, see `rows`. Channel vectors keep
their shape ``(C,)``. Every number is *wide*: `numpy.longdouble` where that carries more than
float64's 53 bits (x86, and 64-bit Arm outside macOS and Windows), else `decimal.Decimal` in arrays
of objects, which is exact enough everywhere and some hundred times slower.

The functions are written for either, so they use arithmetic, ``sum`` and ``sqrt`` alone, and no
float literals, which a Decimal refuses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Context, Decimal
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Wide: TypeAlias = NDArray[Any]
"""An array of wide numbers: longdouble, or objects that are Decimals."""

DECIMAL_CONTEXT = Context(prec=40, traps=[])
"""For the fallback: 16 digits of float64 and 6 of mean/std = 1e6 leave 18 to spare. Enter it by
`decimal.localcontext`. Without traps NaN passes as it does in floating point."""


def longdouble(values: ArrayLike) -> Wide:
    """Return ``values`` as an array of longdouble."""
    return np.asarray(values, np.longdouble)


def decimal(values: ArrayLike) -> Wide:
    """Return ``values`` as an array of Decimals, exactly."""
    floats = np.asarray(values, np.float64)
    exact = [Decimal(value) for value in floats.ravel().tolist()]
    decimals: Wide = np.array(exact, dtype=object).reshape(floats.shape)
    return decimals


wide: Callable[[ArrayLike], Wide] = longdouble if np.finfo(np.longdouble).nmant > 52 else decimal
"""The one of the two that this platform needs."""


class Moments(NamedTuple):
    """Mean and sum of squared deviations of each channel."""

    mean: Wide
    m2: Wide


class Sums(NamedTuple):
    """The two sums of the backward pass, and the sums of their terms' magnitudes."""

    sum_dy: Wide
    sum_dy_xhat: Wide
    magnitude_dy: Wide
    magnitude_dy_xhat: Wide


class Format(NamedTuple):
    """A floating-point format narrower than float32, in which arrays are stored."""

    digits: int
    """Binary digits of a normal number."""
    lowest: int
    """The exponent of the smallest normal number."""
    highest: int
    """The exponent of the largest numbers."""

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return (2.0 - 2.0 ** (1 - self.digits)) * 2.0**self.highest

    @property
    def smallest(self) -> float:
        """The smallest subnormal number."""
        return 2.0 ** (self.lowest - self.digits + 1)

    def spacing(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the distance of adjacent numbers at ``values``, also beyond the largest."""
        exponents = np.maximum(np.frexp(values)[1] - 1, self.lowest)
        spacing: NDArray[Any] = np.ldexp(1.0, exponents - self.digits + 1)
        return spacing

    def limited(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return ``values``, with what would be the number after the largest for infinity."""
        beyond = 2.0 ** (self.highest + 1)
        clipped: NDArray[Any] = np.clip(values, -beyond, beyond)
        return clipped

    def rounded(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the nearest number to each of ``values``, the even one of two; `limited`."""
        limited = self.limited(values)
        unit = self.spacing(limited)
        nearest: NDArray[Any] = np.rint(limited / unit) * unit
        return nearest


FORMATS = {"float16": Format(11, -14, 15), "bfloat16": Format(8, -126, 127)}
"""By the name of the dtype."""


def limits(dtype: np.dtype[Any]) -> tuple[float, float]:
    """Return the largest number of a dtype, and the smallest subnormal one."""
    if dtype.name in FORMATS:
        return FORMATS[dtype.name].largest, FORMATS[dtype.name].smallest
    return float(np.finfo(dtype).max), float(np.finfo(dtype).smallest_subnormal)


def positive(y: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where y > 0. ml_dtypes would warn of NaN."""
    return y.astype(np.float64) > 0


def rows(x: NDArray[Any]) -> NDArray[Any]:
    """Return either array form as ``(C, n)``."""
    channels = x.shape[1]
    per_channel = math.prod(x.shape) // channels if channels else 0
    in_rows: NDArray[Any] = np.moveaxis(x, 1, 0).reshape(channels, per_channel)
    return in_rows


def moments(x: Wide) -> Moments:
    """Return the moments of the rows of ``x``; of an empty row they are 0."""
    count = x.shape[1]
    if count == 0:
        return Moments(wide(np.zeros(len(x))), wide(np.zeros(len(x))))
    mean = x.sum(axis=1) / count
    mean = mean + (x - mean[:, None]).sum(axis=1) / count
    deviation = x - mean[:, None]
    return Moments(mean, (deviation * deviation).sum(axis=1))


def standardize(x: Wide, mean: Wide, var: Wide, eps: float) -> Wide:
    """Return xhat, the distance of each element from the mean in standard deviations."""
    xhat: Wide = (x - mean[:, None]) / np.sqrt(var + wide(eps))[:, None]
    return xhat


def affine(xhat: Wide, weight: Wide, bias: Wide, residual: Wide | None, *, relu: bool) -> Wide:
    """Return act(xhat * weight + bias + residual)."""
    y = xhat * weight[:, None] + bias[:, None]
    if residual is not None:
        y = y + residual
    return np.where(y < 0, wide(0), y) if relu else y


def mask(dy: Wide, y: NDArray[Any] | None) -> Wide:
    """Return g, the gradient behind the ReLU: dy where y > 0, else 0."""
    return dy if y is None else np.where(positive(y), dy, wide(0))


def backward_sums(g: Wide, xhat: Wide) -> Sums:
    """Return the sums over each row of g and of g * xhat."""
    product = g * xhat
    if g.shape[1] == 0:
        return Sums(*(wide(np.zeros(len(g))) for _ in range(4)))
    terms = (g, product, np.abs(g), np.abs(product))
    return Sums(*(term.sum(axis=1) for term in terms))


def backward_input(
    g: Wide, xhat: Wide, invstd: Wide, weight: Wide, sum_dy: Wide, sum_dy_xhat: Wide, count: int
) -> Wide:
    """Return dx = weight * invstd * (g - (sum_dy + xhat * sum_dy_xhat) / count)."""
    common = (sum_dy[:, None] + xhat * sum_dy_xhat[:, None]) / count
    dx: Wide = (weight * invstd)[:, None] * (g - common)
    return dx
