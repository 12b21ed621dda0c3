"""ONNX's operator BatchNormalization: ONNX's own cases, and odd arrays."""

from __future__ import annotations

# ruff: noqa: E402  (what follows needs onnx)
import functools
import warnings
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")

from onnx import helper, numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx.reference import ReferenceEvaluator as Stock
from onnx_models import INPUTS, OUTPUTS, Case, same_bits, standard

import bnfast
from bnfast import registry
from bnfast.interop.onnx import BatchNormalization, ReferenceEvaluator

AVAILABLE = [name for name, backend in bnfast.list_backends().items() if backend.available]
NODE_CASES = (
    "test_batchnorm_example",
    "test_batchnorm_epsilon",
    "test_batchnorm_example_training_mode",
    "test_batchnorm_epsilon_training_mode",
)
CONVERTED = (
    "test_BatchNorm1d_3d_input_eval",
    "test_BatchNorm2d_eval",
    "test_BatchNorm2d_momentum_eval",
    "test_BatchNorm3d_eval",
    "test_BatchNorm3d_momentum_eval",
)


@functools.cache
def onnx_cases():
    """Return ONNX's cases for the operator by name; to make all of its node cases takes 4 s."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of casts in cases of other operators
        cases = load_model_tests(kind="node") + load_model_tests(kind="pytorch-converted")
    return {
        case.name: case
        for case in cases
        if case.name.startswith(("test_batchnorm_", "test_BatchNorm"))
    }


def data_of(case):
    """Yield the inputs and outputs of a case, from memory or from its files."""
    if case.data_sets is not None:
        yield from case.data_sets
        return
    for folder in sorted(Path(case.model_dir).glob("test_data_set_*")):
        yield tuple(
            [
                numpy_helper.to_array(onnx.load_tensor(folder / f"{kind}_{number}.pb"))
                for number in range(len(list(folder.glob(f"{kind}_*.pb"))))
            ]
            for kind in ("input", "output")
        )


def test_there_are_no_other_cases_of_onnx():
    assert sorted(onnx_cases()) == sorted(NODE_CASES + CONVERTED)


@pytest.mark.parametrize("drop_in", [False, True])
@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("name", NODE_CASES + CONVERTED)
def test_the_cases_of_onnx_pass(name, backend, drop_in):
    case = onnx_cases()[name]
    model = case.model or onnx.load(Path(case.model_dir) / "model.onnx")
    evaluator = ReferenceEvaluator(model) if drop_in else Stock(model, new_ops=[BatchNormalization])
    sets = 0
    initialized = {tensor.name for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in initialized]
    for inputs, outputs in data_of(case):
        with bnfast.use_backend(backend):
            found = evaluator.run(None, dict(zip(names, inputs, strict=True)))
        for own, expected in zip(found, outputs, strict=True):
            assert own.dtype == expected.dtype
            np.testing.assert_allclose(own, expected, rtol=case.rtol, atol=case.atol)
        sets += 1
    assert sets


def test_the_backend_in_force_computes(rng, monkeypatch):
    case = Case(15, 4, "f32", "f32", "f32", False)
    kernels, calls = registry.load("numpy"), []
    normalize = kernels.normalize
    monkeypatch.setattr(kernels, "normalize", lambda *a, **k: calls.append(1) or normalize(*a, **k))
    evaluator = ReferenceEvaluator(case.model())
    with bnfast.use_backend("numpy"):
        evaluator.run(None, case.arrays(rng))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "layout",
    {
        "channels last": lambda x: np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(
            0, 3, 1, 2
        ),
        "gaps": lambda x: np.repeat(x, 2, axis=3)[..., ::2],
        "reversed": lambda x: np.ascontiguousarray(x[::-1, :, ::-1])[::-1, :, ::-1],
        "other byte order": lambda x: x.astype(x.dtype.newbyteorder()),
        "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
        "of a subclass": lambda x: x.view(type("Own", (np.ndarray,), {})),
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("training", [False, True])
def test_arrays_may_lie_as_they_like(rng, layout, training):
    outputs = OUTPUTS[:3] if training else OUTPUTS[:1]
    case = Case(15, 4, "f32", "f32", "f32", training, outputs)
    evaluator, arrays = ReferenceEvaluator(case.model()), case.arrays(rng)
    moved = {"x": layout[1](arrays["x"])}
    moved |= {name: np.repeat(arrays[name], 2)[::2] for name in INPUTS[1:]}
    kept = {name: array.tobytes() for name, array in moved.items()}
    for own, expected in zip(evaluator.run(None, moved), evaluator.run(None, arrays), strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-5)
        assert own.dtype == np.float32
    assert {name: array.tobytes() for name, array in moved.items()} == kept


@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
def test_a_batch_of_one_value_per_channel_has_no_variance(rng, epsilon):
    case = Case(15, 2, "f32", "f32", "f32", True, OUTPUTS[:3], attributes=(("epsilon", epsilon),))
    arrays = case.arrays(rng) | {"x": np.array([[1.0, np.inf, -2.0]], np.float32)}
    y, mean, var = ReferenceEvaluator(case.model()).run(None, arrays)
    expected = np.nan if epsilon == 0 else arrays["bias"][[0, 2]]  # 0 / 0, or 0 / sqrt(epsilon)
    np.testing.assert_array_equal(y[0, [0, 2]], expected)
    assert np.isnan(y[0, 1])
    assert not np.isfinite(mean[1])
    assert np.isnan(var[1])
    momentum = float(np.float32(0.9))
    new = momentum * arrays["mean"] + (1 - momentum) * arrays["x"][0]
    np.testing.assert_allclose(mean[[0, 2]], new[[0, 2]], rtol=1e-6)
    np.testing.assert_allclose(var[[0, 2]], momentum * arrays["var"][[0, 2]], rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4), (0,)])
@pytest.mark.parametrize("opset", [8, 15])
@pytest.mark.parametrize("spatial", [1, 0])
@pytest.mark.parametrize("training", [False, True])
def test_arrays_without_elements(shape, opset, spatial, training):
    attributes = {"training_mode": int(training)} if opset > 9 else {"spatial": spatial}
    outputs = ["y", "m", "v"] if training else ["y"]
    node = helper.make_node("BatchNormalization", INPUTS, outputs, **attributes)
    spatial = spatial or opset > 9
    features = (1,) if len(shape) == 1 else shape[1:2] if spatial else shape[1:]
    vector = np.ones(features, np.float32)
    params = {"opsets": {"": opset}, "new_ops": None, "log": lambda *args: None}
    y, *rest = BatchNormalization(node, params).run(np.ones(shape, np.float32), *[vector] * 4)
    assert y.shape == shape
    assert all(array.shape == features for array in rest)
    assert all(np.isnan(array).all() for array in rest)  # the mean of nothing


def test_an_epsilon_of_zero(rng):
    attributes = (("epsilon", 0.0),)
    for training in (False, True):
        case = Case(15, 4, "f64", "f64", "f64", training, attributes=attributes)
        arrays = case.arrays(rng)
        (y,) = ReferenceEvaluator(case.model()).run(None, arrays)
        np.testing.assert_allclose(y, standard(case, arrays)["y"], rtol=1e-11, atol=1e-11)


def test_float16_statistics_do_not_overflow():
    case = Case(15, 4, "f16", "f16", "f32", True, OUTPUTS[:3], attributes=(("momentum", 0.0),))
    ones = np.ones(3, np.float16)
    x = np.full((2, 3, 4, 5), 60_000, np.float16)
    x[0] = -60_000
    arrays = {"x": x, "scale": ones, "bias": 0 * ones}
    arrays |= {"mean": np.zeros(3, np.float32), "var": np.ones(3, np.float32)}
    y, _, var = ReferenceEvaluator(case.model()).run(None, arrays)
    np.testing.assert_array_equal(np.abs(y), 1)
    np.testing.assert_allclose(var, 60_000.0**2 * 120 / 120, rtol=1e-3)


def test_eval_of_the_class(rng):
    case = Case(15, 4, "f32", "f32", "f32", False)
    arrays = case.arrays(rng)
    (expected,) = ReferenceEvaluator(case.model()).run(None, arrays)
    assert same_bits(BatchNormalization.eval(*(arrays[name] for name in INPUTS)), expected)


def test_attributes_given_to_run_take_the_place_of_the_nodes(rng):
    case = Case(15, 4, "f32", "f32", "f32", False, attributes=(("epsilon", 0.5),))
    arrays = case.arrays(rng)
    node = helper.make_node("BatchNormalization", INPUTS, ["y"])
    params = {"opsets": {"": 15}, "new_ops": None, "log": lambda *args: None}
    own = BatchNormalization(node, params)
    (y,) = own._run(*(arrays[name] for name in INPUTS), epsilon=0.5)
    (expected,) = ReferenceEvaluator(case.model()).run(None, arrays)
    assert same_bits(y, expected)
