"""How exact y is through the public API, from mean/std = 1 to 1e6, and where sums are exact.

The reference is `bnfast.testing.reference`, in more digits than float64 has. Errors are counted in
ulps of `bnfast.spec.output_scale`; the largest of each backend is shown when the file is done.
"""

from __future__ import annotations

from collections import defaultdict

import ml_dtypes
import numpy as np
import pytest
from backends_here import over_backends, y_ulps
from exact_forward import exact_moments
from strided import permuted

import bnfast
import bnfast.functional as F
from bnfast import spec
from bnfast.testing import reference
from bnfast.testing.reference import rows, wide

RATIOS = (1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
EPS = 1e-5
FORMS = {"NCHW": (0, 1, 2, 3), "channels-last": (0, 2, 3, 1)}


@pytest.fixture(scope="module")
def largest(request):
    """Collect the largest error by name, and write the table at the end."""
    found = defaultdict(float)
    yield found
    plugins = request.config.pluginmanager
    reporter = plugins.get_plugin("terminalreporter")
    with plugins.get_plugin("capturemanager").global_and_fixture_disabled():
        reporter.ensure_newline()
        for name, value in found.items():
            reporter.write_line(f"largest error of y, {name}: {value:.3f}")


def bound_of(backend, dtype):
    return spec.Y_UNITS_FLOAT64 if dtype == np.float64 else y_ulps(backend)


def ulps_of_moments(x, backend):
    """Return how far mean or m2 of a channel is from the exact one, in ulps."""
    found, exact = F.moments(x, backend=backend), exact_moments(x)
    return np.max(np.abs([found.mean, found.m2] - exact) / np.spacing(np.abs(exact)))


def draw(rng, shape, ratio, dtype):
    """Return x with this mean/std in every channel, weight and bias; all of either sign."""
    channels = shape[1]
    signs = rng.choice([-1.0, 1.0], (3, channels))
    sizes = 10.0 ** rng.uniform(-2, 2, (3, channels))
    std = sizes[0][:, None, None]
    x = std * rng.normal(signs[0][:, None, None] * ratio, 1.0, shape)
    return x.astype(dtype), signs[1] * sizes[1], signs[2] * sizes[2]


def errors(y, x, mean, var, weight, bias, residual=None):
    """Return the errors of y in units of the bound, for exact ``mean`` and ``var``."""
    xhat = reference.standardize(wide(rows(x)), mean, var, EPS)
    added = None if residual is None else wide(rows(residual))
    exact = reference.affine(xhat, wide(weight), wide(bias), added, relu=False)
    t = spec.output_scale(
        xhat.astype(np.float64),
        weight[:, None],
        bias[:, None],
        0.0 if residual is None else rows(residual).astype(np.float64),
        exact.astype(np.float64),
    )
    # Before a residual is added, the affine result is rounded; it may be the larger of the two.
    t = np.maximum(t, np.abs(xhat.astype(np.float64) * weight[:, None] + bias[:, None]))
    if y.dtype == np.float32:
        unit = np.spacing(t.astype(np.float32)).astype(np.float64)
    else:
        ratio = np.abs((mean / np.sqrt(var + wide(EPS))).astype(np.float64))
        unit = 2.0**-53 * (1.0 + ratio)[:, None] * t
    return np.abs(wide(rows(y)) - exact).astype(np.float64) / unit


@over_backends
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ratio", RATIOS)
def test_mean_over_std(rng, ratio, training, form, dtype, backend, largest, record_property):
    x, weight, bias = draw(rng, (5, 24, 17, 23), ratio, dtype)
    exact = reference.moments(wide(rows(x)))
    mean, var = exact.mean, exact.m2 / (x.size // 24)
    layer = bnfast.BatchNorm2d(24, EPS, dtype=np.float64, backend=backend).train(training)
    layer.weight, layer.bias = weight, bias
    if not training:
        # Statistics of other batches: near these, and with more digits than float32 has.
        std = np.sqrt(var.astype(np.float64))
        layer.running_mean = mean.astype(np.float64) + std * rng.uniform(-1, 1, 24)
        layer.running_var = np.square(std) * rng.uniform(0.5, 2, 24)
        mean, var = wide(layer.running_mean), wide(layer.running_var)
    y = layer(permuted(FORMS[form])(x))
    worst = float(errors(y, x, mean, var, weight, bias).max())
    unit = "ulp" if dtype == np.float32 else "units of 2^-53 (1 + |mean|/std) t"
    mode = "train" if training else "eval"
    name = f"{backend} {np.dtype(dtype)} {mode}, {unit}"
    largest[name] = max(largest[name], worst)
    record_property("largest_error", worst)
    assert worst <= bound_of(backend, dtype)


@over_backends
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_float32_statistics(rng, ratio, form, backend):
    """The same with a float32 layer, a residual, and the functional form."""
    x, weight, bias = draw(rng, (6, 40, 9, 11), ratio, np.float32)
    weight, bias = weight.astype(np.float32), bias.astype(np.float32)
    mean = rows(x).mean(axis=1, dtype=np.float64).astype(np.float32)
    var = rows(x).var(axis=1, dtype=np.float64).astype(np.float32)
    residual = rng.normal(0, 30, x.shape).astype(np.float32)
    y = F.batch_norm(
        permuted(FORMS[form])(x), mean, var, weight, bias, residual=residual, backend=backend
    )
    vectors = [wide(mean), wide(var), weight.astype(np.float64), bias.astype(np.float64)]
    assert errors(y, x, *vectors, residual).max() <= bound_of(backend, np.float32)


@over_backends
@pytest.mark.parametrize("shape", [(12, 200, 2), (5, 200, 5), (3, 200, 15), (16, 200)], ids=str)
def test_moments_of_few_float32(rng, shape, backend):
    """What squares are summed about is near the mean, whatever comes first."""
    x = rng.normal(3, 1, shape).astype(np.float32)
    x[0] += 6
    x[1:4] += 2
    assert ulps_of_moments(x, backend) <= (3 if backend == "numpy" else 2)


@over_backends
@pytest.mark.parametrize("shape", [(30, 400, 3), (14, 400)], ids=str)
def test_moments_of_few_float32_are_mostly_exact(rng, shape, backend):
    """Squares are summed about a float32, away from 0: they do not round. NumPy's own do."""
    x = rng.normal(30, 1, shape).astype(np.float32)
    exact = np.mean(F.moments(x, backend=backend).m2 == exact_moments(x)[1])
    assert exact > (0.3 if backend == "numpy" else 0.9)


@over_backends
def test_moments_of_few_channels(rng, backend):
    """Rows of few channels are merged from hundreds of sums, and hardly anything rounds."""
    worst = max(ulps_of_moments(rng.normal(3, 1, (63, 2)), backend) for _ in range(100))
    assert worst <= 3


@over_backends
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exact_data_give_exact_statistics(rng, form, dtype, backend):
    """Numbers in pairs about the mean, a power of two of them, with few digits: no sum rounds.

    So the moments are exact in whatever order numbers are summed, but for the few roundings of
    merging parts whose count is no power of two. With var + eps = 4 and a power of two as weight,
    y is exact.
    """
    few = {"rtol": 2.0**-50, "atol": 0.0}
    # A mean may be drawn as 0, and is then off by roundings of the deviations, which go up to 2.
    few_of_2 = {"rtol": 2.0**-50, "atol": 2.0**-49}
    half = rng.integers(-512, 513, (4, 5, 16, 32)) / 256.0
    deviations = np.concatenate([half, -half]).astype(np.float64)
    mean = rng.integers(-1000, 1001, 5) * 4.0
    x = (deviations + mean[:, None, None]).astype(dtype)
    assert (x - mean[:, None, None] == deviations).all()
    moments = F.moments(permuted(FORMS[form])(x), backend=backend)
    m2 = np.square(deviations * 256).sum(axis=(0, 2, 3)) / 65536
    np.testing.assert_allclose(moments.mean, mean, **few_of_2)
    np.testing.assert_allclose(moments.m2, m2, **few)
    layer = bnfast.BatchNorm2d(5, momentum=1.0, dtype=np.float64, backend=backend)
    layer(permuted(FORMS[form])(x))
    np.testing.assert_allclose(layer.running_mean, mean, **few_of_2)
    np.testing.assert_allclose(layer.running_var, m2 / (x.size // 5 - 1), **few)
    vectors = (mean, np.full(5, 3.5), np.full(5, 4.0), mean)
    y = F.batch_norm(permuted(FORMS[form])(x), *vectors, eps=0.5, backend=backend)
    np.testing.assert_array_equal(y, (deviations * 2 + mean[:, None, None]).astype(dtype))


@over_backends
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [0.1, 100.0, 1e7, -3e30])
@pytest.mark.parametrize("training", [True, False])
def test_a_constant_channel_gives_the_bias(rng, form, value, training, backend):
    x = permuted(FORMS[form])(np.full((5, 7, 9, 11), value, np.float32))
    layer = bnfast.BatchNorm2d(7, dtype=np.float64, backend=backend).train(training)
    layer.weight, layer.bias = rng.normal(size=(2, 7))
    layer.running_mean = np.full(7, np.float32(value), np.float64)
    layer.running_var = np.zeros(7)
    y = layer(x)
    bias = layer.bias.astype(np.float32)[:, None, None]
    np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))
    if training:
        np.testing.assert_array_equal(layer.running_var, np.zeros(7))


@over_backends
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(1024, 100, 16), (963, 64, 17), (2048, 50, 7), (40, 30, 784)])
def test_sums_of_equal_terms_over_many_runs(rng, backend, name, shape):
    """Equal terms round the same way each time: a long chain of additions shows its length."""
    dtype = ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)
    x, dy = np.full(shape, 1.5, dtype), np.full(shape, 0.75, dtype)
    mean = rng.uniform(0.1, 0.9, shape[1])
    found = F.batch_norm_backward(dy, x, None, mean, np.ones(shape[1]), backend=backend).dweight
    exact = (wide(np.full(shape[1], 1.5)) - wide(mean)) * 0.75 * (x.size / shape[1])
    units = np.abs(wide(found) - exact) / (np.abs(exact) * 2.0**-53)
    assert units.max() <= spec.SUM_UNITS
