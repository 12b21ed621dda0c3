"""What layers make of inputs that `bnfast.testing` draws, against its bounds."""

from __future__ import annotations

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
