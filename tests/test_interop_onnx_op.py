"""ONNX's operator BatchNormalization: ONNX's own cases, odd arrays, and what is refused."""

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
from onnx.reference.op_run import RuntimeTypeError
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


# What is refused when a model is loaded.

BAD_NODES = {
    "four inputs": (
        11,
        {"inputs": INPUTS[:4]},
        "expected the inputs X, scale, B, input_mean, input_var, got \\[",
    ),
    "six inputs": (11, {"inputs": (*INPUTS, "x")}, "expected the inputs X, scale"),
    "an input without a name": (11, {"inputs": (*INPUTS[:4], "")}, "expected the inputs X, scale"),
    "no output": (
        11,
        {"outputs": ()},
        "expected the outputs Y, mean, var, saved_mean, saved_var, all",
    ),
    "an output Y without a name": (
        15,
        {"outputs": ("", "m", "v")},
        "expected the outputs Y, running",
    ),
    "six outputs": (11, {"outputs": (*OUTPUTS, "z")}, "expected the outputs Y, mean"),
    "five outputs": (
        15,
        {"outputs": OUTPUTS},
        "expected the outputs Y, running_mean, running_var, all",
    ),
    "an unknown attribute": (
        15,
        {"eps": 1e-3},
        "unknown attribute 'eps': expected epsilon, momentum, training_mode$",
    ),
    "one of another opset": (
        9,
        {"spatial": 1},
        "unknown attribute 'spatial': expected epsilon, momentum$",
    ),
    "one of a later opset": (9, {"training_mode": 0}, "unknown attribute 'training_mode'"),
    "one that is gone": (
        7,
        {"is_test": 1},
        "unknown attribute 'is_test': expected epsilon, momentum, spatial$",
    ),
    "an attribute of another type": (
        15,
        {"epsilon": 1},
        "attribute 'epsilon' should be of type FLOAT, got INT$",
    ),
    "a negative epsilon": (
        15,
        {"epsilon": -1.0},
        "epsilon should be finite and not negative, got -1.0$",
    ),
    "an epsilon of NaN": (
        15,
        {"epsilon": float("nan")},
        "epsilon should be finite and not negative, got nan$",
    ),
    "an infinite momentum": (15, {"momentum": float("inf")}, "momentum should be finite, got inf$"),
    "statistics in inference, 15": (
        15,
        {"outputs": OUTPUTS[:3]},
        "Y as the only output with training_mode=0, got \\['running",
    ),
    "statistics in inference, 6": (
        6,
        {"outputs": OUTPUTS, "is_test": 1},
        "Y as the only output with is_test=1, got \\['running",
    ),
    "an opset that is none": (0, {}, "there is no such opset$"),
}


def load(opset, inputs=INPUTS, outputs=("y",), name="bn7", **attributes):
    node = helper.make_node("BatchNormalization", inputs, outputs, name=name, **attributes)
    graph = helper.make_graph([node], "graph", [], [])
    return ReferenceEvaluator(graph, {"": opset})


@pytest.mark.parametrize("why", BAD_NODES)
def test_malformed_nodes_are_refused_when_the_model_is_loaded(why):
    opset, changes, message = BAD_NODES[why]
    beginning = rf"^BatchNormalization node 'bn7' \(opset {opset}\): .*"
    with pytest.raises(ValueError, match=beginning + message):
        load(opset, **changes)


def test_an_attribute_that_is_there_twice_is_refused():
    node = helper.make_node("BatchNormalization", INPUTS, ["y"], name="bn7", epsilon=1e-3)
    node.attribute.append(node.attribute[0])
    with pytest.raises(
        ValueError, match=r"\(opset 11\): the attribute 'epsilon' is there 2 times$"
    ):
        ReferenceEvaluator(helper.make_graph([node], "graph", [], []), {"": 11})


def test_a_node_without_a_name_is_called_by_its_output():
    with pytest.raises(
        ValueError, match=r"^BatchNormalization node that outputs 'y' \(opset 11\): "
    ):
        load(11, name="", eps=1.0)


# What is refused when a model is run.

BAD_ARRAYS = {
    "integers": (
        "x",
        lambda a: a.astype(np.int32),
        RuntimeTypeError,
        "X should be of float16, float32, float64, got int32$",
    ),
    "complex numbers": (
        "x",
        lambda a: a.astype(complex),
        RuntimeTypeError,
        "X should be of .*, got complex128$",
    ),
    "a list": (
        "scale",
        lambda a: a.tolist(),
        RuntimeTypeError,
        "scale should be an array, got list$",
    ),
    "nothing": (
        "var",
        lambda a: None,
        RuntimeTypeError,
        "input_var should be an array, got NoneType$",
    ),
    "a mask": (
        "x",
        np.ma.masked_invalid,
        RuntimeTypeError,
        "X should be an array, got MaskedArray$",
    ),
    "integers for a vector": (
        "mean",
        lambda a: a.astype(int),
        RuntimeTypeError,
        "input_mean should be of .*, got int64$",
    ),
    "no dimension": (
        "x",
        lambda a: a[0, 0, 0, 0, ...],
        ValueError,
        r"X should have the shape \(N, C, ...\), or \(N,\) with C = 1, got \(\)$",
    ),
    "another number of channels": (
        "x",
        lambda a: a[:, :2],
        ValueError,
        r"scale should have the shape \(2,\) for X of shape \(2, 2, 4, 5\), got \(3,\)$",
    ),
    "a column": (
        "bias",
        lambda a: a[:, None],
        ValueError,
        r"B should have the shape \(3,\) for X of shape \(2, 3, 4, 5\), got \(3, 1\)$",
    ),
    "a number": (
        "var",
        lambda a: a[:1].reshape(()),
        ValueError,
        r"input_var should have the shape \(3,\) .*, got \(\)$",
    ),
    "one dimension, three channels": (
        "x",
        lambda a: a[0, 0, 0],
        ValueError,
        r"scale should have the shape \(1,\) for X of shape \(5,\), got \(3,\)$",
    ),
}


