"""recalibrate: the statistics of all the data, or the averages of the batches'; all or nothing."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
from backends_here import over_backends
from trained_layers import assert_same_state

import bnfast


class Network:
    """Two linear layers, each with batch norm behind it, in float64."""

    def __init__(self, rng, backend=None):
        self.weights = rng.normal(size=(3, 5)), rng.normal(size=(5, 4))
        self.layers = [
            bnfast.BatchNorm1d(5, dtype=np.float64, activation="relu", backend=backend),
            bnfast.BatchNorm1d(4, momentum=None, dtype=np.float64, backend=backend),
        ]
        for layer in self.layers:
            layer.weight, layer.bias = rng.normal(size=(2, layer.num_features))
            x = rng.normal(size=(6, layer.num_features))
            layer(x)
            layer.backward(x)
        self.layers[1].eval()
        self.seen = [], []

    def __call__(self, x):
        for weight, layer, seen in zip(self.weights, self.layers, self.seen, strict=True):
            x = x @ weight
            seen.append(x)
            x = layer(x)
        return x

    def snapshot(self):
        """Return everything that is not to change but by intent."""
        return [_snapshot(layer) for layer in self.layers]


def _snapshot(layer):
    gradients = {"grad_weight": layer.grad_weight, "grad_bias": layer.grad_bias}
    state = {
        **layer.state_dict(),
        **gradients,
        "momentum": np.array(np.nan if layer.momentum is None else layer.momentum),
        "training": np.array(layer.training),
        "dx": layer.backward(np.linspace(-1, 1, 6 * layer.num_features).reshape(6, -1)),
    }
    for name, gradient in gradients.items():  # to which backward has added
        setattr(layer, name, gradient)
    return state


def batches_of(rng, scale=1.0, mean=0.0):
    """Return batches of different sizes and different means."""
    return [
        mean + scale * (rng.normal(2 * rng.normal(), 1, (int(n), 3)))
        for n in rng.integers(2, 40, 7)
    ]


def numpy_statistics(inputs):
    """Return mean and unbiased variance of all inputs as one array, in extended precision."""
    whole = np.concatenate([np.moveaxis(x, 1, -1).reshape(-1, x.shape[1]) for x in inputs])
    whole = whole.astype(np.longdouble)
    return whole.mean(axis=0).astype(float), whole.var(axis=0, ddof=1).astype(float)


@over_backends
def test_population(rng, backend):
    network = Network(rng, backend)
    bnfast.recalibrate(network, network.layers, batches_of(rng), progress=False)
    for layer, seen in zip(network.layers, network.seen, strict=True):
        mean, var = numpy_statistics(seen)
        np.testing.assert_allclose(
            layer.running_mean, mean, rtol=1e-12, atol=1e-14 * np.sqrt(var).max()
        )
        np.testing.assert_allclose(layer.running_var, var, rtol=1e-12)
        assert layer.num_batches_tracked == 7


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("ratio", [1e3, 1e6])
def test_population_at_large_means(rng, dtype, ratio):
    """Batches whose means differ by deviations: what float64 loses of each mean would be seen."""
    layer = bnfast.BatchNorm2d(3, dtype=np.float64)
    batches = [rng.normal(ratio + rng.normal(), 1, (4, 3, 5, 5)).astype(dtype) for _ in range(9)]
    bnfast.recalibrate(layer, [layer], batches, progress=False)
    mean, var = numpy_statistics(batches)
    np.testing.assert_allclose(layer.running_mean, mean, rtol=4e-16)
    np.testing.assert_allclose(layer.running_var, var, rtol=2e-14)


def test_the_order_of_the_batches_is_nothing_to_the_population(rng):
    layer = bnfast.BatchNorm1d(3)
    batches = batches_of(rng, mean=100.0)
    bnfast.recalibrate(layer, [layer], batches, progress=False)
    before = layer.state_dict()
    bnfast.recalibrate(layer, [layer], batches[::-1], progress=False)
    assert_same_state(layer.state_dict(), before)


def test_averages_of_batches(rng):
    network = Network(rng)
    bnfast.recalibrate(network, network.layers, batches_of(rng), mode="torch", progress=False)
    for layer, seen in zip(network.layers, network.seen, strict=True):
        means = np.mean([x.mean(axis=0) for x in seen], axis=0)
        variances = np.mean([x.var(axis=0, ddof=1) for x in seen], axis=0)
        np.testing.assert_allclose(layer.running_mean, means, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(layer.running_var, variances, rtol=1e-12)
        assert layer.num_batches_tracked == 7


@pytest.mark.parametrize("mode", ["population", "torch"])
def test_only_the_statistics_change(rng, mode):
    network = Network(rng)
    before = network.snapshot()
    bnfast.recalibrate(network, network.layers, batches_of(rng), mode, progress=False)
    for old, new in zip(before, network.snapshot(), strict=True):
        for name, value in old.items():
            if name in ("running_mean", "running_var", "num_batches_tracked"):
                assert (value != new[name]).all()
            else:
                np.testing.assert_array_equal(new[name], value, name)


def test_batches_with_labels(rng):
    batches = batches_of(rng)
    layers = [bnfast.BatchNorm1d(3) for _ in range(3)]
    for layer, wrap in zip(
        layers, (lambda x: x, lambda x: (x, "label"), lambda x: [x]), strict=True
    ):
        bnfast.recalibrate(layer, [layer], map(wrap, batches), progress=False)
        assert_same_state(layer.state_dict(), layers[0].state_dict())


def test_a_layer_that_is_called_twice_and_named_twice(rng):
    layer = bnfast.BatchNorm1d(3, dtype=np.float64)
    batches = batches_of(rng)
    seen = []

    def model(x):
        seen.extend([x, 3 * x])
        layer(3 * x)
        layer(x, out=x.copy())

    bnfast.recalibrate(model, [layer, layer], batches, progress=False)
    np.testing.assert_allclose(layer.running_var, numpy_statistics(seen)[1], rtol=1e-12)
    assert layer.num_batches_tracked == 14


def test_a_layer_may_overwrite_its_input(rng):
    layers = [bnfast.BatchNorm1d(3, dtype=np.float64) for _ in range(2)]
    batches = batches_of(rng)
    bnfast.recalibrate(layers[0], layers[:1], batches, progress=False)
    bnfast.recalibrate(lambda x: layers[1](x, out=x), layers[1:], batches, progress=False)
    assert_same_state(layers[1].state_dict(), layers[0].state_dict())


def test_empty_batches_count_for_nothing(rng):
    layer = bnfast.BatchNorm1d(3, dtype=np.float64)
    batches = batches_of(rng)
    bnfast.recalibrate(layer, [layer], [np.empty((0, 3)), *batches], progress=False)
    np.testing.assert_allclose(layer.running_var, numpy_statistics(batches)[1], rtol=1e-12)


def failing(network, after):
    def model(x):
        if len(network.seen[0]) == after:
            raise KeyboardInterrupt("enough")
        return network(x)

    return model


FAILURES = {
    "no batches": (
        lambda network, batches: (network, network.layers, []),
        ValueError,
        "no batches to recalibrate with",
    ),
    "not called": (
        lambda network, batches: (
            lambda x: network.layers[0](x @ network.weights[0]),
            network.layers,
            batches,
        ),
        ValueError,
        "layers[1], BatchNorm1d(4, eps=1e-05, momentum=None, affine=True, "
        "track_running_stats=True, dtype=float64), was not called by the model",
    ),
    "interrupt": (
        lambda network, batches: (failing(network, 3), network.layers, batches),
        KeyboardInterrupt,
        "enough",
    ),
    "bad batch": (
        lambda network, batches: (network, network.layers, [*batches, np.ones((1, 3))]),
        ValueError,
        "Expected more than 1 value per channel when training, got input size [1, 5]",
    ),
    "bad batches": (
        lambda network, batches: (network, network.layers, 7),
        TypeError,
        "'int' object is not iterable",
    ),
    "nothing but empty batches": (
        lambda network, batches: (network, network.layers, [np.empty((0, 3))]),
        ValueError,
        "layers[0] saw no elements: all its inputs were empty",
    ),
    "no layers": (
        lambda network, batches: (network, [], batches),
        ValueError,
        "no layers to recalibrate",
    ),
    "one layer": (
        lambda network, batches: (network, bnfast.BatchNorm2d(3), batches),
        TypeError,
        "layers should be a list of layers, got one: [BatchNorm2d(3, eps=1e-05, momentum=0.1, "
        "affine=True, track_running_stats=True)]",
    ),
    "frozen": (
        lambda network, batches: (
            network,
            [*network.layers, bnfast.BatchNorm2d(3).freeze()],
            batches,
        ),
        TypeError,
        "layers[2] should be a BatchNorm1d, BatchNorm2d or BatchNorm3d, got FrozenBatchNorm",
    ),
    "not tracking": (
        lambda network, batches: (
            network,
            [*network.layers, bnfast.BatchNorm2d(3, track_running_stats=False)],
            batches,
        ),
        ValueError,
        "layers[2], BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, "
        "track_running_stats=False), keeps no running statistics",
    ),
}


@pytest.mark.parametrize("mode", ["population", "torch"])
@pytest.mark.parametrize("case", FAILURES)
def test_after_an_error_the_layers_are_what_they_were(rng, case, mode):
    arguments, error, message = FAILURES[case]
    network = Network(rng)
    call = arguments(network, batches_of(rng))
    before = network.snapshot()
    with pytest.raises(error) as caught:
        bnfast.recalibrate(*call, mode, progress=False)
    assert str(caught.value) == message
    for old, new in zip(before, network.snapshot(), strict=True):
        for name, value in old.items():
            np.testing.assert_array_equal(new[name], value, name)


def test_an_unknown_mode(rng):
    layer = bnfast.BatchNorm1d(3)
    with pytest.raises(
        ValueError, match=r"^unknown mode 'exact': expected one of population, torch$"
    ):
        bnfast.recalibrate(layer, [layer], batches_of(rng), "exact")


@pytest.fixture
def bars(monkeypatch):
    """Put a package in the place of tqdm; return the arguments of the bars it is asked for."""
    asked = []

    def tqdm(iterable, **arguments):
        asked.append(arguments)
        return iter(iterable)

    module = ModuleType("tqdm.auto")
    module.tqdm = tqdm
    monkeypatch.setitem(sys.modules, "tqdm", ModuleType("tqdm"))
    monkeypatch.setitem(sys.modules, "tqdm.auto", module)
    return asked


def test_progress_is_shown(rng, bars):
    layer = bnfast.BatchNorm1d(3)
    bnfast.recalibrate(layer, [layer], batches_of(rng))
    assert bars == [{"desc": "recalibrate", "unit": "batch"}]
    bnfast.recalibrate(layer, [layer], batches_of(rng), progress=False)
    assert len(bars) == 1


def test_without_tqdm_there_is_no_bar(rng, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    layer = bnfast.BatchNorm1d(3)
    bnfast.recalibrate(layer, [layer], batches_of(rng))
    assert layer.num_batches_tracked == 7
    assert capsys.readouterr() == ("", "")


def test_the_real_bar(rng, capsys):
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    layer = bnfast.BatchNorm1d(3)
    bnfast.recalibrate(layer, [layer], batches_of(rng))
    assert "recalibrate: 100%" in capsys.readouterr().err
