"""Calls on dask arrays: lazy, checked when the graph is made, with state like a call in memory."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from trained_layers import assert_same_state

import bnfast
import bnfast.functional as F
from bnfast import packed

pytest.importorskip("dask", reason="dask is not installed")

import dask
import dask.array as da
import dask.bag as db
from dask.base import tokenize

from bnfast.interop import dask as bnd

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "recalibrate_large.py"


@pytest.fixture
def x(rng):
    return rng.normal(3, 2, (20, 6, 5, 4)).astype(np.float32)


class Source:
    """An array that notes which parts of it are read."""

    def __init__(self, array):
        self.array, self.read = array, []
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

    def __getitem__(self, index):
        if self.array[index].size:  # dask looks at an empty part, to see what kind of array it is
            self.read.append(index)
        return self.array[index]

    def __dask_tokenize__(self):
        return self.array


@pytest.fixture
def source(x):
    return Source(x)


@pytest.fixture
def chunked(source):
    return da.from_array(source, chunks=((7, 13), (2, 4), 3, (1, 3)))


@pytest.fixture
def computed(source):
    """Return a list that gets an item for every chunk that is computed."""
    return source.read


def test_a_layer_in_training_and_after(x, chunked):
    lazy, layer = (bnfast.BatchNorm2d(6, momentum=None, activation="relu") for _ in range(2))
    for _ in range(2):
        y, expected = lazy(chunked, residual=chunked), layer(x, residual=x)
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    assert_same_state(lazy.state_dict(), layer.state_dict())
    for one, other in ((lazy.eval(), layer.eval()), (lazy.freeze(), layer.freeze())):
        y = one(chunked, residual=x)
        assert isinstance(y, da.Array)
        np.testing.assert_array_equal(y.compute(), other(x, residual=x))


def test_metadata_are_those_of_x(chunked):
    y = bnd.batch_norm(chunked, None, None, training=True)
    assert (y.shape, y.dtype, y.chunks) == (chunked.shape, chunked.dtype, chunked.chunks)
    assert isinstance(y._meta, np.ndarray)


def test_nothing_is_computed_but_for_running_statistics(chunked, computed):
    layer = bnfast.BatchNorm2d(6)
    F.batch_norm(chunked, None, None, training=True)
    F.moments(chunked)
    bnfast.BatchNorm2d(6, track_running_stats=False)(chunked)
    layer.eval()(chunked)
    assert not computed
    y = layer.train()(chunked)
    assert len(computed) == chunked.npartitions
    y.compute()
    assert len(computed) == 2 * chunked.npartitions


def test_the_threads_of_a_chunk(chunked):
    y = bnfast.BatchNorm2d(6).eval()(chunked)
    threads = []
    original = packed.normalize

    def noted(*arguments):
        threads.append(bnfast.get_num_threads())
        return original(*arguments)

    packed.normalize = noted
    try:
        with bnfast.use_num_threads(3):
            for scheduler, number in (("sync", 3), ("threads", 1)):
                threads.clear()
                y.compute(scheduler=scheduler)
                assert set(threads) == {number}, scheduler
        bnfast.set_num_threads(3)
        threads.clear()
        bnfast.BatchNorm2d(6).eval()(chunked.rechunk(-1)).compute(scheduler="threads")
        assert threads == [3]
    finally:
        packed.normalize = original
        bnfast.set_num_threads(None)


def test_moments_are_the_same_bits_however_the_tree_grows(chunked):
    whole = bnd.moments(chunked).compute(scheduler="sync")
    for split in (2, 3, 16):
        with dask.config.set({"split_every": split}):
            assert bnd.moments(chunked).compute(scheduler="threads") == whole
    halves = [bnd.moments(part).compute() for part in (chunked[:7], chunked[7:])]
    assert halves[0].merge(halves[1]) == whole


def test_names_follow_from_what_goes_in(x, chunked):
    layer = bnfast.BatchNorm2d(6)
    layer(x)
    layer.eval()
    copies = [pickle.loads(pickle.dumps(layer)) for _ in range(2)]
    with dask.config.set({"tokenize.ensure-deterministic": True}):
        for thing in (layer, layer.freeze(), F.moments(x)):
            assert tokenize(thing) == tokenize(pickle.loads(pickle.dumps(thing)))
        before = tokenize(layer)
        assert copies[0](chunked).name == copies[1](chunked).name
        copies[1].weight[0] = 2
        assert tokenize(copies[1]) != before
        assert copies[0](chunked).name != copies[1](chunked).name
    assert tokenize(layer.train()) != before


ERRORS = {
    "channels": (lambda bn, d, x: bn(d[:, :3]), ValueError, "with 6 channels on axis 1"),
    "dimensions": (lambda bn, d, x: bn(d[0]), ValueError, r"expected 4D input \(got 3D input\)"),
    "unknown": (lambda bn, d, x: bn(d[d[:, 0, 0, 0] > 3]), ValueError, "chunks of unknown size"),
    "dtype": (lambda bn, d, x: bn(d.astype(int)), TypeError, "got dtype int64"),
    "one value": (lambda bn, d, x: bn(d[:1, :, :1, :1]), ValueError, "more than 1 value"),
    "masked": (lambda bn, d, x: bn(da.ma.masked_greater(d, 3)), TypeError, "masked arrays"),
    "delayed": (lambda bn, d, x: bn(dask.delayed(x)), TypeError, "expected a dask.array.Array"),
    "out": (lambda bn, d, x: bn(d, out=x), TypeError, "out= is not for dask arrays"),
    "residual": (lambda bn, d, x: bn(d, d[:1]), ValueError, "residual should have the shape"),
    "residual dtype": (lambda bn, d, x: bn(d, x.astype(float)), TypeError, "dtype of x, float32"),
    "mixed": (lambda bn, d, x: bn(x, d), TypeError, "residual is a collection of dask"),
    "eval": (lambda bn, d, x: F.batch_norm(d, None, None), ValueError, "running_mean must be"),
    "weight": (
        lambda bn, d, x: F.batch_norm(d, None, None, np.ones(5), training=True),
        ValueError,
        "weight should contain 6 elements not 5",
    ),
    "gradient": (
        lambda bn, d, x: F.batch_norm_backward(d, d, None, np.ones(6), np.ones(6)),
        TypeError,
        "x is a collection of dask",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_wrong_is_said_when_the_graph_is_made(x, chunked, case, computed):
    call, kind, words = ERRORS[case]
    layer = bnfast.BatchNorm2d(6)
    before = layer.state_dict()
    with pytest.raises(kind, match=words):
        call(layer, chunked, x)
    assert not computed
    assert_same_state(layer.state_dict(), before)


def test_no_gradient_of_a_lazy_call(x, chunked):
    layer = bnfast.BatchNorm2d(6)
    layer(chunked)
    with pytest.raises(RuntimeError, match="was a dask array"):
        layer.backward(x)


class Network:
    def __init__(self):
        self.layers = [bnfast.BatchNorm2d(6, activation="relu"), bnfast.BatchNorm2d(6)]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x) ** 2
        return x


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
@pytest.mark.parametrize("kind", ["array", "bag", "delayed"])
def test_recalibrate_equals_the_run_in_memory(rng, scheduler, kind):
    x = rng.normal(3, 2, (40, 6, 5, 4)).astype(np.float32)
    batches = np.split(x, [3, 10, 11, 30])
    collection = {
        "array": da.from_array(x, chunks=((3, 7, 1, 19, 10), 2, 5, 4)),
        "bag": db.from_sequence(batches, npartitions=2),
        "delayed": [dask.delayed((batch, "label")) for batch in batches],
    }[kind]
    for mode in ("population", "torch"):
        lazy, network = Network(), Network()
        before = lazy.layers[0].weight.copy()
        with dask.config.set(scheduler=scheduler):
            bnd.recalibrate(lazy, lazy.layers, collection, mode, progress=False)
        bnfast.recalibrate(network, network.layers, batches, mode, progress=False)
        for one, other in zip(lazy.layers, network.layers, strict=True):
            if mode == "population":
                assert_same_state(one.state_dict(), other.state_dict())
            np.testing.assert_allclose(one.running_mean, other.running_mean, rtol=1e-5)
            np.testing.assert_allclose(one.running_var, other.running_var, rtol=1e-5)
            assert one.training
            assert one.momentum == 0.1
        np.testing.assert_array_equal(lazy.layers[0].weight, before)


def test_recalibrate_the_layer_itself(x, chunked):
    lazy, layer = bnfast.BatchNorm2d(6), bnfast.BatchNorm2d(6)
    bnfast.recalibrate(lazy, [lazy], chunked, progress=False)
    bnfast.recalibrate(layer, [layer], [x[:7], x[7:]], progress=False)
    assert_same_state(lazy.state_dict(), layer.state_dict())


def test_recalibrate_leaves_the_layers_after_an_error(chunked):
    layer = bnfast.BatchNorm2d(6)
    before = layer.state_dict()
    with pytest.raises(ValueError, match="with 6 channels"):
        bnfast.recalibrate(layer, [layer], chunked[:, :3], progress=False)
    with pytest.raises(TypeError, match=r"should be a dask.array.Array or a dask.bag.Bag"):
        bnfast.recalibrate(layer, [layer], dask.delayed([1]), progress=False)
    assert_same_state(layer.state_dict(), before)


def test_a_bar_is_shown(chunked, capsys):
    layer = bnfast.BatchNorm2d(6)
    bnfast.recalibrate(layer, [layer], chunked)
    assert "recalibrate: 100%" in capsys.readouterr().err


def test_the_large_example(tmp_path):
    """An eighth of its data, under a limit that they would not fit in."""
    options = [str(EXAMPLE), "--gigabytes", "0.25", "--limit", "220", "--chunk", "64"]
    options += ["--data", str(tmp_path / "x.npy"), "--output", str(tmp_path / "y.npy")]
    finished = subprocess.run(
        [sys.executable, *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    x, y = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "xy")
    layer = bnfast.BatchNorm2d(64)
    bnfast.recalibrate(layer, [layer], np.array_split(x, 4), progress=False)
    np.testing.assert_allclose(y[-3:], layer.eval()(x[-3:]), rtol=1e-5, atol=1e-5)
