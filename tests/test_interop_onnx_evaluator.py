"""The drop-in evaluator reaches every batch norm of a model.

That it reaches them is shown with models of opset 11, which onnx's own operator computes wrongly.
"""

from __future__ import annotations

# ruff: noqa: E402  (what follows needs onnx)
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")

from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator as Stock
from onnx.reference.op_run import OpRun
from onnx_graphs import VECTORS, bn, info, model, op
from onnx_models import Case, standard

from bnfast.interop.onnx import ReferenceEvaluator

CASE = Case(11, 4, "f32", "f32", "f32", False)


@pytest.fixture
def feeds(rng):
    return CASE.arrays(rng)


@pytest.fixture
def expected(feeds):
    return standard(CASE, feeds)["y"]


def check(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=2e-5)


def functions_within_functions():
    inner = helper.make_function(
        "local", "Inner", ["x", *VECTORS], ["y"], [bn()], [helper.make_opsetid("", 11)], ["eps"]
    )
    linked = inner.node[0].attribute.add()
    linked.name, linked.ref_attr_name = "epsilon", "eps"
    linked.type = onnx.AttributeProto.FLOAT
    call = helper.make_node("Inner", ["x", *VECTORS], ["y"], domain="local", eps=1e-5)
    imports = [helper.make_opsetid("", 11), helper.make_opsetid("local", 1)]
    outer = helper.make_function("local", "Outer", ["x", *VECTORS], ["y"], [call], imports)
    node = helper.make_node("Outer", ["x", *VECTORS], ["z"], domain="local")
    return model([node], functions=[inner, outer]), {}


def if_body():
    then = helper.make_graph([bn()], "then", [], [info("y")])
    other = helper.make_graph([op("Identity", "x", "w")], "else", [], [info("w")])
    node = op("If", "go", "z", then_branch=then, else_branch=other)
    return model([node], extra=[info("go", TensorProto.BOOL)]), {"go": np.array([True])}


def loop_body():
    nodes = [bn("now"), op("Identity", "on", "still")]
    given = [info("i", TensorProto.INT64, []), info("on", TensorProto.BOOL, []), info("now")]
    body = helper.make_graph(nodes, "body", given, [info("still", TensorProto.BOOL, []), info("y")])
    extra = [info("times", TensorProto.INT64, []), info("go", TensorProto.BOOL, [])]
    node = op("Loop", "times go x", "z", body=body)
    return model([node], extra=extra), {"times": np.array(1), "go": np.array(True)}


def scan_body():
    body = helper.make_graph([bn("now")], "body", [info("now")], [info("y")])
    nodes = [
        op("Unsqueeze", "x", "xs", axes=[0]),
        op("Scan", "xs", "ys", body=body, num_scan_inputs=1),
        op("Squeeze", "ys", "z", axes=[0]),
    ]
    return model(nodes), {}


def loop_in_a_function():
    """Return a loop in a function, which is where a wrapper of one kind alone would not reach."""
    inner, given = loop_body()
    names = ["x", *VECTORS, "times", "go"]
    function = helper.make_function(
        "local", "Repeat", names, ["z"], inner.graph.node, [helper.make_opsetid("", 11)]
    )
    extra = [info("times", TensorProto.INT64, []), info("go", TensorProto.BOOL, [])]
    node = helper.make_node("Repeat", names, ["z"], domain="local")
    return model([node], extra=extra, functions=[function]), given


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize(
    "build", [functions_within_functions, if_body, loop_body, scan_body, loop_in_a_function]
)
def test_every_batch_norm_is_reached(build, fuse, feeds, expected):
    proto, given = build()
    check(ReferenceEvaluator(proto, fuse=fuse).run(None, feeds | given)[0], expected)
    wrong = Stock(proto).run(None, feeds | given)[0]
    assert np.abs(wrong - expected).max() > 0.01


def test_functions_that_onnx_evaluates_are_taken_over(feeds, expected):
    inner = helper.make_function(
        "local", "Inner", ["x", *VECTORS], ["y"], [bn()], [helper.make_opsetid("", 11)]
    )
    node = helper.make_node("Inner", ["x", *VECTORS], ["z"], domain="local")
    graph = helper.make_graph([node], "graph", [info(n) for n in ("x", *VECTORS)], [info("z")])
    evaluator = ReferenceEvaluator(graph, {"": 11, "local": 1}, functions=[Stock(inner)])
    check(evaluator.run(None, feeds)[0], expected)


@pytest.mark.parametrize("kind", ["path", "string", "bytes"])
def test_what_a_model_may_be_given_as(kind, tmp_path: Path, feeds, expected):
    proto = model([bn(y="z")])
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    given = {"path": path, "string": str(path), "bytes": proto.SerializeToString()}[kind]
    check(ReferenceEvaluator(given).run(None, feeds)[0], expected)


def test_operators_of_the_caller_go_first(feeds, expected):
    class Relu(OpRun):
        op_domain = ""

        def _run(self, x):
            return (x + 1,)

    evaluator = ReferenceEvaluator(model([bn(), op("Relu", "y", "z")]), new_ops=[Relu])
    check(evaluator.run(None, feeds)[0], expected + 1)

    class Zero(OpRun):
        op_domain = ""

        def _run(self, x, *rest, **attributes):
            return (np.zeros_like(x),)

    Zero.__name__ = "BatchNormalization"
    evaluator = ReferenceEvaluator(model([bn(y="z")]), new_ops=[Zero])
    assert not evaluator.run(None, feeds)[0].any()
