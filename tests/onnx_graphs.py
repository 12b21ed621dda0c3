"""Graphs of a few nodes around a BatchNormalization, its vectors called as in `onnx_models`."""

from __future__ import annotations

from onnx import TensorProto, helper
from onnx_models import model_of

VECTORS = ("scale", "bias", "mean", "var")


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


def bound_arrays(rng, dtype, shape=(2, 3, 4, 5)):
    arrays = {name: rng.uniform(0.5, 2, 3).astype(dtype) for name in VECTORS}
    arrays |= {name: rng.normal(0, 3, shape).astype(dtype) for name in "xr"}
    arrays["scale"][0] *= -1
    return arrays


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
