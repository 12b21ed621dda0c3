"""The drop-in evaluator fuses where nobody looks between, and then the bits are the same."""

from __future__ import annotations

# ruff: noqa: E402  (what follows needs onnx)
import tracemalloc

import numpy as np
import pytest
from backends_here import over_backends

onnx = pytest.importorskip("onnx", reason="onnx is not installed")

from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator as Stock
from onnx.reference.shape_annotation_checker import ShapeAnnotationError
from onnx_graphs import PATTERNS, VECTORS, bn, bound_arrays, info, kinds, model, op
from onnx_models import Case, same_bits

import bnfast
from bnfast.interop.onnx import BatchNormalization, ReferenceEvaluator


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


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_16_bits_are_rounded_once(rng, name):
    dtype = np.dtype(getattr(pytest.importorskip("ml_dtypes"), name, name))
    proto = model(PATTERNS["add"][0], extra=[info("r")], opset=15)
    arrays = bound_arrays(rng, dtype, (4, 3, 50, 60))
    x, r, *vectors = (arrays[key].astype(np.float64) for key in ("x", "r", *VECTORS))
    scale, bias, mean, var = (vector.reshape(-1, 1, 1) for vector in vectors)
    exact = (x - mean) / np.sqrt(var + float(np.float32(1e-5))) * scale + bias
    once = np.maximum(exact + r, 0).astype(dtype)
    fused = ReferenceEvaluator(proto).run(None, arrays)[0]
    separate = ReferenceEvaluator(proto, fuse=False).run(None, arrays)[0]
    assert fused.dtype == separate.dtype == dtype
    assert (fused != once).mean() < 0.01
    assert (separate != once).mean() > 0.05


@over_backends
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("pattern", ["add", "add, the other way round"])
def test_nan_beside_nan_stays_nan(rng, pattern, dtype, backend):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    proto = model(PATTERNS[pattern][0], extra=[info("r", kind)])
    arrays = bound_arrays(rng, dtype)
    arrays["x"][0, :, 1], arrays["r"][0, :, 1] = np.nan, -np.nan
    with bnfast.use_backend(backend):
        fused = ReferenceEvaluator(proto).run(None, arrays)[0]
        separate = ReferenceEvaluator(proto, fuse=False).run(None, arrays)[0]
    assert np.isnan(fused[0, :, 1]).all()
    fused[0, :, 1] = separate[0, :, 1] = 0
    assert same_bits(fused, separate)


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


REBOUND = {
    "what it takes is made anew": [bn("q"), op("Neg", "q", "q"), op("Relu", "y", "a")],
    "what it makes was used before": [op("Relu", "q", "a"), bn("x", "q")],
}


@pytest.mark.parametrize("how", REBOUND)
def test_a_body_that_makes_a_name_from_around_it_anew_is_left_alone(rng, how):
    then = helper.make_graph(REBOUND[how], "then", [], [info("a")])
    other = helper.make_graph([op("Identity", "x", "b")], "else", [], [info("b")])
    branch = op("If", "go", "z", then_branch=then, else_branch=other)
    proto = model([op("Neg", "x", "q"), branch], extra=[info("go", TensorProto.BOOL)])
    arrays = bound_arrays(rng, np.float32) | {"go": np.array([True])}
    found = ReferenceEvaluator(proto).run(None, arrays)[0]
    assert same_bits(found, Stock(proto, new_ops=[BatchNormalization]).run(None, arrays)[0])


def test_nodes_out_of_order_are_left_alone(rng):
    proto, arrays = model([op("Relu", "y", "z"), bn()]), bound_arrays(rng, np.float32)
    with pytest.raises(RuntimeError, match="Unable to find input 'y'"):
        ReferenceEvaluator(proto).run(None, arrays)


def test_a_relu_of_two_inputs_is_refused_as_it_stands(rng):
    proto = model([bn(), op("Relu", "y r", "z")], extra=[info("r")])
    assert kinds(ReferenceEvaluator(proto)) == ["BatchNormalization", "Relu"]


@pytest.mark.parametrize("method", ["run", "_run"])
def test_a_subclass_that_computes_in_its_own_way_is_not_fused(rng, method):
    def doubled(self, *inputs, **options):
        (y,) = getattr(super(Own, self), method)(*inputs, **options)
        return (2 * y,)

    Own = type("BatchNormalization", (BatchNormalization,), {method: doubled})
    proto, arrays = model(PATTERNS["relu"][0]), bound_arrays(rng, np.float32)
    evaluator = ReferenceEvaluator(proto, new_ops=[Own])
    assert kinds(evaluator) == ["BatchNormalization", "Relu"]
    assert same_bits(
        evaluator.run(None, arrays)[0], 2 * ReferenceEvaluator(proto).run(None, arrays)[0]
    )


def test_evaluators_of_functions_follow_in_fusion():
    inner = helper.make_function(
        "local", "F", ["x", *VECTORS], ["z"], PATTERNS["relu"][0], [helper.make_opsetid("", 11)]
    )
    node = helper.make_node("F", ["x", *VECTORS], ["z"], domain="local")
    graph = model([node]).graph
    for made in (ReferenceEvaluator(inner), Stock(inner)):
        for fuse, wanted in (
            (True, ["BatchNormalization+Relu"]),
            (False, ["BatchNormalization", "Relu"]),
        ):
            outer = ReferenceEvaluator(graph, {"": 11, "local": 1}, functions=[made], fuse=fuse)
            assert kinds(outer.functions_["local", "F"]) == wanted


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
