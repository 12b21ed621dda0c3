"""Layers to test: random inputs, layers that have trained, and equality of their states."""

from __future__ import annotations

import numpy as np

import bnfast

VECTORS = ("weight", "bias", "running_mean", "running_var")
SHAPE = (4, 3, 2, 8)


def draw(rng, shape=SHAPE, dtype=np.float32):
    return rng.normal(3, 2, shape).astype(dtype)


def trained(rng, calls=2, **arguments):
    """Return a layer of random parameters after some training calls."""
    layer = bnfast.BatchNorm2d(3, **arguments)
    for name in VECTORS[:2]:
        if getattr(layer, name) is not None:
            setattr(layer, name, rng.normal(size=3))
    for _ in range(calls):
        layer(draw(rng))
    return layer


def assert_same_state(one, other):
    assert list(one) == list(other)
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], name)
        assert value.dtype == other[name].dtype
