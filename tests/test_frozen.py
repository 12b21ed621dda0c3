"""Frozen layers: the bits of eval mode, and nothing that can change."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
from backends_here import over_backends
from trained_layers import VECTORS, draw, trained

import bnfast
from bnfast import UnknownBackendError
from bnfast.testing.bounds import assert_same_bits

SHAPES = {
    bnfast.BatchNorm1d: (6, 3, 5),
    bnfast.BatchNorm2d: (4, 3, 2, 8),
    bnfast.BatchNorm3d: (2, 3, 2, 3, 4),
}


def layer_of(rng, kind=bnfast.BatchNorm2d, **arguments):
    layer = kind(3, **arguments)
    for name in VECTORS:
        if getattr(layer, name) is not None:
            setattr(layer, name, rng.uniform(0.5, 2, 3))
    return layer


@over_backends
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"affine": False}, {"bias": False}, {"dtype": np.float64, "activation": "relu"}],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_same_bits_as_in_eval_mode(rng, backend, kind, arguments, dtype):
    layer = layer_of(rng, kind, eps=1e-3, backend=backend, **arguments)
    x = draw(rng, SHAPES[kind], dtype)
    residual = draw(rng, SHAPES[kind], dtype)
    frozen = layer.freeze()
    assert layer.training  # freezing leaves the layer alone
    layer.eval()
    assert_same_bits("y", frozen(x), layer(x))
    assert_same_bits("residual", frozen(x, residual=residual), layer(x, residual=residual))
    out = np.empty_like(x)
    assert frozen(x, out=out) is out
    assert_same_bits("out", out, layer(x))
    assert_same_bits("layout", frozen(x.T.copy().T), layer(x))


def test_what_it_shows(rng):
    layer = layer_of(rng, eps=0.5, bias=False, activation="relu", backend="numpy")
    frozen = layer.freeze()
    assert frozen.training is False
    assert frozen.eval() is frozen
    assert (frozen.num_features, frozen.eps) == (3, 0.5)
    assert (frozen.activation, frozen.backend) == ("relu", "numpy")
    assert frozen.bias is None
    for name in ("weight", "running_mean", "running_var"):
        np.testing.assert_array_equal(getattr(frozen, name), getattr(layer, name))
        assert getattr(frozen, name).dtype == np.float32
    assert repr(frozen) == "FrozenBatchNorm(3, eps=0.5, activation='relu', backend='numpy')"
    wide = bnfast.BatchNorm2d(3, dtype=np.float64).freeze()
    assert repr(wide) == "FrozenBatchNorm(3, eps=1e-05, dtype=float64)"


def test_nothing_changes_it(rng):
    layer = layer_of(rng)
    frozen, x = layer.freeze(), draw(rng)
    y = frozen(x)
    for name in (*VECTORS, "eps", "activation", "anything"):
        with pytest.raises(AttributeError, match=r"^a FrozenBatchNorm cannot be changed$"):
            setattr(frozen, name, None)
        with pytest.raises(AttributeError, match=r"^a FrozenBatchNorm cannot be changed$"):
            delattr(frozen, name)
    for name in VECTORS:
        vector = getattr(frozen, name)
        with pytest.raises(ValueError, match="read-only"):
            vector[0] = 9
        with pytest.raises(ValueError, match="WRITEABLE"):
            vector.flags.writeable = True
    for name in VECTORS:
        getattr(layer, name)[:] = 7
    layer.train()(x)
    assert_same_bits("y", frozen(x), y)
    assert not hasattr(frozen, "train")


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle{protocol}": lambda frozen, protocol=protocol: pickle.loads(
            pickle.dumps(frozen, protocol)
        )
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("arguments", [{}, {"affine": False, "dtype": np.float64}])
def test_copies(rng, how, arguments):
    frozen = layer_of(rng, eps=0.1, activation="relu", backend="numpy", **arguments).freeze()
    twin = COPIES[how](frozen)
    assert type(twin) is bnfast.FrozenBatchNorm
    assert repr(twin) == repr(frozen)
    x = draw(rng)
    assert_same_bits("y", twin(x), frozen(x))
    with pytest.raises(ValueError, match="expected 4D input"):
        twin(x[0])
    with pytest.raises(ValueError, match="read-only"):
        twin.running_var[0] = 1


def test_threads_share_it(rng):
    frozen = layer_of(rng).freeze()
    inputs = [draw(rng, (2, 3, 40, 40)) for _ in range(8)]
    expected = [frozen(x) for x in inputs]
    results: dict[int, bool] = {}

    def work(number):
        same = (np.array_equal(frozen(inputs[number]), expected[number]) for _ in range(50))
        results[number] = all(same)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(8), True)


def test_made_from_vectors(rng):
    x = draw(rng, (4, 3))
    layer = layer_of(rng, bnfast.BatchNorm1d)
    frozen = bnfast.FrozenBatchNorm(*(getattr(layer, name) for name in VECTORS))
    assert_same_bits("2-D", frozen(x), layer.eval()(x))
    assert frozen(draw(rng, (2, 3, 1, 1, 1, 2))).shape == (2, 3, 1, 1, 1, 2)


def test_no_channels():
    assert bnfast.BatchNorm1d(0).freeze()(np.empty((4, 0), np.float32)).shape == (4, 0)


def test_calls_that_are_refused(rng):
    frozen = trained(rng).freeze()
    with pytest.raises(ValueError, match=r"^expected 4D input \(got 3D input\)"):
        frozen(np.ones((2, 3, 4), np.float32))
    with pytest.raises(ValueError, match=r"^running_mean should contain 4 elements not 3"):
        frozen(np.ones((2, 4, 1, 1), np.float32))
    with pytest.raises(TypeError, match=r"^expected an array of float16, bfloat16, float32 or"):
        frozen(np.ones((2, 3, 1, 1), int))


def test_layers_that_cannot_be_frozen(rng):
    with pytest.raises(
        ValueError, match=r"^BatchNorm2d has no running statistics to freeze: in eval mode it uses"
    ):
        bnfast.BatchNorm2d(3, track_running_stats=False).freeze()
    layer = trained(rng)
    layer.running_var[1] = np.nan
    with pytest.raises(
        ValueError,
        match=r"^running_var should hold numbers, got NaN in 1 of 3 channels, first in channel 1$",
    ):
        layer.freeze()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"eps": -1.0}, ValueError, "eps must be finite and non-negative, but got -1.0"),
        ({"activation": "gelu"}, ValueError, "unknown activation 'gelu'"),
        ({"dtype": np.float16}, TypeError, "dtype should be float32 or float64, got float16"),
        ({"backend": "cyton"}, UnknownBackendError, "unknown backend 'cyton'"),
        ({"weight": np.ones(4)}, ValueError, "weight should contain 3 elements not 4"),
        ({"running_var": None}, TypeError, "running_var should hold real numbers"),
        ({"running_mean": ["a"] * 3}, TypeError, "running_mean should hold real numbers"),
    ],
)
def test_vectors_that_are_refused(arguments, error, message):
    vectors = dict.fromkeys(VECTORS, np.ones(3))
    with pytest.raises(error, match=message):
        bnfast.FrozenBatchNorm(**(vectors | arguments))
