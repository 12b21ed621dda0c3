"""Layers from real Keras layers: the same results, and the same training under Keras's convention.

Keras runs on torch here; whichever backend it has, the numbers are Keras's.
"""

from __future__ import annotations

import os
import warnings

import numpy as np
import pytest

import bnfast

os.environ.setdefault("KERAS_BACKEND", "torch")
pytest.importorskip("torch", reason="Keras needs a backend, torch: it is not installed")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    keras = pytest.importorskip("keras", minversion="3", reason="Keras 3 is not installed")

# Keras 3.15 on torch converts its own tensors in a way that NumPy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

KINDS = {
    "BatchNorm1d": ((6, 3), (40, 3)),
    "BatchNorm2d": ((4, 2, 8, 3), (8, 4, 4, 3)),
    "BatchNorm3d": ((2, 2, 3, 4, 3), (4, 3, 2, 4, 3)),
}


def layer_of(rng, shape, **arguments):
    """Return a built Keras layer with random numbers."""
    layer = keras.layers.BatchNormalization(**arguments)
    layer.build(shape)
    for variable in layer.variables:
        if variable.shape == (3,):
            variable.assign(rng.uniform(0.5, 3, 3).astype(np.float32))
    return layer


def in_numpy(y):
    return keras.ops.convert_to_numpy(y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"center": False}, {"scale": False}, {"center": False, "scale": False, "epsilon": 0.1}],
)
def test_same_results(rng, kind, arguments):
    keras_layer = layer_of(rng, KINDS[kind][0], **arguments)
    layer = getattr(bnfast, kind).from_keras(keras_layer)
    assert layer.momentum == 0.01
    assert (layer.bias is None) == ("center" in arguments)
    assert (layer.weight is None) == ("scale" in arguments)
    x = rng.normal(2, 3, KINDS[kind][0]).astype(np.float32)
    expected = in_numpy(keras_layer(x, training=False))
    y = np.moveaxis(layer(np.moveaxis(x, -1, 1)), 1, -1)
    error = np.abs(y - expected).max() / np.abs(expected).max()
    assert error < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_ten_steps_of_training(rng, kind):
    """With m the weight of the old value, and batches of n elements per channel, Keras's moving
    variance is m**10 times the old one, and biased variances; bnfast's are unbiased.
    """
    keras_layer = layer_of(rng, KINDS[kind][0], momentum=0.8)
    layer = getattr(bnfast, kind).from_keras(keras_layer).train()
    shape = KINDS[kind][1]
    n, kept = np.prod(shape) // 3, 0.8**10
    old = layer.running_var.astype(np.float64)
    for _ in range(10):
        x = rng.normal(rng.normal(), rng.uniform(1, 3), shape).astype(np.float32)
        expected = in_numpy(keras_layer(x, training=True))
        y = np.moveaxis(layer(np.moveaxis(x, -1, 1)), 1, -1)
        assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()
    mean, var = in_numpy(keras_layer.moving_mean), in_numpy(keras_layer.moving_variance)
    biased = kept * old + (layer.running_var - kept * old) * (n - 1) / n
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(biased, var, rtol=1e-5)


def test_a_layer_that_is_not_built():
    with pytest.raises(ValueError, match=r"^BatchNormalization has no moving_mean yet: build it"):
        bnfast.BatchNorm2d.from_keras(keras.layers.BatchNormalization())
