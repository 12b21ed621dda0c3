"""What layers make of inputs that `bnfast.testing` draws, against its bounds; exact moments."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from bnfast import registry
from bnfast.testing import reference
from bnfast.testing.bounds import assert_output
from bnfast.testing.reference import rows, wide


def assert_normalised(y, inputs, *, relu, training):
    """Check y of inputs in one of the kernels' forms against the bound of its dtype."""
    x = wide(rows(inputs.x))
    mean, var = wide(inputs.mean), wide(inputs.var)
    if training:
        exact = reference.moments(x)
        mean, var = exact.mean, exact.m2 / x.shape[1]
    xhat = reference.standardize(x, mean, var, inputs.eps)
    residual = None if inputs.residual is None else wide(rows(inputs.residual))
    expected = reference.affine(xhat, wide(inputs.weight), wide(inputs.bias), residual, relu=relu)
    fma = registry.choose(None).instruction_set() != "baseline"
    deviations = mean / np.sqrt(var + wide(inputs.eps))
    assert_output(y, expected, xhat, inputs, deviations, fma=fma)


def exact_moments(x):
    """Return mean and m2 of the channels of x, correctly rounded."""
    rounded = []
    for channel in np.moveaxis(x, 1, 0):
        ratios = [value.as_integer_ratio() for value in channel.ravel().tolist()]
        unit, n = max(below for _, below in ratios), len(ratios)  # powers of two
        values = [above * (unit // below) for above, below in ratios]
        total, squares = sum(values), sum(value * value for value in values)
        deviations = n * squares - total * total
        rounded.append([Fraction(total, n * unit), Fraction(deviations, n * unit * unit)])
    return np.array(rounded, float).T
