"""The state of a layer: mappings, files, copies, and how it prints."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
from trained_layers import VECTORS, assert_same_state, draw, trained

import bnfast
import bnfast.functional as F
from bnfast.testing.bounds import assert_same_bits


def test_state_is_a_copy(rng):
    layer = trained(rng)
    state = layer.state_dict()
    weight = layer.weight.copy()
    state["weight"][...] = 99
    np.testing.assert_array_equal(layer.weight, weight)
    layer.load_state_dict(state)
    state["weight"][...] = 0
    np.testing.assert_array_equal(layer.weight, np.full(3, 99))


@pytest.mark.parametrize("prefix", ["", "stem.bn1."])
def test_state_through_a_file(rng, tmp_path, prefix):
    layer = trained(rng)
    np.savez(tmp_path / "state.npz", **layer.state_dict(prefix))
    other = bnfast.BatchNorm2d(3)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as state:
        assert state[prefix + "num_batches_tracked"].dtype == np.int64
        assert state[prefix + "num_batches_tracked"].shape == ()
        keys = other.load_state_dict(state, prefix=prefix)
    assert keys == ([], [])
    assert_same_state(other.state_dict(), layer.state_dict())
    assert other.num_batches_tracked == 2
    assert type(other.num_batches_tracked) is int
    x = draw(rng)
    assert_same_bits("y", other.eval()(x), layer.eval()(x))


def test_prefixes_part_the_layers_of_a_network(rng):
    layers = {"a.": trained(rng), "a.b.": trained(rng, bias=False)}
    state = {}
    for prefix, layer in layers.items():
        state |= layer.state_dict(prefix)
    other = bnfast.BatchNorm2d(3, bias=False)
    assert other.load_state_dict(state, prefix="a.b.") == ([], [])
    assert_same_state(other.state_dict(), layers["a.b."].state_dict())
    keys = other.load_state_dict(state, strict=False, prefix="a.")
    assert keys.missing_keys == []
    assert set(keys.unexpected_keys) == {"a.bias", *layers["a.b."].state_dict("a.b.")}


def test_loading_with_gaps(rng):
    state = trained(rng).state_dict()
    layer = trained(rng, calls=5)
    weight = layer.weight.copy()
    del state["weight"]
    state["extra"] = np.zeros(1)
    keys = layer.load_state_dict(state, strict=False)
    assert keys == (["weight"], ["extra"])
    np.testing.assert_array_equal(layer.weight, weight)
    np.testing.assert_array_equal(layer.running_mean, state["running_mean"])
    assert layer.num_batches_tracked == 2


def test_a_missing_counter_is_kept(rng):
    state = trained(rng).state_dict()
    del state["num_batches_tracked"]
    layer = trained(rng, calls=5)
    assert layer.load_state_dict(state) == ([], [])
    assert layer.num_batches_tracked == 5
    np.testing.assert_array_equal(layer.running_mean, state["running_mean"])


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32])
def test_loading_other_dtypes(dtype):
    layer = bnfast.BatchNorm2d(3)
    layer.load_state_dict({"weight": np.array([1, 2, 3], dtype)}, strict=False)
    assert layer.weight.dtype == np.float32
    np.testing.assert_array_equal(layer.weight, [1, 2, 3])


@pytest.mark.parametrize("counter", [7, np.int32(7), 7.0, np.array([7])])
def test_loading_counters(counter):
    layer = bnfast.BatchNorm2d(3)
    layer.load_state_dict({"num_batches_tracked": counter}, strict=False)
    assert layer.num_batches_tracked == 7


@pytest.mark.parametrize("large", VECTORS)
def test_loading_what_overflows_is_whole_or_nothing(rng, large):
    layer = trained(rng)
    before = layer.state_dict()
    state = {name: rng.normal(size=3) for name in VECTORS} | {"num_batches_tracked": 9}
    state[large][1] = 1e300
    with np.errstate(over="ignore"):
        whole = {
            name: np.asarray(value).astype(before[name].dtype) for name, value in state.items()
        }
    assert np.isinf(whole[large][1])
    loaded = True
    with warnings.catch_warnings(), np.errstate(all="warn"):
        warnings.simplefilter("error")
        try:
            layer.load_state_dict(state)
        except RuntimeWarning:
            loaded = False
    assert_same_state(layer.state_dict(), whole if loaded else before)


COPIES = {
    **{
        f"pickle{protocol}": lambda layer, protocol=protocol: pickle.loads(
            pickle.dumps(layer, protocol)
        )
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"bias": False, "dtype": np.float64}, {"affine": False, "track_running_stats": False}],
)
def test_copies(rng, how, arguments):
    layer = trained(rng, eps=1e-3, momentum=None, activation="relu", **arguments)
    layer.backward(draw(rng))
    twin = COPIES[how](layer)
    assert type(twin) is type(layer)
    assert repr(twin) == repr(layer)
    assert_same_state(twin.state_dict(), layer.state_dict())
    for name in ("grad_weight", "grad_bias"):
        np.testing.assert_array_equal(getattr(twin, name), getattr(layer, name))
    with pytest.raises(RuntimeError, match="the layer was copied after its last forward"):
        twin.backward(draw(rng))
    x = draw(rng)
    assert_same_bits("y", twin(x), layer(x))
    assert_same_state(twin.state_dict(), layer.state_dict())

    # The two share nothing, and the twin's vectors are its own.
    before = layer.state_dict()
    for name in VECTORS:
        if getattr(twin, name) is not None:
            getattr(twin, name)[...] = 5.0
    assert_same_state(layer.state_dict(), before)
    if twin.weight is not None:
        expected = F.batch_norm(x, None, None, np.full(3, 5.0), twin.bias, True, eps=1e-3)
        assert_same_bits("after a write", twin(x), np.maximum(expected, 0))


@pytest.mark.parametrize("table", [np.ones((4, 2), np.float32), np.ones((4, 3), np.int64)])
def test_a_pickle_with_a_wrong_table(table):
    layer = bnfast.BatchNorm2d(3)
    state = layer.__getstate__()
    state["_table"] = table
    with pytest.raises(ValueError, match=r"^not the state of a layer with 3 features$"):
        bnfast.BatchNorm2d.__new__(bnfast.BatchNorm2d).__setstate__(state)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, ""),
        ({"bias": False}, ", bias=False"),
        ({"dtype": np.float64}, ", dtype=float64"),
        ({"activation": "relu", "backend": "numpy"}, ", activation='relu', backend='numpy'"),
    ],
)
def test_repr(arguments, text):
    layer = bnfast.BatchNorm3d(7, **arguments)
    assert repr(layer) == (
        "BatchNorm3d(7, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True" + text + ")"
    )
    names = {"BatchNorm3d": bnfast.BatchNorm3d, "float64": np.float64}
    assert repr(eval(repr(layer), names)) == repr(layer)


def test_repr_without_parameters():
    layer = bnfast.BatchNorm1d(2, affine=False, momentum=None, track_running_stats=False)
    assert repr(layer) == (
        "BatchNorm1d(2, eps=1e-05, momentum=None, affine=False, track_running_stats=False)"
    )
