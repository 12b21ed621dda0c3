"""The drop-in evaluator: it reaches every batch norm, and fuses only where nobody can tell.

That it reaches them is shown with models of opset 11, which onnx's own operator computes wrongly.
"""

from __future__ import annotations

# ruff: noqa: E402  (what follows needs onnx)
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from backends_here import over_backends

onnx = pytest.importorskip("onnx", reason="onnx is not installed")

from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator as Stock
from onnx.reference.op_run import OpRun
from onnx.reference.shape_annotation_checker import ShapeAnnotationError
from onnx_models import Case, model_of, same_bits, standard

import bnfast
from bnfast.interop.onnx import BatchNormalization, ReferenceEvaluator

VECTORS = ("scale", "bias", "mean", "var")
CASE = Case(11, 4, "f32", "f32", "f32", False)


def info(name, kind=TensorProto.FLOAT, shape=None):
    return helper.make_tensor_value_info(name, kind, shape)


def bn(x="x", y="y", name="bn", **attributes):
    return helper.make_node("BatchNormalization", [x, *VECTORS], [y], name=name, **attributes)


def op(kind, inputs, outputs, **attributes):
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def model(nodes, outputs="z", extra=(), functions=(), opset=11):
    graph = helper.make_graph(
        nodes,
        "graph",
        [info(name) for name in ("x", *VECTORS)] + list(extra),
        list(map(info, outputs.split())),
    )
    return model_of(graph, opset, functions)


def kinds(evaluator):
    return [node.op_type for node in evaluator.rt_nodes_]


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


PATTERNS = {
    "relu": ([bn(), op("Relu", "y", "z")], ["BatchNormalization+Relu"]),
    "add": (
        [bn(), op("Add", "y r", "s"), op("Relu", "s", "z")],
        ["BatchNormalization+Add+Relu"],
    ),
    "add, the other way round": (
        [bn(), op("Add", "r y", "s"), op("Relu", "s", "z")],
        ["BatchNormalization+Add+Relu"],
    ),
    "sum of two": (
        [bn(), op("Sum", "y r", "s"), op("Relu", "s", "z")],
        ["BatchNormalization+Sum+Relu"],
    ),
    "a residual that comes later": (
        [bn(), op("Neg", "r", "n"), op("Add", "n y", "s"), op("Relu", "s", "z")],
        ["Neg", "BatchNormalization+Add+Relu"],
    ),
    "a residual from another batch norm": (
        [bn(), bn("r", "y2", "bn2"), op("Add", "y y2", "s"), op("Relu", "s", "z")],
        ["BatchNormalization", "BatchNormalization+Add+Relu"],
    ),
    "one after the other": (
        [
            bn(),
            op("Relu", "y", "a"),
            bn("a", "y2", "bn2"),
            op("Add", "y2 x", "s"),
            op("Relu", "s", "z"),
        ],
        ["BatchNormalization+Relu", "BatchNormalization+Add+Relu"],
    ),
}


def bound_arrays(rng, dtype, shape=(2, 3, 4, 5)):
    arrays = {name: rng.uniform(0.5, 2, 3).astype(dtype) for name in VECTORS}
    arrays |= {name: rng.normal(0, 3, shape).astype(dtype) for name in "xr"}
    arrays["scale"][0] *= -1
    return arrays


@over_backends
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_fused_call_gives_the_bits_of_the_separate_ones(rng, pattern, dtype, backend):
    nodes, fused_kinds = PATTERNS[pattern]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    proto = model(nodes, extra=[info("r", kind)])
    fused, separate = ReferenceEvaluator(proto), ReferenceEvaluator(proto, fuse=False)
    assert kinds(fused) == fused_kinds
    assert kinds(separate) == [node.op_type for node in nodes]
    arrays = bound_arrays(rng, dtype, (2, 3, *rng.integers(1, 40, 2)))
    arrays["x"][0, 1, 0, 0], arrays["r"][0, 2, 0, 0] = np.nan, np.inf
    arrays["bias"][0], arrays["x"][:, 0] = -0.0, arrays["mean"][0]  # so y is -0.0
    arrays["r"][0, 0] = -0.0
    with bnfast.use_backend(backend):
        assert same_bits(fused.run(None, arrays)[0], separate.run(None, arrays)[0])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_float16_rounds_once(rng, pattern):
    nodes, _ = PATTERNS[pattern]
    proto = model(nodes, extra=[info("r", TensorProto.FLOAT16)])
    arrays = bound_arrays(rng, np.float16)
    fused = ReferenceEvaluator(proto).run(None, arrays)[0]
    assert fused.dtype == np.float16
    separate = ReferenceEvaluator(proto, fuse=False).run(None, arrays)[0]
    np.testing.assert_allclose(fused.astype(float), separate.astype(float), rtol=4e-3, atol=2e-2)


