"""The exact arithmetic behind the accuracy report, against decimals of 90 digits."""

from __future__ import annotations

import decimal
from decimal import Decimal
from fractions import Fraction

import exact
import numpy as np
import pytest

EPS = 1e-5
CONTEXT = decimal.Context(prec=90)

# (rows, elements, mean/std, dtype)
GRIDS = [
    (3, 2, 1.0, np.float64),
    (3, 17, 1e3, np.float64),
    (2, 500, 1e7, np.float64),
    (4, 300, 1.0, np.float32),
    (2, 41, 1e7, np.float32),
    (3, 64, 30.0, np.float16),
]


def draw(rng, rows, n, ratio, dtype):
    """Return x and g of a dtype as float64, with elements that are far smaller than others."""
    x = rng.normal(ratio, 1.0, (rows, n)) * rng.choice([-1.0, 1.0], (rows, 1))
    x[:, 0] *= 2.0**-20
    return x.astype(dtype).astype(np.float64), rng.normal(size=x.shape).astype(dtype).astype(float)


def decimals(values):
    return [[Decimal(float(value)) for value in row] for row in values]


def as_decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / Decimal(value.denominator)


def near(found: exact.Pair, expected, scale):
    """Check pairs against decimals, to 2^-98 of ``scale``."""
    for i, row in enumerate(expected):
        for j, value in enumerate(row):
            error = abs(Decimal(float(found.high[i, j])) + Decimal(float(found.low[i, j])) - value)
            assert error <= Decimal(2) ** -98 * scale(i, j)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_sums_are_exact(rng, grid):
    x, g = draw(rng, *grid)
    limbs, other = exact.Limbs(x), exact.Limbs(g)
    for row, total, product in zip(
        zip(x, g, strict=True), limbs.sums(), limbs.products(other), strict=True
    ):
        terms = [[Fraction(float(value)) for value in part] for part in row]
        assert total == sum(terms[0])
        assert product == sum(a * b for a, b in zip(*terms, strict=True))


def test_zeros_and_one_number():
    assert exact.Limbs(np.zeros((2, 3))).sums() == [0, 0]
    tiny = exact.Limbs(np.array([[5e-324, 1.5]]))
    assert tiny.sums() == [Fraction(5e-324) + Fraction(3, 2)]
    assert tiny.products(tiny) == [Fraction(5e-324) ** 2 + Fraction(9, 4)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_output_and_gradient(rng, grid):
    x, g = draw(rng, *grid)
    rows, n = x.shape
    weight, bias = rng.normal(size=(2, rows))
    found = exact.statistics(x)
    mean = exact.paired(found.mean)
    inverse = exact.invstd(found.var, EPS)
    scale = exact.paired([w * i for w, i in zip(exact.fractions(weight), inverse, strict=True)])
    y = exact.output(x, mean, scale, bias)
    made = exact.gradient(x, g, found, weight, EPS)
    dx = exact.gradient_input(x, g, mean, made)
    with decimal.localcontext(CONTEXT):
        wide, wide_g = decimals(x), decimals(g)
        means = [sum(row) / n for row in wide]
        offs = [[value - m for value in row] for row, m in zip(wide, means, strict=True)]
        inverses = [
            1 / (sum(d * d for d in row) / n + Decimal(EPS)).sqrt() for row in offs
        ]  # fmt: skip
        w, b = ([Decimal(float(v)) for v in vector] for vector in (weight, bias))
        near(
            y,
            [[d * w[i] * inverses[i] + b[i] for d in row] for i, row in enumerate(offs)],
            lambda i, j: abs(w[i]) * inverses[i] * (abs(wide[i][j]) + abs(means[i])) + abs(b[i]),
        )
        sums = [sum(row) for row in wide_g]
        spread = [
            sum(a * d for a, d in zip(*pair, strict=True)) * inverses[i]
            for i, pair in enumerate(zip(wide_g, offs, strict=True))
        ]
        for i in range(rows):
            assert as_decimal(made.dbias[i]) == sums[i]
            assert abs(as_decimal(made.dweight[i]) - spread[i]) <= Decimal(10) ** -50
        near(
            dx,
            [
                [
                    w[i] * inverses[i] * (a - (sums[i] + d * inverses[i] * spread[i]) / n)
                    for a, d in zip(*pair, strict=True)
                ]
                for i, pair in enumerate(zip(wide_g, offs, strict=True))
            ],
            lambda i, j: (
                abs(w[i])
                * inverses[i]
                * (1 + abs(wide_g[i][j]) + abs(sums[i]))
                * (1 + inverses[i] * (abs(wide[i][j]) + abs(means[i])) * (1 + abs(spread[i])))
            ),
        )
