"""Batch normalisation in exact arithmetic, fast enough for ten million elements.

Sums are exact, by integers
    A float64 is an integer times a power of two. `Limbs` writes all elements of an array over one
    power of two, as digits of at most 2^16 in magnitude. A product of two digits is below 2^33,
    so that int64 adds up 2^30 of them; weighted with their powers of two, as Python's integers,
    they are the exact sum of products. Mean and variance are then exact fractions.
Numbers of channels are correct to 2^-106
    1 / sqrt(var + eps) is found by `math.isqrt` to 192 bits. Each number is handed on as a `Pair`
    of float64, whose sum differs from it by at most 2^-106 of it.
Elements are correct to some 2^-100
    y and dx are computed from these in pairs, by the error-free sum of Knuth and the error-free
    product of Dekker. `tests/test_exact.py` holds both steps against decimals of 90 digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DIGIT = 17
"""Binary digits of a digit."""

ROOT_BITS = 192


class Pair(NamedTuple):
    """Arrays of numbers, each the sum of two float64, the second below the last place of the first.

    Channel vectors have shape (C, 1), so that they broadcast against rows of elements.
    """

    high: Floats
    low: Floats


class Limbs:
    """The elements of an array of shape (C, n) as integers over one power of two."""

    def __init__(self, values: Floats) -> None:
        mantissas, exponents = np.frexp(values)
        integers = np.ldexp(mantissas, 53).astype(np.int64)
        last = np.frexp((integers & -integers).astype(np.float64))[1] - 1  # its lowest bit
        used = integers != 0
        lowest = np.min(exponents - 53 + last, where=used, initial=1024)
        highest = np.max(exponents, where=used, initial=-1100)
        count = max(1, -(-(int(highest) - int(lowest) + 1) // DIGIT))
        self.exponent = int(lowest) if used.any() else 0
        self.digits: list[NDArray[np.int64]] = []
        rest = values
        for place in reversed(range(count)):
            unit = self.exponent + DIGIT * place
            digit = np.rint(np.ldexp(rest, -unit))
            rest = rest - np.ldexp(digit, unit)  # exact: the bits that are left
            self.digits.insert(0, digit.astype(np.int64))
        assert not rest.any()

    def sums(self) -> list[Fraction]:
        """Return the exact sum of each row."""
        totals = [digit.sum(axis=1).tolist() for digit in self.digits]
        return self._joined(totals, self.exponent)

    def products(self, other: Limbs) -> list[Fraction]:
        """Return the exact sum of products of each row."""
        totals: list[list[int]] = []
        for place in range(len(self.digits) + len(other.digits) - 1):
            total = [0] * len(self.digits[0])
            for i, digit in enumerate(self.digits):
                if 0 <= place - i < len(other.digits):
                    found = np.einsum("cn,cn->c", digit, other.digits[place - i]).tolist()
                    total = [a + b for a, b in zip(total, found, strict=True)]
            totals.append(total)
        return self._joined(totals, self.exponent + other.exponent)

    @staticmethod
    def _joined(totals: list[list[int]], exponent: int) -> list[Fraction]:
        scale = Fraction(2) ** exponent
        return [
            scale * sum(total << (DIGIT * place) for place, total in enumerate(channel))
            for channel in zip(*totals, strict=True)
        ]


class Statistics(NamedTuple):
    """Mean and biased variance of each channel."""

    mean: list[Fraction]
    var: list[Fraction]


def fractions(values: Sequence[Any] | NDArray[Any]) -> list[Fraction]:
    """Return numbers exactly."""
    return [Fraction(float(value)) for value in values]


def statistics(x: Floats) -> Statistics:
    """Return the exact statistics of rows of elements."""
    n, limbs = x.shape[1], Limbs(x)
    means = [total / n for total in limbs.sums()]
    squares = limbs.products(limbs)
    return Statistics(
        means, [total / n - mean**2 for total, mean in zip(squares, means, strict=True)]
    )


def invstd(var: list[Fraction], eps: float) -> list[Fraction]:
    """Return 1 / sqrt(var + eps), to 2^-190 of it."""
    return [_inverse_root(value + Fraction(eps)) for value in var]


def _inverse_root(value: Fraction) -> Fraction:
    size = value.numerator.bit_length() - value.denominator.bit_length()
    shift = ROOT_BITS + max(0, size // 2 + 1)
    return Fraction(math.isqrt((value.denominator << 2 * shift) // value.numerator), 1 << shift)


def paired(values: list[Fraction]) -> Pair:
    """Return fractions as a channel vector of pairs."""
    high = [float(value) for value in values]
    low = [float(value - Fraction(head)) for value, head in zip(values, high, strict=True)]
    return Pair(np.array(high)[:, None], np.array(low)[:, None])


def single(values: Floats) -> Pair:
    """Return numbers of float64 as pairs."""
    return Pair(values, np.zeros_like(values))


def add(a: Pair, b: Pair) -> Pair:
    """Return a + b."""
    high, low = _two_sum(a.high, b.high)
    other, rest = _two_sum(a.low, b.low)
    high, low = _fast_two_sum(high, low + other)
    return Pair(*_fast_two_sum(high, low + rest))


def negative(a: Pair) -> Pair:
    """Return -a."""
    return Pair(-a.high, -a.low)


def multiply(a: Pair, b: Pair) -> Pair:
    """Return a * b."""
    high, low = _two_product(a.high, b.high)
    return Pair(*_fast_two_sum(high, low + (a.high * b.low + a.low * b.high)))


def output(x: Floats, mean: Pair, scale: Pair, bias: Floats) -> Pair:
    """Return (x - mean) * scale + bias for rows of elements."""
    off = add(single(x), negative(mean))
    return add(multiply(off, scale), single(bias[:, None]))


class Gradient(NamedTuple):
    """What dx = scale * (g - shift - (x - mean) * slope) is made from, and the other gradients."""

    scale: Pair
    shift: Pair
    slope: Pair
    dweight: list[Fraction]
    dbias: list[Fraction]


def gradient(x: Floats, g: Floats, found: Statistics, weight: Floats, eps: float) -> Gradient:
    """Return the gradient of training, for rows of elements and of gradients."""
    n, limbs = x.shape[1], Limbs(g)
    totals, products = limbs.sums(), limbs.products(Limbs(x))
    inverse = invstd(found.var, eps)
    off = [p - mean * total for p, mean, total in zip(products, found.mean, totals, strict=True)]
    return Gradient(
        paired([w * inv for w, inv in zip(fractions(weight), inverse, strict=True)]),
        paired([total / n for total in totals]),
        paired([v / n / (var + Fraction(eps)) for v, var in zip(off, found.var, strict=True)]),
        [v * inv for v, inv in zip(off, inverse, strict=True)],
        totals,
    )


def gradient_input(x: Floats, g: Floats, mean: Pair, made: Gradient) -> Pair:
    """Return dx for rows of elements and of gradients."""
    off = multiply(add(single(x), negative(mean)), made.slope)
    common = add(off, made.shift)
    return multiply(add(single(g), negative(common)), made.scale)


def distance(found: Floats, exact: Pair) -> Floats:
    """Return |found - exact|, to 2^-52 of it."""
    return np.abs((found - exact.high) - exact.low)


def _two_sum(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """Return a + b and what rounding took from it (Knuth)."""
    total = a + b
    other = total - a
    return total, (a - (total - other)) + (b - other)


def _fast_two_sum(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """The same where |a| >= |b| (Dekker)."""
    total = a + b
    return total, b - (total - a)


def _two_product(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """Return a * b and what rounding took from it (Dekker, Veltkamp)."""
    product = a * b
    a_high, b_high = _head(a), _head(b)
    a_low, b_low = a - a_high, b - b_high
    rest = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, rest


def _head(a: Floats) -> Floats:
    moved = a * 134217729.0  # 2^27 + 1
    return moved - (moved - a)