def captured_by_a_body():
    then = helper.make_graph([op("Neg", "y", "a")], "then", [], [info("a")])
    other = helper.make_graph([op("Identity", "x", "b")], "else", [], [info("b")])
    return [
        bn(),
        op("Relu", "y", "w"),
        op("If", "go", "v", then_branch=then, else_branch=other),
        op("Add", "w v", "z"),
    ]


LEFT_ALONE = {
    "an output of the graph": ([bn(), op("Relu", "y", "z")], "z y"),
    "used twice": ([bn(), op("Relu", "y", "w"), op("Add", "w y", "z")], "z"),
    "added to itself": ([bn(), op("Add", "y y", "s"), op("Relu", "s", "z")], "z"),
    "the sum is an output": ([bn(), op("Add", "y r", "s"), op("Relu", "s", "z")], "z s"),
    "the sum is used twice": (
        [bn(), op("Add", "y r", "s"), op("Relu", "s", "w"), op("Mul", "w s", "z")],
        "z",
    ),
    "a sum of three": ([bn(), op("Sum", "y r r", "s"), op("Relu", "s", "z")], "z"),
    "another activation": ([bn(), op("Sigmoid", "y", "z")], "z"),
    "a product": ([bn(), op("Mul", "y r", "s"), op("Relu", "s", "z")], "z"),
    "no Relu": ([bn(), op("Add", "y r", "z")], "z"),
    "two Adds": ([bn(), op("Add", "y r", "s"), op("Add", "s r", "t"), op("Relu", "t", "z")], "z"),
    "a name in a body": (captured_by_a_body(), "z"),
}


@pytest.mark.parametrize("why", LEFT_ALONE)
def test_nodes_that_somebody_else_looks_at_are_left_alone(why, rng):
    nodes, outputs = LEFT_ALONE[why]
    proto = model(nodes, outputs, extra=[info("r"), info("go", TensorProto.BOOL)])
    evaluator = ReferenceEvaluator(proto)
    assert kinds(evaluator) == [node.op_type for node in nodes]
    arrays = bound_arrays(rng, np.float32) | {"go": np.array([True])}
    for own, other in zip(
        evaluator.run(None, arrays),
        Stock(proto, new_ops=[BatchNormalization]).run(None, arrays),
        strict=True,
    ):
        assert same_bits(own, other)


def test_a_name_that_changes_its_value_stops_fusion(rng):
    nodes = [bn(), op("Neg", "r", "r"), op("Add", "y r", "s"), op("Relu", "s", "z")]
    evaluator = ReferenceEvaluator(model(nodes, extra=[info("r")]))
    assert kinds(evaluator) == ["BatchNormalization", "Neg", "Add", "Relu"]


def test_a_residual_that_is_broadcast_is_added_by_the_add(rng):
    nodes, fused_kinds = PATTERNS["add"]
    proto = model(nodes, extra=[info("r")])
    arrays = bound_arrays(rng, np.float32)
    for shape in ((1,), (3, 1, 1), (5, 2, 3, 4, 5)):
        arrays["r"] = rng.normal(0, 3, shape).astype(np.float32)
        evaluator = ReferenceEvaluator(proto)
        assert kinds(evaluator) == fused_kinds
        (found,) = evaluator.run(None, arrays)
        assert same_bits(found, ReferenceEvaluator(proto, fuse=False).run(None, arrays)[0])
        assert found.ndim == max(4, len(shape))
    arrays["r"] = np.zeros((2, 3, 4, 5))
    with pytest.raises(RuntimeError, match="Input type mismatch: float32 != float64"):
        ReferenceEvaluator(proto).run(None, arrays)


@pytest.mark.parametrize("training_mode", [0, 1])
@pytest.mark.parametrize("pattern", ["relu", "add"])
def test_training_is_fused_where_only_y_is_asked_for(rng, pattern, training_mode):
    nodes = [bn(training_mode=training_mode), *PATTERNS[pattern][0][1:]]
    proto = model(nodes, extra=[info("r")], opset=15)
    evaluator = ReferenceEvaluator(proto)
    assert kinds(evaluator) == PATTERNS[pattern][1]
    arrays = bound_arrays(rng, np.float32)
    (found,) = evaluator.run(None, arrays)
    assert same_bits(found, ReferenceEvaluator(proto, fuse=False).run(None, arrays)[0])
    stock = Stock(proto).run(None, arrays)[0]
    np.testing.assert_allclose(found, stock, rtol=1e-5, atol=1e-5)
    assert found.any()


def test_training_with_more_outputs_is_left_alone(rng):
    train = helper.make_node(
        "BatchNormalization", ["x", *VECTORS], ["y", "m", "v"], training_mode=1
    )
    evaluator = ReferenceEvaluator(model([train, op("Relu", "y", "z")], "z m v", opset=15))
    assert kinds(evaluator) == ["BatchNormalization", "Relu"]


