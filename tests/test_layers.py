"""BatchNorm1d, 2d and 3d: parameters, running statistics, modes, outputs and threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from backends_here import over_backends
from trained_layers import SHAPE, VECTORS, assert_same_state, draw, trained

import bnfast
import bnfast.functional as F
from bnfast.backends import numpy_reference
from bnfast.testing.bounds import assert_same_bits

# ---- parameters and running statistics ----------------------------------------------------------


def test_a_new_layer():
    layer = bnfast.BatchNorm2d(3)
    assert layer.training is True
    assert (layer.num_features, layer.eps, layer.momentum) == (3, 1e-5, 0.1)
    assert (layer.affine, layer.track_running_stats) == (True, True)
    assert layer.num_batches_tracked == 0
    for name, value in zip(VECTORS, (1, 0, 0, 1), strict=True):
        vector = getattr(layer, name)
        assert vector.dtype == np.float32
        np.testing.assert_array_equal(vector, np.full(3, value))
    assert layer.grad_weight is layer.grad_bias is layer.grad_residual is None


@pytest.mark.parametrize(
    ("given", "stored"),
    [(None, "=f4"), (">f4", "=f4"), ("<f4", "=f4"), (">f8", "=f8"), ("<f8", "=f8")],
)
def test_dtype_of_the_vectors(rng, given, stored):
    layer = bnfast.BatchNorm2d(3, dtype=given)
    layer(draw(rng))
    for vector in (getattr(layer, name) for name in VECTORS):
        assert vector.dtype == np.dtype(stored)
        assert vector.dtype.isnative


@over_backends
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, -0.5, 1.5])
def test_running_statistics(rng, dtype, momentum, backend):
    """new = (1 - momentum) * old + momentum * batch, the variance unbiased."""
    layer = bnfast.BatchNorm2d(3, momentum=momentum, dtype=dtype, backend=backend)
    mean, var = np.zeros(3), np.ones(3)
    for calls in range(1, 4):
        x = draw(rng)
        layer(x)
        wide = x.astype(np.float64)
        batch_mean, batch_var = wide.mean(axis=(0, 2, 3)), wide.var(axis=(0, 2, 3), ddof=1)
        mean = ((1 - momentum) * mean + momentum * batch_mean).astype(dtype).astype(np.float64)
        var = ((1 - momentum) * var + momentum * batch_var).astype(dtype).astype(np.float64)
        # Both sides round once per call; the sums behind may tip that over to the next number.
        ulp = np.finfo(dtype).eps
        for own, expected in ((layer.running_mean, mean), (layer.running_var, var)):
            assert own.dtype == dtype
            assert (np.abs(own - expected) <= 16 * ulp * (1 + np.abs(expected))).all()
        mean, var = layer.running_mean.astype(np.float64), layer.running_var.astype(np.float64)
        assert layer.num_batches_tracked == calls


def test_momentum_none_is_the_cumulative_average(rng):
    layer = bnfast.BatchNorm2d(3, momentum=None, dtype=np.float64)
    batches = [draw(rng, dtype=np.float64) for _ in range(5)]
    for batch in batches:
        layer(batch)
    means = np.mean([batch.mean(axis=(0, 2, 3)) for batch in batches], axis=0)
    variances = np.mean([batch.var(axis=(0, 2, 3), ddof=1) for batch in batches], axis=0)
    np.testing.assert_allclose(layer.running_mean, means, rtol=1e-13)
    np.testing.assert_allclose(layer.running_var, variances, rtol=1e-13)


def test_an_empty_batch_counts_but_leaves_the_statistics(rng):
    layer = trained(rng)
    before = layer.state_dict()
    assert layer(np.empty((0, 3, 2, 8), np.float32)).shape == (0, 3, 2, 8)
    after = layer.state_dict()
    assert after["num_batches_tracked"] == before["num_batches_tracked"] + 1
    assert_same_state(
        {k: v for k, v in before.items() if k in VECTORS},
        {k: v for k, v in after.items() if k in VECTORS},
    )


def test_eval_uses_the_running_statistics(rng):
    layer = trained(rng)
    before = layer.state_dict()
    x = draw(rng)
    y = layer.eval()(x)
    vectors = [getattr(layer, name) for name in ("running_mean", "running_var", "weight", "bias")]
    assert_same_bits("y", y, F.batch_norm(x, *vectors))
    assert_same_state(layer.state_dict(), before)


def test_modes():
    layer = bnfast.BatchNorm2d(3)
    assert layer.eval() is layer
    assert layer.training is False
    assert layer.train() is layer
    assert layer.training is True
    assert layer.train(False).training is False


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        ({}, [*VECTORS, "num_batches_tracked"]),
        ({"affine": False}, ["running_mean", "running_var", "num_batches_tracked"]),
        ({"affine": False, "bias": True}, ["running_mean", "running_var", "num_batches_tracked"]),
        ({"bias": False}, ["weight", "running_mean", "running_var", "num_batches_tracked"]),
        ({"track_running_stats": False}, ["weight", "bias"]),
        ({"affine": False, "track_running_stats": False}, []),
    ],
)
def test_what_a_layer_lacks_has_no_key(rng, arguments, keys):
    layer = bnfast.BatchNorm2d(3, **arguments)
    assert list(layer.state_dict()) == keys
    for name in VECTORS:
        assert (getattr(layer, name) is None) == (name not in keys)
    assert (layer.num_batches_tracked is None) == ("num_batches_tracked" not in keys)
    x = draw(rng)
    y = layer(x)
    assert_same_bits("y", y, F.batch_norm(x, None, None, training=True))
    layer.backward(x)
    assert (layer.grad_weight is None) == ("weight" not in keys)
    assert (layer.grad_bias is None) == ("bias" not in keys)


def test_without_running_statistics_eval_uses_the_batch(rng):
    layer = bnfast.BatchNorm2d(3, track_running_stats=False).eval()
    x = draw(rng)
    assert_same_bits("y", layer(x), F.batch_norm(x, None, None, training=True))


def test_tracking_can_be_switched_off_and_on(rng):
    layer = trained(rng)
    layer.track_running_stats = False
    before = layer.state_dict()
    x = draw(rng)
    layer(x)
    layer.reset_running_stats()
    assert_same_state(layer.state_dict(), before)
    vectors = [getattr(layer, name) for name in ("running_mean", "running_var", "weight", "bias")]
    assert_same_bits("eval", layer.eval()(x), F.batch_norm(x, *vectors))
    layer.train().track_running_stats = True
    layer(x)
    assert layer.num_batches_tracked == before["num_batches_tracked"] + 1
    assert (layer.running_mean != before["running_mean"]).all()


def test_without_a_counter_the_statistics_still_move(rng):
    layer = bnfast.BatchNorm2d(3, momentum=0.25)
    layer.num_batches_tracked = None
    x = draw(rng)
    layer(x)
    np.testing.assert_allclose(layer.running_mean, 0.25 * x.mean(axis=(0, 2, 3)), rtol=1e-5)
    assert layer.num_batches_tracked is None
    layer.momentum = None
    before = layer.running_mean.copy()
    layer(draw(rng))
    np.testing.assert_array_equal(layer.running_mean, before)


def test_reset(rng):
    layer = trained(rng)
    weight = layer.weight.copy()
    layer.reset_running_stats()
    np.testing.assert_array_equal(layer.running_mean, np.zeros(3))
    np.testing.assert_array_equal(layer.running_var, np.ones(3))
    assert layer.num_batches_tracked == 0
    np.testing.assert_array_equal(layer.weight, weight)
    layer.reset_parameters()
    np.testing.assert_array_equal(layer.weight, np.ones(3))
    np.testing.assert_array_equal(layer.bias, np.zeros(3))
    bare = bnfast.BatchNorm2d(3, affine=False, track_running_stats=False)
    bare.reset_parameters()
    assert bare.state_dict() == {}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("training", [True, False])
def test_writing_a_vector_in_place_takes_effect(rng, dtype, training):
    layer = bnfast.BatchNorm2d(3, dtype=dtype).train(training)
    x = draw(rng)
    layer(x)
    layer.weight[...] = 2.0
    layer.bias[1] += 5.0
    layer.running_mean[...] = 0.5
    layer.running_var *= 3.0
    fresh = bnfast.BatchNorm2d(3, dtype=dtype).train(training)
    fresh.load_state_dict(layer.state_dict())
    assert_same_bits("y", layer(x), fresh(x))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", VECTORS)
def test_one_number_written_between_calls_takes_effect(rng, name, dtype):
    """An eval call packs the vectors again where a number has changed: there, and back again."""
    layer = bnfast.BatchNorm2d(3, dtype=dtype).eval()
    layer.load_state_dict(trained(rng).state_dict())
    x = draw(rng)
    before = layer(x)
    vector = getattr(layer, name)
    old, vector[1] = vector[1], np.nextafter(vector[1], dtype(9), dtype=dtype)
    fresh = bnfast.BatchNorm2d(3, dtype=dtype).eval()
    fresh.load_state_dict(layer.state_dict())
    assert_same_bits("y after a step of one ulp", layer(x), fresh(x))
    vector[1] = np.nan
    assert np.isnan(layer(x)[:, 1]).all()
    vector[1] = old
    assert_same_bits("y as it was", layer(x), before)


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_without_channels(training):
    layer = bnfast.BatchNorm2d(0).train(training)
    assert layer(np.empty((2, 0, 3, 3), np.float32)).shape == (2, 0, 3, 3)


@pytest.mark.parametrize("training", [True, False])
def test_assigning_a_vector_copies_it(rng, training):
    layer, other = bnfast.BatchNorm2d(3).train(training), bnfast.BatchNorm2d(3).train(training)
    weight = np.array([2.0, 3.0, 4.0])
    layer.weight = weight
    other.weight = [2, 3, 4]
    weight[...] = 7.0
    assert layer.weight.dtype == np.float32
    np.testing.assert_array_equal(layer.weight, [2.0, 3.0, 4.0])
    x = draw(rng)
    assert_same_bits("y", layer(x), other(x))
    view = layer.weight
    layer.weight = layer.weight[::-1]
    np.testing.assert_array_equal(view, [4.0, 3.0, 2.0])


@pytest.mark.parametrize("training", [True, False])
def test_none_stands_for_the_neutral_value(rng, training):
    layer = trained(rng).train(training)
    layer.weight = layer.bias = None
    neutral = bnfast.BatchNorm2d(3, affine=False).train(training)
    neutral.load_state_dict(layer.state_dict())
    x = draw(rng)
    assert_same_bits("y", layer(x), neutral(x))


def test_assigning_none_and_back(rng):
    layer = bnfast.BatchNorm2d(3)
    layer.weight, layer.bias = np.full(3, 2.0), np.full(3, 5.0)
    layer.bias = None
    assert "bias" not in layer.state_dict()
    x = draw(rng)
    expected = F.batch_norm(x, None, None, np.full(3, 2.0), training=True)
    assert_same_bits("y without bias", layer(x), expected)
    layer.bias = np.full(3, 1.0)
    expected = F.batch_norm(x, None, None, np.full(3, 2.0), np.full(3, 1.0), training=True)
    assert_same_bits("y with a bias again", layer(x), expected)
    layer.running_mean = layer.running_var = None
    assert_same_bits("eval with the batch's", layer.eval()(x), expected)


@pytest.mark.parametrize(
    ("cls", "shape"),
    [
        (bnfast.BatchNorm1d, (6, 3)),
        (bnfast.BatchNorm1d, (6, 3, 5)),
        (bnfast.BatchNorm2d, (2, 3, 4, 5)),
        (bnfast.BatchNorm3d, (2, 3, 2, 3, 4)),
    ],
)
def test_dimensions(rng, cls, shape):
    x = draw(rng, shape, np.float64)
    y = cls(3, eps=1e-9)(x)
    axes = (0, *range(2, x.ndim))
    keep = {"axis": axes, "keepdims": True}
    np.testing.assert_allclose(y, (x - x.mean(**keep)) / x.std(**keep), atol=1e-6)
    assert y.shape == shape


def test_input_that_is_no_array(rng):
    x = draw(rng, (2, 3), np.float64)
    layer = bnfast.BatchNorm1d(3, dtype=np.float64)
    expected = bnfast.BatchNorm1d(3, dtype=np.float64)(x)
    assert_same_bits("a list of lists", layer(x.tolist()), expected)
    assert_same_bits("its gradient", layer.backward(x.tolist()), layer.backward(x))


# ---- activation, residual, out ------------------------------------------------------------------


@over_backends
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fused_calls_have_the_bits_of_separate_steps(rng, training, dtype, backend):
    x, residual = draw(rng, dtype=dtype), -draw(rng, dtype=dtype)
    plain = bnfast.BatchNorm2d(3, backend=backend).train(training)
    fused = bnfast.BatchNorm2d(3, activation="relu", backend=backend).train(training)
    expected = np.maximum(plain(x) + residual, 0)
    assert (expected == 0).any()
    assert (expected > 0).any()
    assert_same_bits("y", fused(x, residual=residual), expected)
    assert_same_state(fused.state_dict(), plain.state_dict())


@over_backends
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False])
def test_out(rng, activation, training, backend):
    x, residual = draw(rng), draw(rng)

    def layer():
        return bnfast.BatchNorm2d(3, activation=activation, backend=backend).train(training)

    expected = layer()(x, residual=residual)
    out = np.full(SHAPE, np.nan, np.float32)
    assert layer()(x, residual=residual, out=out) is out
    assert_same_bits("out", out, expected)
    for target in ("x", "residual"):
        copies = {"x": x.copy(), "residual": residual.copy()}
        assert layer()(**copies, out=copies[target]) is copies[target]
        assert_same_bits(f"out={target}", copies[target], expected)
    both = x.copy()
    assert_same_bits("all one array", layer()(both, both, both), layer()(x, x))


# ---- threads ------------------------------------------------------------------------------------


@over_backends
def test_an_eval_layer_is_shared_by_threads(rng, backend):
    """Arrays large enough for the parallel region, which only one caller gets at a time."""
    layer = bnfast.BatchNorm2d(16, backend=backend).eval()
    layer.running_mean, layer.running_var = rng.normal(size=16), rng.uniform(0.5, 2, 16)
    inputs = [draw(rng, (2, 16, 64, 64)) for _ in range(4)]
    expected = [layer(x) for x in inputs]
    failures = []
    start = threading.Barrier(4)

    def work(x, y):
        start.wait()
        for _ in range(20):
            if not np.array_equal(layer(x), y):
                failures.append("an output differs")

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_layer_names_its_backend(monkeypatch):
    with pytest.raises(bnfast.UnknownBackendError):
        bnfast.BatchNorm2d(3, backend="nmupy")
    called = []
    original = numpy_reference.train
    monkeypatch.setattr(
        numpy_reference, "train", lambda *a, **k: (called.append(1), original(*a, **k))
    )
    bnfast.BatchNorm2d(3, backend="numpy")(np.ones(SHAPE, np.float32))
    assert called == [1]
