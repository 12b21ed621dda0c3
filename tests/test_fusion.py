"""Batch norm folded into a convolution or a linear layer: exact, rounded once, dtypes kept."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

import bnfast

try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None

needs_bfloat16 = pytest.mark.skipif(ml_dtypes is None, reason="ml_dtypes is not installed")
DTYPES = [
    "float16",
    "float32",
    "float64",
    pytest.param("bfloat16", marks=needs_bfloat16),
]
UNITS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


def batch_norm_of(rng, count, dtype=np.float32):
    """Return running mean, running variance, weight and bias."""
    mean, weight, bias = rng.normal(size=(3, count)).astype(dtype)
    return mean, rng.uniform(0.1, 4, count).astype(dtype), weight, bias


def expected(w, b, mean, var, eps, weight, bias, axis):
    """Return the fused parameters in extended precision."""
    long = np.longdouble
    scale = weight.astype(long) / np.sqrt(var.astype(long) + long(eps))
    across = scale.reshape([-1 if at == axis else 1 for at in range(w.ndim)])
    return w.astype(np.float64) * across, (b - mean.astype(long)) * scale + bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "transpose"),
    [((4, 3, 5), False), ((4, 1, 3, 3), False), ((3, 4, 2, 2), True), ((4, 2, 2, 2, 2), False)],
)
def test_fused_weights_of_a_convolution(rng, dtype, shape, transpose):
    w = rng.normal(size=shape).astype(dtype)
    b = rng.normal(size=4).astype(np.float32)
    norm = batch_norm_of(rng, 4)
    fused_w, fused_b = bnfast.fuse_conv_bn_weights(
        w, b, *norm[:2], 1e-3, *norm[2:], transpose=transpose
    )
    exact_w, exact_b = expected(w, b, *norm[:2], 1e-3, *norm[2:], axis=int(transpose))
    assert (fused_w.dtype, fused_b.dtype) == (w.dtype, b.dtype)
    assert (fused_w.shape, fused_b.shape) == (shape, (4,))
    # One rounding to the dtype, and a few in float64.
    unit = UNITS[dtype] + 8 * 2.0**-53
    smallest = 1e-7 if dtype == "float16" else 0.0  # its numbers become subnormal at 6e-5
    assert (np.abs(fused_w.astype(np.float64) - exact_w) <= unit * np.abs(exact_w) + smallest).all()
    size = np.abs(b - norm[0]) * np.abs(norm[2]) / np.sqrt(norm[1]) + np.abs(norm[3])
    bound = 2.0**-24 * np.abs(exact_b) + 8 * 2.0**-53 * size
    assert (np.abs(fused_b - exact_b) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_weights_of_a_linear_layer_are_those_of_a_convolution(rng, dtype):
    w = rng.normal(size=(4, 7)).astype(dtype)
    norm = batch_norm_of(rng, 4)
    pair = bnfast.fuse_linear_bn_weights(w, None, *norm[:2], 1e-3, *norm[2:])
    other = bnfast.fuse_conv_bn_weights(w[..., None], None, *norm[:2], 1e-3, *norm[2:])
    assert pair[0].dtype == pair[1].dtype == w.dtype
    np.testing.assert_array_equal(pair[0], other[0][..., 0])
    np.testing.assert_array_equal(pair[1], other[1])


def test_none_is_neutral(rng):
    w = rng.normal(size=(4, 3, 2, 2))
    mean, var, _, _ = batch_norm_of(rng, 4)
    bare = bnfast.fuse_conv_bn_weights(w, None, mean, var, 1e-5, None, None)
    full = bnfast.fuse_conv_bn_weights(w, np.zeros(4), mean, var, 1e-5, np.ones(4), np.zeros(4))
    for one, other in zip(bare, full, strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.abs(bare[1]).min() > 0  # the mean is subtracted where the convolution has no bias


def test_the_fused_layer_computes_what_the_two_do(rng):
    """A transposed convolution of stride 1 over one pixel is a product of matrices."""
    w, b = rng.normal(size=(3, 4)), rng.normal(size=4)
    x = rng.normal(size=(10, 3))
    layer = bnfast.BatchNorm1d(4, dtype=np.float64)
    layer.weight, layer.bias = rng.normal(size=(2, 4))
    layer(x @ w + b)
    layer.eval()
    norm = (layer.running_mean, layer.running_var, layer.eps, layer.weight, layer.bias)
    fused_w, fused_b = bnfast.fuse_conv_bn_weights(w[..., None], b, *norm, transpose=True)
    np.testing.assert_allclose(
        x @ fused_w[..., 0] + fused_b, layer(x @ w + b), rtol=0, atol=1e-13 * np.abs(w).sum()
    )
    fused_w, fused_b = bnfast.fuse_linear_bn_weights(w.T, b, *norm)
    np.testing.assert_allclose(
        x @ fused_w.T + fused_b, layer(x @ w + b), rtol=0, atol=1e-13 * np.abs(w).sum()
    )


@needs_bfloat16
def test_bfloat16_is_rounded_once():
    """Just above the middle of 1 and its successor; by way of float32 that would become 1."""
    w = np.ones((1, 1), ml_dtypes.bfloat16)
    for scale in (1 + 2.0**-8 + 2.0**-40, -1 - 2.0**-8 - 2.0**-40, 1 + 2.0**-8 - 2.0**-40):
        fused, _ = bnfast.fuse_linear_bn_weights(
            w, None, np.zeros(1), np.ones(1), 0.0, np.array([scale]), None
        )
        nearest = round(Fraction(scale) * 2**7) / 2**7
        assert float(fused[0, 0]) == nearest


@needs_bfloat16
def test_bfloat16_of_many_sizes(rng):
    exact = rng.normal(size=500) * 2.0 ** rng.uniform(-140, 125, 500)
    fused, _ = bnfast.fuse_linear_bn_weights(
        np.ones((500, 1), ml_dtypes.bfloat16), None, np.zeros(500), np.ones(500), 0.0, exact, None
    )
    for value, got in zip(exact, fused[:, 0].astype(np.float64), strict=True):
        unit = Fraction(2) ** max(int(np.frexp(value)[1]) - 8, -133)
        assert Fraction(got) == round(Fraction(value) / unit) * unit


NORM = (np.zeros(4), np.ones(4), 1e-5, None, None)
BAD = {
    "integer weight": (
        (np.ones((4, 3), int), None, *NORM),
        TypeError,
        "linear_w should be floating, got dtype int64",
    ),
    "dimensions": (
        (np.ones((4, 3, 1)), None, *NORM),
        ValueError,
        "linear_w should have shape (C, in), got (4, 3, 1)",
    ),
    "bias": (
        (np.ones((4, 3)), np.ones(3), *NORM),
        ValueError,
        "linear_b should contain 4 elements not 3: expected shape (4,), got (3,)",
    ),
    "integer bias": (
        (np.ones((4, 3)), np.ones(4, int), *NORM),
        TypeError,
        "linear_b should be floating, got dtype int64",
    ),
    "mean": (
        (np.ones((4, 3)), None, np.ones(3), *NORM[1:]),
        ValueError,
        "bn_rm should contain 4 elements not 3: expected shape (4,), got (3,)",
    ),
    "no mean": (
        (np.ones((4, 3)), None, None, *NORM[1:]),
        TypeError,
        "bn_rm should hold real numbers, got dtype object",
    ),
    "nan": (
        (np.ones((4, 3)), None, np.zeros(4), np.array([1, 1, np.nan, 1]), *NORM[2:]),
        ValueError,
        "bn_rv should hold numbers, got NaN in 1 of 4 channels, first in channel 2",
    ),
    "negative": (
        (np.ones((4, 3)), None, np.zeros(4), np.array([1, 1, -2.0, 1]), *NORM[2:]),
        ValueError,
        "bn_rv should be above -bn_eps, -1e-05, got -2.0",
    ),
    "eps": (
        (np.ones((4, 3)), None, *NORM[:2], -1.0, None, None),
        ValueError,
        "batch_norm eps must be finite and non-negative, but got -1.0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_fused(case):
    arguments, error, message = BAD[case]
    with pytest.raises(error) as caught:
        bnfast.fuse_linear_bn_weights(*arguments)
    assert str(caught.value) == message


def test_a_convolution_has_two_dimensions_at_least():
    with pytest.raises(
        ValueError, match=r"^conv_w should have at least 2 dimensions, got shape \(4,\)"
    ):
        bnfast.fuse_conv_bn_weights(np.ones(4), None, *NORM)


def test_the_axis_of_the_channels():
    w = np.ones((4, 3, 1))
    assert bnfast.fuse_conv_bn_weights(w, None, *NORM)[1].shape == (4,)
    with pytest.raises(ValueError, match="bn_rm should contain 3 elements not 4"):
        bnfast.fuse_conv_bn_weights(w, None, *NORM, transpose=True)
