"""The gradients of a layer: their values, how they add up, and when there are none."""

from __future__ import annotations

import numpy as np
import pytest
from backends_here import over_backends
from strided import LAYOUTS
from trained_layers import SHAPE, draw, trained

import bnfast
import bnfast.functional as F
from bnfast.testing.bounds import assert_same_bits


@over_backends
@pytest.mark.parametrize("activation", [None, "relu"])
def test_backward_is_that_of_the_function(rng, activation, backend):
    x, residual, dy = draw(rng), draw(rng), draw(rng)
    layer = trained(rng, activation=activation, backend=backend)
    y = layer(x, residual=residual)
    dx = layer.backward(dy)
    vectors = {"weight": layer.weight, "bias": layer.bias}
    options = {"activation": activation, "backend": backend}
    _, mean, invstd = F.batch_norm_with_stats(x, **vectors, residual=residual, **options)
    expected = F.batch_norm_backward(
        dy, x, layer.weight, mean, invstd, y=y, residual=True, **options
    )
    assert_same_bits("dx", dx, expected.dx)
    assert_same_bits("grad_weight", layer.grad_weight, expected.dweight.astype(np.float32))
    assert_same_bits("grad_bias", layer.grad_bias, expected.dbias.astype(np.float32))
    assert_same_bits("grad_residual", layer.grad_residual, expected.dresidual)


def test_gradient_of_the_loss_by_finite_differences(rng):
    """Of sum(c * relu(bn(x) + r)): a direction in each argument, in float64."""
    arguments = [draw(rng, (3, 2, 2, 3), np.float64), rng.normal(size=(3, 2, 2, 3))]
    arguments += [rng.normal(size=2), rng.normal(size=2)]
    slope = rng.normal(size=(3, 2, 2, 3))
    layer = bnfast.BatchNorm2d(2, dtype=np.float64, activation="relu")

    def loss(x, residual, weight, bias):
        layer.weight, layer.bias = weight, bias
        return float((slope * layer(x, residual=residual)).sum())

    # Keep every place away from the kink of the ReLU, where a difference is no derivative.
    plain = bnfast.BatchNorm2d(2, dtype=np.float64)
    plain.weight, plain.bias = arguments[2:]
    arguments[1] += 0.01 * np.sign(plain(arguments[0]) + arguments[1])
    loss(*arguments)
    gradients = [layer.backward(slope), layer.grad_residual, layer.grad_weight, layer.grad_bias]
    for index, gradient in enumerate(gradients):
        direction, step = rng.normal(size=gradient.shape), 1e-6
        moved = [
            [a + sign * step * direction if i == index else a for i, a in enumerate(arguments)]
            for sign in (1, -1)
        ]
        numeric = (loss(*moved[0]) - loss(*moved[1])) / (2 * step)
        # A central difference is off by step^2, and by the rounding of the loss over the step.
        np.testing.assert_allclose((gradient * direction).sum(), numeric, rtol=1e-6, atol=1e-7)


def test_gradients_add_up_until_zero_grad(rng):
    layer = trained(rng)
    x, dy = draw(rng), draw(rng)
    layer(x)
    first = layer.backward(dy)
    weight, bias = layer.grad_weight.copy(), layer.grad_bias.copy()
    assert weight.dtype == np.float32
    assert_same_bits("dx of the second call", layer.backward(dy), first)
    np.testing.assert_array_equal(layer.grad_weight, 2 * weight)
    np.testing.assert_array_equal(layer.grad_bias, 2 * bias)
    layer.zero_grad()
    assert layer.grad_weight is layer.grad_bias is layer.grad_residual is None
    layer.backward(dy)
    np.testing.assert_array_equal(layer.grad_weight, weight)


def test_grad_residual_is_that_of_the_last_call(rng):
    layer = bnfast.BatchNorm2d(3)
    x = draw(rng)
    layer(x, residual=x)
    layer.backward(x)
    assert_same_bits("grad_residual", layer.grad_residual, x)
    layer(x)
    layer.backward(x)
    assert layer.grad_residual is None


def test_an_eval_call_leaves_the_saved_forward_alone(rng):
    layer, undisturbed = bnfast.BatchNorm2d(3), bnfast.BatchNorm2d(3)
    x, dy = draw(rng), draw(rng)
    layer(x)
    undisturbed(x)
    layer.eval()(draw(rng))
    assert_same_bits("dx", layer.backward(dy), undisturbed.backward(dy))
    bare = bnfast.BatchNorm2d(3, track_running_stats=False).eval()
    bare(x)
    with pytest.raises(RuntimeError, match="no training forward yet"):
        bare.backward(dy)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_written_after_the_forward_do_not_change_its_gradient(rng, dtype):
    layer, untouched = trained(rng, dtype=dtype), bnfast.BatchNorm2d(3, dtype=dtype)
    untouched.load_state_dict(layer.state_dict())
    x, dy = draw(rng), draw(rng)
    layer(x)
    untouched(x)
    layer.weight *= 3
    assert_same_bits("dx", layer.backward(dy), untouched.backward(dy))


def test_backward_without_a_forward():
    with pytest.raises(RuntimeError, match=r"^no gradient: there was no training forward yet$"):
        bnfast.BatchNorm2d(3).backward(np.ones(SHAPE, np.float32))


@pytest.mark.parametrize("lies", ["axes0123", "cut_out", "backwards"])
def test_backward_after_the_input_was_overwritten(rng, lies):
    layer = bnfast.BatchNorm2d(3)
    x = LAYOUTS[lies](draw(rng))
    dy = draw(rng)
    layer(x.copy())
    layer(x, out=x)
    with pytest.raises(RuntimeError, match=r"^no gradient: its input was overwritten by out=x$"):
        layer.backward(dy)
    assert layer.grad_weight is None
    layer(x)
    assert layer.backward(dy).shape == SHAPE


def test_backward_after_out_that_lies_beside_the_input(rng):
    """Two arrays can share a range of addresses without sharing an element."""
    buffer = np.empty((*SHAPE, 2), np.float32)
    x, out = buffer[..., 0], buffer[..., 1]
    x[...] = draw(rng)
    layer, apart = bnfast.BatchNorm2d(3), bnfast.BatchNorm2d(3)
    dy = draw(rng)
    apart(x.copy())
    layer(x, out=out)
    assert_same_bits("dx", layer.backward(dy), apart.backward(dy))


def test_backward_after_out_is_the_residual(rng):
    layer, apart = (bnfast.BatchNorm2d(3, activation="relu") for _ in range(2))
    x, residual, dy = draw(rng), draw(rng), draw(rng)
    apart(x, residual=residual)
    layer(x, residual=residual, out=residual)
    assert_same_bits("dx", layer.backward(dy), apart.backward(dy))
    assert_same_bits("dresidual", layer.grad_residual, apart.grad_residual)
