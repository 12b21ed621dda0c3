"""Layers from real ONNX nodes, against ONNX's own reference and in its own tensors."""

from __future__ import annotations

import numpy as np
import pytest
from trained_layers import VECTORS

import bnfast

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
reference = pytest.importorskip("onnx.reference", reason="onnx is not installed")

KINDS = {
    "BatchNorm1d": (6, 3, 5),
    "BatchNorm2d": (4, 3, 2, 8),
    "BatchNorm3d": (2, 3, 2, 3, 4),
}
NAMES = ("w", "b", "mean", "var")


def model_of(rng, shape, dtype=np.float32, **attributes):
    """Return a model of one node with random parameters."""
    values = [rng.uniform(0.5, 3, 3).astype(dtype) for _ in NAMES]
    node = onnx.helper.make_node("BatchNormalization", ["x", *NAMES], ["y"], **attributes)
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = onnx.helper.make_graph(
        [node],
        "graph",
        [onnx.helper.make_tensor_value_info("x", kind, shape)],
        [onnx.helper.make_tensor_value_info("y", kind, shape)],
        [
            onnx.numpy_helper.from_array(value, name)
            for name, value in zip(NAMES, values, strict=True)
        ],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 15)])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attributes", [{}, {"epsilon": 1e-2, "momentum": 0.7}])
def test_the_layer_computes_what_the_node_does(rng, kind, dtype, attributes):
    model = model_of(rng, KINDS[kind], dtype, **attributes)
    x = rng.normal(2, 3, KINDS[kind]).astype(dtype)
    layer = getattr(bnfast, kind).from_onnx(model.graph.node[0], model.graph.initializer)
    y = layer(x)
    (expected,) = reference.ReferenceEvaluator(model).run(None, {"x": x})
    assert y.dtype == expected.dtype
    assert np.abs(y - expected).max() <= 8 * np.finfo(dtype).eps * np.abs(expected).max()
    assert layer.momentum == pytest.approx(1 - attributes.get("momentum", 0.9), rel=1e-15)
    assert layer.eps == float(np.float32(attributes.get("epsilon", 1e-5)))
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    by_name = getattr(bnfast, kind).from_onnx(model.graph.node[0], values)
    for own, name in zip(VECTORS, NAMES, strict=True):
        np.testing.assert_array_equal(getattr(layer, own), values[name])
        np.testing.assert_array_equal(getattr(by_name, own), values[name])


@pytest.mark.parametrize("kind", ["FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"])
def test_tensors_with_and_without_raw_data(kind):
    values = [0.5, 1.0, 3.0]
    kind = getattr(onnx.TensorProto, kind)
    node = onnx.helper.make_node("BatchNormalization", ["x", *NAMES], ["y"])
    plain = [onnx.helper.make_tensor(name, kind, [3], values) for name in NAMES]
    stored = [onnx.numpy_helper.to_array(tensor) for tensor in plain]
    raw = [
        onnx.helper.make_tensor(name, kind, [3], array.tobytes(), raw=True)
        for name, array in zip(NAMES, stored, strict=True)
    ]
    for tensors in (plain, raw):
        layer = bnfast.BatchNorm1d.from_onnx(node, tensors)
        for own in VECTORS:
            np.testing.assert_array_equal(getattr(layer, own), values)
