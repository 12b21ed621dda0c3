"""Random arrays in random chunks, and what is computed of them on any scheduler."""

from __future__ import annotations

import dask
import dask.array as da
import numpy as np
from exact_forward import assert_normalised, exact_moments

import bnfast.functional as F
from bnfast.interop import dask as bnd
from bnfast.testing.cases import draw


def chunks_of(rng, shape):
    """Cut every axis in up to three pieces, anywhere."""
    pieces = []
    for length in shape:
        cuts = rng.choice(np.arange(1, length), rng.integers(0, min(length, 3)), replace=False)
        pieces.append(tuple(int(n) for n in np.diff([0, *sorted(cuts), length])))
    return tuple(pieces)


class Draw:
    """An array with parameters, in memory and in chunks."""

    def __init__(self, rng, number):
        shape = tuple(
            int(n) for n in (rng.integers(2, 24), rng.integers(1, 7), rng.integers(1, 40))
        )
        inputs = draw(rng, shape, (np.float32, np.float64)[number % 2])
        if rng.integers(2):
            inputs = inputs.replace(residual=None)
        self.inputs = inputs
        self.relu, self.training = (bool(value) for value in rng.integers(2, size=2))
        self.x = da.from_array(inputs.x, chunks=chunks_of(rng, shape))
        self.residual = None
        if inputs.residual is not None:
            self.residual = da.from_array(inputs.residual, chunks=chunks_of(rng, shape))

    def call(self, function, x, residual):
        inputs = self.inputs
        running = (None, None) if self.training else (inputs.mean, inputs.var)
        return function(
            x,
            *running,
            inputs.weight,
            inputs.bias,
            self.training,
            eps=inputs.eps,
            residual=residual,
            activation="relu" if self.relu else None,
        )

    def check(self, moments, y):
        """Check y and the moments; return how far those in memory are from them, in ulps."""
        whole = F.moments(self.inputs.x)
        assert moments.count == whole.count
        found, kernels = np.array([moments.mean, moments.m2]), np.array([whole.mean, whole.m2])
        exact = exact_moments(self.inputs.x)
        ulp = np.spacing(abs(exact))
        assert np.max(abs(found - exact) / ulp) <= 1
        ulps = abs(found - kernels) / ulp
        in_memory = self.call(F.batch_norm, self.inputs.x, self.inputs.residual)
        assert y.dtype == in_memory.dtype
        assert y.shape == in_memory.shape
        if not self.training:
            np.testing.assert_array_equal(y, in_memory)
        assert_normalised(y, self.inputs, relu=self.relu, training=self.training)
        return ulps.ravel()


def check_all(rng, amount, **scheduler):
    """Compute so many arrays on a scheduler and check them.

    Moments are the exact ones to an ulp, and those of the call in memory to 2 ulps, but for what
    its own sums round: in 35,000 channels of such arrays, one m2 of `cython` was 2.5 ulps off.
    """
    draws = [Draw(rng, number) for number in range(amount)]
    moments = dask.compute(*[bnd.moments(drawn.x) for drawn in draws], **scheduler)
    lazy = [drawn.call(bnd.batch_norm, drawn.x, drawn.residual) for drawn in draws]
    computed = zip(draws, moments, dask.compute(*lazy, **scheduler), strict=True)
    ulps = np.concatenate([drawn.check(whole, y) for drawn, whole, y in computed])
    assert np.sum(ulps > 2) <= 1 + len(ulps) // 5000
    assert ulps.max() <= 4
