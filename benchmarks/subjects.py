"""Whose errors are measured, and how each is called: the table `SUBJECTS`.

A subject is given a `Problem` and returns y (inference, training, residual), or dx, dweight and
dbias (backward: of training, from x and dy alone, so that errors of the saved statistics count).

    cython, numba, numpy   bnfast's backends; "cython, no FMA" on the lowest instruction set
    cuda                   in Numba's simulator or on a GPU; few elements in the simulator
    torch                  the module; backward by its autograd
    NumPy formula          the formula as one writes it, in the dtype of x
    NumPy folded           inference as ``x * a + b``
    onnxruntime, OpenVINO  inference: a model of one BatchNormalization node
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import bnfast
from bnfast import registry

Array = NDArray[Any]

EPS = float(np.float32(1e-5))
"""An attribute of ONNX is a float32."""

AXES = (0, 2, 3)
LAYOUTS = ("NCHW", "channels-last")
OPERATIONS = ("inference", "training", "backward", "residual")
"""The last is inference with ``dy`` added to the result."""

TRAINING = ("training", "backward")
DTYPES = ("float32", "float64", "float16", "bfloat16")


class Problem(NamedTuple):
    """Arrays of shape (N, C, H, W) in one of `LAYOUTS`; vectors in float32, or float64 with it."""

    operation: str
    dtype: str
    layout: str
    x: Array
    dy: Array
    weight: Array
    bias: Array
    mean: Array
    var: Array


class Subject(NamedTuple):
    """A row of the comparison."""

    call: Callable[[Problem], Any]
    package: str | None = None
    operations: tuple[str, ...] = OPERATIONS
    dtypes: tuple[str, ...] = DTYPES
    layouts: tuple[str, ...] = LAYOUTS
    backend: str | None = None

    def takes(self, operation: str, dtype: str, layout: str) -> bool:
        """Return whether it computes this."""
        return operation in self.operations and dtype in self.dtypes and layout in self.layouts

    def slow(self) -> bool:
        """Return whether it runs in a simulator."""
        if self.backend is None or self.absent() is not None:
            return False
        return registry.load(self.backend).instruction_set() == "simulator"

    def absent(self) -> str | None:
        """Return None, or why it cannot run here."""
        if self.backend is not None:
            return bnfast.list_backends()[self.backend].reason
        missing = self.package is not None and importlib.util.find_spec(self.package) is None
        return f"{self.package} is not installed" if missing else None


def layer(problem: Problem, backend: str) -> Any:
    """The layer, as a user calls it."""
    x, kind = problem.x, problem.weight.dtype
    bn = bnfast.BatchNorm2d(x.shape[1], EPS, dtype=kind, backend=backend)
    bn.train(problem.operation in TRAINING)
    bn.weight, bn.bias = problem.weight, problem.bias
    bn.running_mean, bn.running_var = problem.mean, problem.var
    y = bn(x, problem.dy if problem.operation == "residual" else None)
    if problem.operation != "backward":
        return y
    return bn.backward(problem.dy), bn.grad_weight, bn.grad_bias


@contextmanager
def lowest_instruction_set() -> Iterator[None]:
    """Compute without fused multiply-add inside."""
    kernels: Any = registry.load("cython")
    highest = kernels.instruction_set()
    kernels.limit_instruction_set("baseline")
    try:
        yield
    finally:
        kernels.limit_instruction_set(highest)


def layer_without_fma(problem: Problem) -> Any:
    """The same on the lowest instruction set."""
    with lowest_instruction_set():
        return layer(problem, "cython")


def cuda_layer(problem: Problem) -> Any:
    """The layer on a GPU; in the simulator as fast as the tests run it."""
    if registry.load("cuda").instruction_set() != "simulator":
        return layer(problem, "cuda")
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    try:
        from quick_simulator import quick
    finally:
        sys.path.pop()
    with quick():
        return layer(problem, "cuda")


def torch_module(problem: Problem) -> Any:
    """The module, and its autograd."""
    import torch

    def tensor(array: Array) -> Any:
        if problem.dtype != "bfloat16" or array.dtype.name != "bfloat16":
            return torch.from_numpy(array)
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)

    def array(tensor: Any) -> Array:
        if tensor.dtype == torch.bfloat16:
            return tensor.detach().to(torch.float32).numpy()
        return tensor.detach().numpy()

    weight, bias, mean, var = (
        torch.from_numpy(vector.copy())
        for vector in (problem.weight, problem.bias, problem.mean, problem.var)
    )
    module = torch.nn.BatchNorm2d(problem.x.shape[1], EPS, dtype=weight.dtype)
    module.train(problem.operation in TRAINING)
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    module.running_mean, module.running_var = mean, var
    x = tensor(problem.x)
    if problem.operation != "backward":
        with torch.no_grad():
            y = module(x)
            return array(y + tensor(problem.dy) if problem.operation == "residual" else y)
    x.requires_grad_()
    module(x).backward(tensor(problem.dy))
    return array(x.grad), array(module.weight.grad), array(module.bias.grad)


def numpy_formula(problem: Problem) -> Any:
    """The formula, in the dtype of x."""
    x, dtype = problem.x, problem.x.dtype
    weight, bias, mean, var = (
        vector.astype(dtype)[:, None, None]
        for vector in (problem.weight, problem.bias, problem.mean, problem.var)
    )
    eps = dtype.type(EPS)
    if problem.operation in TRAINING:
        mean, var = x.mean(AXES, keepdims=True), x.var(AXES, keepdims=True)
    inverse = dtype.type(1) / np.sqrt(var + eps)
    xhat = (x - mean) * inverse
    if problem.operation != "backward":
        y = xhat * weight + bias
        return y + problem.dy if problem.operation == "residual" else y
    dy, count = problem.dy, dtype.type(x[:, 0].size)
    dbias, dweight = dy.sum(AXES), (dy * xhat).sum(AXES)
    shared = dbias[:, None, None] + xhat * dweight[:, None, None]
    return weight * inverse * (dy - shared / count), dweight, dbias


def numpy_folded(problem: Problem) -> Array:
    """Two ufunc calls."""
    scale = problem.weight / np.sqrt(problem.var + problem.var.dtype.type(EPS))
    shift = problem.bias - problem.mean * scale
    return problem.x * scale[:, None, None] + shift[:, None, None]


def onnx_model(problem: Problem) -> bytes:
    """Return a model that normalises x."""
    from onnx import TensorProto, helper, numpy_helper

    kind = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}[problem.dtype]
    vectors = {name: getattr(problem, name) for name in ("weight", "bias", "mean", "var")}
    graph = helper.make_graph(
        [helper.make_node("BatchNormalization", ["x", *vectors], ["y"], epsilon=EPS)],
        "batch_norm",
        [helper.make_tensor_value_info("x", kind, problem.x.shape)],
        [helper.make_tensor_value_info("y", kind, problem.x.shape)],
        [numpy_helper.from_array(vector, name) for name, vector in vectors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    serialized: bytes = model.SerializeToString()
    return serialized


def onnxruntime_session(problem: Problem) -> Any:
    """One node in a session."""
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_model(problem), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": problem.x})[0]


def openvino_request(problem: Problem) -> Array:
    """One node, in float32 as given: its default may be bfloat16."""
    import openvino

    core = openvino.Core()
    model = core.read_model(onnx_model(problem))
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result: Array = compiled({0: problem.x})[0]
    return result


def _subjects() -> Iterator[tuple[str, Subject]]:
    for name in ("cython", "numba", "numpy"):
        yield name, Subject(partial(layer, backend=name), backend=name)
    yield "cython, no FMA", Subject(layer_without_fma, backend="cython")
    yield (
        "cuda",
        Subject(
            cuda_layer,
            backend="cuda",
            dtypes=("float32", "float64"),
        ),
    )
    yield "torch", Subject(torch_module, "torch")
    yield "NumPy formula", Subject(numpy_formula, layouts=("NCHW",))
    yield (
        "NumPy folded",
        Subject(
            numpy_folded,
            operations=("inference",),
            dtypes=("float32", "float64"),
            layouts=("NCHW",),
        ),
    )
    node = Subject(onnxruntime_session, "onnxruntime", ("inference",), layouts=("NCHW",))
    yield "onnxruntime", node._replace(dtypes=("float32", "float64"))
    yield "OpenVINO", node._replace(call=openvino_request, package="openvino", dtypes=("float32",))


SUBJECTS: dict[str, Subject] = dict(_subjects())
