"""What ONNX's operator refuses: each message names the node, its opset and what was expected."""

from __future__ import annotations

# ruff: noqa: E402  (what follows needs onnx)
import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")

from onnx import helper
from onnx.reference.op_run import RuntimeTypeError
from onnx_models import INPUTS, OUTPUTS, Case

import bnfast
from bnfast import registry
from bnfast.interop.onnx import BatchNormalization, ReferenceEvaluator

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