@pytest.mark.parametrize("opset", [1, 6, 9, 13])
@pytest.mark.parametrize("why", BAD_ARRAYS)
def test_arrays_that_do_not_fit_are_refused(rng, why, opset):
    name, change, kind, message = BAD_ARRAYS[why]
    case = Case(opset, 4, "f32", "f32", "f32", False)
    evaluator, arrays = ReferenceEvaluator(case.model()), case.arrays(rng)
    evaluator.run(None, arrays)  # what fitted once is no licence
    arrays[name] = change(arrays[name])
    with pytest.raises(kind, match=rf"^BatchNormalization node 'bn' \(opset {opset}\): {message}"):
        evaluator.run(None, arrays)


def test_bfloat16_came_with_opset_14(rng):
    arrays = Case(15, 4, "bf16", "bf16", "bf16", False).arrays(rng)
    model = Case(13, 4, "f32", "f32", "f32", False).model()
    with pytest.raises(
        RuntimeTypeError, match=r"\(opset 13\): X should be of float16, .*, got bfloat16$"
    ):
        ReferenceEvaluator(model).run(None, arrays)


@pytest.mark.parametrize("opset", [7, 8])
def test_spatial_0_has_vectors_of_the_shape_of_a_sample(rng, opset):
    case = Case(opset, 4, "f32", "f32", "f32", False, spatial=False)
    arrays = case.arrays(rng)
    arrays["bias"] = arrays["bias"][:, 0, 0]
    message = r"B should have the shape \(3, 4, 5\) for X of shape .* with spatial=0, got \(3,\)$"
    with pytest.raises(ValueError, match=message):
        ReferenceEvaluator(case.model()).run(None, arrays)


def test_errors_come_through_functions_and_bodies(rng):
    case = Case(11, 4, "f32", "f32", "f32", False)
    arrays = case.arrays(rng)
    imports = [helper.make_opsetid("", 11)]
    function = helper.make_function("local", "F", INPUTS, ["y"], case.model().graph.node, imports)
    node = helper.make_node("F", INPUTS, ["y"], domain="local")
    body = helper.make_graph([node], "body", [], case.model().graph.output)
    branch = helper.make_node("If", ["go"], ["z"], then_branch=body, else_branch=body)
    graph = helper.make_graph([branch], "graph", [], [helper.make_empty_tensor_value_info("z")])
    proto = helper.make_model(
        graph, functions=[function], opset_imports=[*imports, helper.make_opsetid("local", 1)]
    )
    arrays |= {"go": np.array(True), "x": arrays["x"].astype(int)}
    with pytest.raises(
        RuntimeTypeError, match=r"^BatchNormalization node 'bn' \(opset 11\): X should"
    ):
        ReferenceEvaluator(proto).run(None, arrays)


def test_a_function_that_lacks_an_attribute(rng):
    case = Case(11, 4, "f32", "f32", "f32", False)
    node = case.model().graph.node[0]
    linked = node.attribute.add()
    linked.name, linked.ref_attr_name, linked.type = "epsilon", "eps", onnx.AttributeProto.FLOAT
    params = {"opsets": {"": 11}, "new_ops": None, "log": lambda *args: None}
    own, arrays = BatchNormalization(node, params), case.arrays(rng)
    inputs = [arrays[name] for name in INPUTS]
    for given in (None, {}, {"other": 1.0}):
        with pytest.raises(ValueError, match=r"the function around it should be given eps$"):
            own.run(*inputs, linked_attributes=given)
    with pytest.raises(ValueError, match=r"epsilon should be finite and not negative, got -2\.0$"):
        own.run(*inputs, linked_attributes={"eps": -2.0})


def test_what_a_backend_refuses_names_the_node(rng, monkeypatch):
    case = Case(15, 4, "f16", "f32", "f32", False)
    monkeypatch.setattr(registry.load("numpy"), "STORAGE_DTYPES", ())
    with (
        bnfast.use_backend("numpy"),
        pytest.raises(RuntimeTypeError, match=r"^BatchNormalization node 'bn' .*'numpy' takes"),
    ):
        ReferenceEvaluator(case.model()).run(None, case.arrays(rng))


def test_a_backend_that_cannot_run_is_an_error_and_not_the_stock_operator(
    rng, fresh_registry, absent_backend, monkeypatch
):
    case = Case(15, 4, "f32", "f32", "f32", False)
    evaluator, arrays = ReferenceEvaluator(case.model()), case.arrays(rng)
    monkeypatch.setenv("BNFAST_BACKEND", "absent")
    with pytest.raises(bnfast.BackendUnavailableError, match="absent"):
        evaluator.run(None, arrays)
