"""Models of one BatchNormalization node, and the text of ONNX's standard, computed in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

INPUTS = ("x", "scale", "bias", "mean", "var")
OUTPUTS = ("y", "running_mean", "running_var", "saved_mean", "saved_var")
SHAPES = {1: (7,), 2: (6, 3), 3: (4, 3, 5), 4: (2, 3, 4, 5), 5: (2, 3, 2, 3, 2)}
TYPES = {
    "f16": TensorProto.FLOAT16,
    "f32": TensorProto.FLOAT,
    "f64": TensorProto.DOUBLE,
    "bf16": TensorProto.BFLOAT16,
}


@dataclass(frozen=True)
class Case:
    """One model of the matrix: its opset, and for each input type the letters of ``TYPES``."""

    opset: int
    rank: int
    x: str
    affine: str
    statistics: str
    training: bool
    outputs: tuple[str, ...] = ("y",)
    spatial: bool = True
    attributes: tuple[tuple[str, float], ...] = field(default=())

    def __str__(self) -> str:
        kind = "train" if self.training else "infer"
        names = "".join(str(OUTPUTS.index(name)) if name else "-" for name in self.outputs)
        pixels = "" if self.spatial else "-pixels"
        set_ones = "-set" if self.attributes else ""
        types = f"{self.x},{self.affine},{self.statistics}"
        return f"{self.opset}-{self.rank}D-{types}-{kind}-{names}{pixels}{set_ones}"

    @property
    def shape(self) -> tuple[int, ...]:
        return SHAPES[self.rank]

    @property
    def vector_shape(self) -> tuple[int, ...]:
        if self.rank == 1:
            return (1,)
        return self.shape[1:2] if self.spatial else self.shape[1:]

    def all_attributes(self) -> dict[str, Any]:
        """Return the attributes of the node, those included that the opset tells the mode with."""
        found: dict[str, Any] = dict(self.attributes)
        if self.opset < 6:
            found["consumed_inputs"] = [0, 0, 0, 1, 1]
        if self.opset < 7 and not self.training:
            found["is_test"] = 1
        if self.opset >= 14 and self.training:
            found["training_mode"] = 1
        if not self.spatial:
            found["spatial"] = 0
        return found

    def arrays(self, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
        """Draw the five inputs."""
        drawn = (
            rng.normal(2, 3, self.shape),
            rng.uniform(0.5, 3, self.vector_shape) * rng.choice((-1, 1), self.vector_shape),
            rng.normal(0, 2, self.vector_shape),
            rng.normal(2, 1, self.vector_shape),
            rng.uniform(0.5, 9, self.vector_shape),
        )
        kinds = (self.x, self.affine, self.affine, self.statistics, self.statistics)
        return {
            name: array.astype(dtype_of(kind))
            for name, array, kind in zip(INPUTS, drawn, kinds, strict=True)
        }

    def model(self) -> onnx.ModelProto:
        kinds = (self.x, self.affine, self.affine, self.statistics, self.statistics)
        statistics = self.statistics if self.opset >= 14 else self.x
        node = helper.make_node(
            "BatchNormalization", INPUTS, self.outputs, name="bn", **self.all_attributes()
        )
        shapes = (self.shape, *[self.vector_shape] * 4)
        graph = helper.make_graph(
            [node],
            "graph",
            [
                helper.make_tensor_value_info(name, TYPES[kind], shape)
                for name, kind, shape in zip(INPUTS, kinds, shapes, strict=True)
            ],
            [
                helper.make_tensor_value_info(
                    name, TYPES[self.x if name == "y" else statistics], None
                )
                for name in self.outputs
                if name
            ],
        )
        return model_of(graph, self.opset)


def model_of(graph: onnx.GraphProto, opset: int, functions: Any = ()) -> onnx.ModelProto:
    imports = [helper.make_opsetid("", opset)]
    imports += [helper.make_opsetid(domain, 1) for domain in {f.domain for f in functions}]
    # Functions came with this version of the format, which onnxruntime knows too.
    return helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=8)


def standard(
    case: Case, arrays: dict[str, NDArray[Any]], epsilon: float = 1e-5, momentum: float = 0.9
) -> dict[str, NDArray[np.float64]]:
    """Return all outputs as the standard's text says, in float64.

    The formula is the same in the text of every version; that the variance is the population's is
    said from version 14 on.
    """
    given = dict(case.attributes)
    eps = float(np.float32(given.get("epsilon", epsilon)))
    momentum = float(np.float32(given.get("momentum", momentum)))
    x, scale, bias, mean, var = (arrays[name].astype(np.float64) for name in INPUTS)
    if case.rank == 1:
        x = x[:, np.newaxis]
    axes = tuple(axis for axis in range(x.ndim) if axis != 1) if case.spatial else (0,)
    lined_up = (1, -1) + (1,) * (x.ndim - 2) if case.spatial else (1, *x.shape[1:])
    current = (x.mean(axes), np.square(x - x.mean(axes, keepdims=True)).mean(axes))
    used = current if case.training else (mean, var)
    y = (x - used[0].reshape(lined_up)) / np.sqrt(used[1].reshape(lined_up) + eps)
    y = y * scale.reshape(lined_up) + bias.reshape(lined_up)
    return {
        "y": y.reshape(case.shape),
        "running_mean": mean * momentum + current[0] * (1 - momentum),
        "running_var": var * momentum + current[1] * (1 - momentum),
        "saved_mean": current[0],
        "saved_var": current[1],
    }


def same_bits(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Return whether two arrays are equal to the last bit."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def matrix() -> list[Case]:
    """Return the models: opset x rank x types x mode x outputs."""
    cases = []
    some = (("epsilon", 1e-2), ("momentum", 0.7))
    for opset in (1, 6, 7, 8, 9, 11, 13):
        all_five = [(*OUTPUTS,), OUTPUTS[:2], ("y", "", "running_var", "", "saved_var")]
        for rank in SHAPES:
            for kind in ("f16", "f32", "f64"):
                own = (opset, rank, kind, kind, kind)
                cases.append(Case(*own, False))
                cases.append(Case(*own, False, attributes=some))
                cases.append(Case(*own, True, all_five[rank % 3], attributes=some))
                cases.append(Case(*own, True, all_five[0]))
                if opset < 7:
                    cases.append(Case(*own, True))
                if opset < 9:
                    cases.append(Case(*own, False, spatial=False))
                    cases.append(Case(*own, True, all_five[0], spatial=False))
    for opset in (14, 15, 22):
        mixes = [(x, t, u) for x in TYPES for t in TYPES for u in TYPES if opset > 14 or t == x]
        outputs = [OUTPUTS[:3], OUTPUTS[:2], ("y", "", "running_var"), ("y",)]
        for number, mix in enumerate(mixes):
            ranks = SHAPES if opset == 14 else ((number + number // 4 + number // 16) % 5 + 1, 4)
            for rank in ranks:
                attributes = some if (number + rank) % 2 else ()
                cases.append(Case(opset, rank, *mix, False, attributes=attributes))
                names = outputs[(number + rank) % 4]
                cases.append(Case(opset, rank, *mix, True, names, attributes=attributes))
    return list(dict.fromkeys(cases))


def onnxruntime_takes(case: Case) -> bool:
    """Return whether onnxruntime runs a model: inference, from opset 7 on, and not every type."""
    kinds = {case.x, case.affine, case.statistics}
    return (
        not case.training
        and case.opset >= 7
        and "bf16" not in kinds
        and (kinds == {"f64"} or "f64" not in kinds)
    )


def tolerance(
    expected: NDArray[np.float64], dtype: np.dtype[Any], largest: float
) -> NDArray[np.float64]:
    """Return half a unit in the last place, and what arithmetic in float32 or float64 may add."""
    rounding = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
    arithmetic = rounding["float64" if dtype == np.float64 else "float32"]
    return rounding[dtype.name] * np.abs(expected) + 4 * arithmetic * largest


def dtype_of(kind: str) -> np.dtype[Any]:
    """Return the dtype that one of the letters of ``TYPES`` stands for."""
    return np.dtype(helper.tensor_dtype_to_np_dtype(TYPES[kind]))