def test_an_output_without_a_name_leaves_optional_inputs_alone(rng):
    """An evaluator keeps what is missing under the empty name: there, it has to stay missing."""
    train = helper.make_node("BatchNormalization", ["x", *VECTORS], ["y", "", "v"], training_mode=1)
    clip = helper.make_node("Clip", ["y", "", "high"], ["z"])
    proto = model([train, clip], "z v", extra=[info("high")], opset=15)
    arrays = bound_arrays(rng, np.float32) | {"high": np.array(0, np.float32)}
    results = ReferenceEvaluator(proto).run(None, arrays, intermediate=True)
    assert results[""] is None
    assert same_bits(results["z"], np.minimum(results["y"], 0))


LOOKING = {
    "intermediate": lambda run, arrays: run(None, arrays, intermediate=True)["y"],
    "asked for": lambda run, arrays: run(["y", "z"], arrays)[0],
}


@pytest.mark.parametrize("how", LOOKING)
def test_whoever_looks_between_sees_what_is_there(rng, how):
    proto, arrays = model(PATTERNS["relu"][0]), bound_arrays(rng, np.float32)
    evaluator = ReferenceEvaluator(proto)
    assert kinds(evaluator) == ["BatchNormalization+Relu"]
    found = LOOKING[how](evaluator.run, arrays)
    assert same_bits(found, LOOKING[how](Stock(proto, new_ops=[BatchNormalization]).run, arrays))
    assert (found < 0).any()


def test_verbose_shows_every_node(rng, capsys):
    proto, arrays = model(PATTERNS["relu"][0]), bound_arrays(rng, np.float32)
    ReferenceEvaluator(proto, verbose=3).run(None, arrays)
    printed = capsys.readouterr().out
    assert "BatchNormalization(" in printed
    assert "Relu(" in printed
    assert " + y: " in printed


def test_shapes_between_are_checked_where_that_is_asked_for(rng):
    proto, arrays = model(PATTERNS["relu"][0]), bound_arrays(rng, np.float32)
    proto.graph.value_info.append(info("y", shape=[9, 9]))
    ReferenceEvaluator(proto).run(None, arrays)
    for options, given in (
        ({"check_shape_annotations": True}, {}),
        ({}, {"check_shape_annotations": True}),
    ):
        evaluator = ReferenceEvaluator(proto, **options)
        with pytest.raises(ShapeAnnotationError, match="Value 'y'"):
            evaluator.run(None, arrays, **given)


def test_fusion_is_switched_off_everywhere(rng):
    inner = helper.make_function(
        "local", "F", ["x", *VECTORS], ["z"], PATTERNS["relu"][0], [helper.make_opsetid("", 11)]
    )
    node = helper.make_node("F", ["x", *VECTORS], ["w"], domain="local")
    then = helper.make_graph([bn("w", "t"), op("Relu", "t", "a")], "then", [], [info("a")])
    other = helper.make_graph([op("Identity", "x", "b")], "else", [], [info("b")])
    branch = op("If", "go", "z", then_branch=then, else_branch=other)
    proto = model([node, branch], extra=[info("go", TensorProto.BOOL)], functions=[inner])

    class Plain(ReferenceEvaluator):
        fuse = False

    for evaluator, together in (
        (ReferenceEvaluator(proto), True),
        (ReferenceEvaluator(proto, fuse=True), True),
        (ReferenceEvaluator(proto, fuse=False), False),
        (Plain(proto), False),
        (Plain(proto, fuse=True), True),
    ):
        wanted = ["BatchNormalization+Relu"] if together else ["BatchNormalization", "Relu"]
        assert kinds(evaluator.functions_["local", "F"]) == wanted
        assert kinds(evaluator.rt_nodes_[1].then_branch) == wanted
        assert isinstance(evaluator, ReferenceEvaluator)


@pytest.mark.parametrize("opset", [11, 15])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pattern", [None, "relu", "add"])
def test_the_extra_memory_of_a_node_is_one_output(rng, bound, pattern, training, opset):
    bound(0)  # no idle blocks that an earlier call left
    case = Case(
        opset,
        4,
        "f32",
        "f32",
        "f32",
        training,
        ("y", "a", "b") if training and opset < 14 else ("y",),
    )
    outputs = ["y", "a", "b"] if training and opset < 14 else ["y"]
    node = helper.make_node("BatchNormalization", ["x", *VECTORS], outputs, **case.all_attributes())
    nodes = [node] if pattern is None or len(outputs) > 1 else [node, *PATTERNS[pattern][0][1:]]
    extra = [info("r")] if len(nodes) == 3 else []
    last = "y" if len(nodes) == 1 else "z"
    evaluator = ReferenceEvaluator(model(nodes, last, extra=extra, opset=opset))
    arrays = bound_arrays(rng, np.float32, (4, 3, 200, 300))
    evaluator.run(None, arrays)
    tracemalloc.start()
    try:
        (y,) = evaluator.run(None, arrays)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert y.nbytes <= peak <= 1.07 * y.nbytes  # sizes of blocks are rounded up by up to 1/16
