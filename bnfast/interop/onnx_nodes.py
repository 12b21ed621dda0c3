"""What a BatchNormalization node of an ONNX model says, opset by opset, and what is wrong with it.

=======  ===========================================  ===========================================
version  training, where                              outputs in training
=======  ===========================================  ===========================================
1, 6     ``is_test`` is 0, the default                Y, mean, var, saved_mean, saved_var
7, 9     any output but Y is asked for                the same
14, 15   ``training_mode`` is not 0                   Y, running_mean, running_var
=======  ===========================================  ===========================================

Versions 1 to 8 have ``spatial``: with 0, statistics and parameters are of the shape (C, D1, ...)
instead of (C,). Version 14 adds bfloat16; before, statistics that are output have the dtype of X,
from then on that of the input that they follow.

Every message begins with the node and its opset. A wrong type is not a TypeError but onnx's own
`RuntimeTypeError`: the evaluator replaces TypeErrors by others that no longer name the node.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, defs
from onnx.reference.op_run import RefAttrName, RuntimeTypeError

INPUTS = ("X", "scale", "B", "input_mean", "input_var")
_FIRST_WITH_BFLOAT16 = 14
_FIRST_BY_OUTPUTS = 7  # training is told by the outputs, until there is ``training_mode``
_FIRST_WITH_TRAINING_MODE = 14
_FIRST_WITHOUT_SPATIAL = 9


@dataclass(frozen=True, slots=True)
class Settings:
    """The attributes of a node, as numbers, and the mode that follows from them."""

    epsilon: float
    momentum: float
    training: bool
    spatial: bool


class Node:
    """A node that was checked on its own, before any array is known.

    Parameters
    ----------
    proto : onnx.NodeProto
        The node.
    opset : int
        The version of the operator set that its model or function imports.

    Attributes
    ----------
    schema : onnx.defs.OpSchema
        The version of the operator that is in force.
    wanted : tuple of bool
        For each output that the node names, whether it has a name.
    settings : Settings or None
        None where an attribute is that of the function around the node: see `resolve`.

    Raises
    ------
    ValueError
        For what is malformed.
    """

    __slots__ = ("_opset", "_proto", "schema", "settings", "version", "wanted")

    def __init__(self, proto: Any, opset: int) -> None:
        self._proto, self._opset = proto, opset
        try:
            self.schema: Any = defs.get_schema("BatchNormalization", opset, "")
        except defs.SchemaError as error:
            raise ValueError(f"{self}: there is no such opset") from error
        self.version: int = self.schema.since_version
        self.wanted = tuple(map(bool, proto.output))
        self.settings: Settings | None = None
        self._check_names()
        self._check_attributes()

    def __str__(self) -> str:
        """Return how messages call the node."""
        name = repr(self._proto.name)
        if not self._proto.name:
            name = "that outputs " + repr(next(iter(self._proto.output), ""))
        return f"BatchNormalization node {name} (opset {self._opset})"

    def refuse(self, what: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(f"{self}: {what}")

    def resolve(self, attributes: Mapping[str, Any]) -> Settings:
        """Return what attributes amount to.

        Parameters
        ----------
        attributes : mapping of str to number
            All the attributes that the version has, defaults included.

        Raises
        ------
        ValueError
            For a bad epsilon or momentum, and for outputs that the mode does not have.
        """
        epsilon, momentum = float(attributes["epsilon"]), float(attributes["momentum"])
        if not 0.0 <= epsilon < math.inf:
            self.refuse(f"epsilon should be finite and not negative, got {epsilon}")
        if not math.isfinite(momentum):
            self.refuse(f"momentum should be finite, got {momentum}")
        extra = [name for name in self._proto.output[1:] if name]
        if self.version >= _FIRST_WITH_TRAINING_MODE:
            training, why = bool(attributes["training_mode"]), "training_mode=0"
        elif self.version >= _FIRST_BY_OUTPUTS:
            training, why = bool(extra), ""
        else:
            training, why = not attributes["is_test"], "is_test=1"
        if extra and not training:
            self.refuse(f"expected Y as the only output with {why}, got {extra} as well")
        return Settings(epsilon, momentum, training, bool(attributes.get("spatial", 1)))

    def check_arrays(self, arrays: tuple[Any, ...], settings: Settings) -> None:
        """Raise unless the inputs are five arrays whose dtypes and shapes fit.

        Raises
        ------
        RuntimeTypeError
            For inputs that are no arrays, and for dtypes that the version does not have.
        ValueError
            For another number of inputs, and for shapes that do not fit.
        """
        if len(arrays) != len(INPUTS):
            self.refuse(f"expected the inputs {', '.join(INPUTS)}, got {len(arrays)} of them")
        x = arrays[0]
        for name, array in zip(INPUTS, arrays, strict=True):
            if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
                self._refuse_type(name, "an array", type(array).__name__)
            if array.dtype.char not in "fde" and not (
                self.version >= _FIRST_WITH_BFLOAT16 and array.dtype.name == "bfloat16"
            ):
                last = "float64" if self.version < _FIRST_WITH_BFLOAT16 else "float64, bfloat16"
                self._refuse_type(name, f"of float16, float32, {last}", str(array.dtype))
        if not x.ndim:
            self.refuse("X should have the shape (N, C, ...), or (N,) with C = 1, got ()")
        shape = self.vector_shape(x, settings)
        for name, array in zip(INPUTS[1:], arrays[1:], strict=True):
            if array.shape != shape:
                self.refuse(
                    f"{name} should have the shape {shape} for X of shape {x.shape}"
                    f"{'' if settings.spatial else ' with spatial=0'}, got {array.shape}"
                )

    def vector_shape(self, x: NDArray[Any], settings: Settings) -> tuple[int, ...]:
        """Return the shape of parameters and statistics for an input."""
        if x.ndim == 1:
            return (1,)
        return x.shape[1:2] if settings.spatial else x.shape[1:]

    def statistics_dtype(self, x: np.dtype[Any], follows: np.dtype[Any]) -> np.dtype[Any]:
        """Return the dtype of a statistic that is output, and follows an input."""
        return (x if self.version < _FIRST_WITH_BFLOAT16 else follows).newbyteorder("=")

    def _refuse_type(self, name: str, expected: str, found: str) -> NoReturn:
        raise RuntimeTypeError(f"{self}: {name} should be {expected}, got {found}")

    def _check_names(self) -> None:
        given = list(self._proto.input)
        if len(given) != len(INPUTS) or not all(given):
            self.refuse(f"expected the inputs {', '.join(INPUTS)}, got {given}")
        outputs = [output.name for output in self.schema.outputs]
        given = list(self._proto.output)
        if not given or not given[0] or len(given) > len(outputs):
            self.refuse(
                f"expected the outputs {', '.join(outputs)}, all but Y optional, got {given}"
            )

    def _check_attributes(self) -> None:
        known = self.schema.attributes
        names = [attribute.name for attribute in self._proto.attribute]
        for attribute in self._proto.attribute:
            name = attribute.name
            if name not in known:
                self.refuse(f"unknown attribute {name!r}: expected {', '.join(sorted(known))}")
            if names.count(name) > 1:
                self.refuse(f"the attribute {name!r} is there {names.count(name)} times")
            expected = known[name].type.value
            if attribute.type != expected:
                kinds = AttributeProto.AttributeType
                self.refuse(
                    f"the attribute {name!r} should be of type {kinds.Name(expected)}, "
                    f"got {kinds.Name(attribute.type)}"
                )


def linked(attributes: Mapping[str, Any]) -> dict[str, str]:
    """Return which attributes are those of the function around the node, and what it calls them."""
    return {
        name: value.name for name, value in attributes.items() if isinstance(value, RefAttrName)
    }
