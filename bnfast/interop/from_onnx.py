"""ONNX's BatchNormalization nodes, opset 7 on, and the tensors that a graph is initialised with.

A tensor is read from its fields, as onnx.proto defines them: the numbers are either the
little-endian ``raw_data``, or they are in the field of their type. float16 and bfloat16 are there
as bits, in ``int32_data``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfast.interop.assembling import LayerT, assemble, weight_of_new

_INPUTS = ("X", "scale", "B", "input_mean", "input_var")
_OWN = ("weight", "bias", "running_mean", "running_var")

_FLOAT, _FLOAT16, _DOUBLE, _BFLOAT16 = 1, 10, 11, 16
_STORED = {_FLOAT: "<f4", _FLOAT16: "<f2", _DOUBLE: "<f8", _BFLOAT16: "<u2"}
_EXTERNAL = 1


def convert(
    cls: type[LayerT],
    node: Any,
    initializers: Any,
    activation: str | None,
    backend: str | None,
) -> LayerT:
    """Return what ``cls.from_onnx`` does."""
    kind = getattr(node, "op_type", "BatchNormalization")
    if kind != "BatchNormalization" or not hasattr(node, "input"):
        found = kind if hasattr(node, "input") else type(node).__name__
        raise TypeError(f"expected a BatchNormalization node of ONNX, got {found}")
    names = list(node.input)
    if len(names) != len(_INPUTS):
        raise ValueError(f"expected the inputs {', '.join(_INPUTS)}, got {names}")
    if not isinstance(initializers, Mapping):
        initializers = {tensor.name: tensor for tensor in initializers}
    missing = [
        f"{given} ({role})"
        for role, given in zip(_INPUTS[1:], names[1:], strict=True)
        if given not in initializers
    ]
    if missing:
        raise ValueError(
            f"no initializer for {', '.join(missing)}; there are {sorted(initializers)}"
        )
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if "spatial" in attributes and not attributes["spatial"].i:
        raise ValueError("spatial=0, statistics for each pixel, is not batch normalisation here")
    return assemble(
        cls,
        {
            own: (given, _array(initializers[given], given))
            for own, given in zip(_OWN, names[1:], strict=True)
        },
        eps=float(_number(attributes, "epsilon", 1e-5)),
        momentum=weight_of_new(_number(attributes, "momentum", 0.9)),
        activation=activation,
        backend=backend,
    )


def _number(attributes: Mapping[str, Any], name: str, default: float) -> np.float32:
    """Return an attribute; ONNX's are float32 numbers, the defaults included."""
    return np.float32(attributes[name].f if name in attributes else default)


def _array(tensor: Any, name: str) -> Any:
    """Return the numbers of a TensorProto; anything else is returned as it is."""
    if not hasattr(tensor, "data_type"):
        return tensor
    kind = tensor.data_type
    if kind not in _STORED:
        raise TypeError(f"{name} should hold real numbers, got ONNX data type {kind}")
    if getattr(tensor, "data_location", 0) == _EXTERNAL:
        raise ValueError(
            f"{name} lies in another file: load the model with onnx.load, which reads it"
        )
    stored = np.dtype(_STORED[kind])
    if tensor.raw_data:
        array: NDArray[Any] = np.frombuffer(tensor.raw_data, stored)
    elif kind in (_FLOAT, _DOUBLE):
        array = np.array(tensor.float_data if kind == _FLOAT else tensor.double_data, stored)
    else:
        array = np.array(tensor.int32_data, np.uint16).view(stored)
    if kind == _BFLOAT16:  # the upper half of a float32
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.reshape(tuple(tensor.dims))
