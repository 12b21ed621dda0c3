"""Who is compared: bnfast's backends, and everyone else who is installed.

A contender makes, from a problem, a call without arguments that does the work once and returns y
(inference, training), or dx, dweight and dbias (backward). Everyone reads the same arrays in the
same layout, uses the same number of threads, and allocates the result, unless its name ends in
``out=``. `CONTENDERS` is the table; `absent` says why one cannot run here.

    NumPy formula   the formula as one writes it, in the dtype of x
    NumPy folded    inference as ``x * a + b``, two ufunc calls into ``out``
    torch           the module, called in `inference_mode`; backward: the operator behind its
                    autograd, on saved statistics
    onnxruntime     inference, NCHW: a model of one BatchNormalization node; ``out=`` binds its
                    output
    OpenVINO        the same model; it keeps its output in a buffer of its own, which is an ``out=``
    limit           see `limit.py`

Who is compared on a GPU is in `gpu.py`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from importlib.metadata import version
from typing import Any, NamedTuple, Protocol

import limit
import numpy as np
from cases import AXES, DTYPES, EPILOGUES, EPS, LAYOUTS, OPERATIONS, STORAGE, Case, Problem
from measuring import Call
from numpy.typing import NDArray

import bnfast
import bnfast.functional as F


class Variant(Protocol):
    """One of several ways to do the same, which knows how it is checked."""

    def __call__(self) -> Any:
        """Do it."""

    def check(self) -> None:
        """Raise AssertionError unless it is done."""


class Contender(NamedTuple):
    """A row of the comparison."""

    make: Callable[..., Call | Mapping[str, Variant]]
    packages: tuple[str, ...]
    instruction_set: Callable[[], str]
    threads: Callable[[], int] = bnfast.get_num_threads
    operations: tuple[str, ...] = OPERATIONS
    layouts: tuple[str, ...] = LAYOUTS
    dtypes: tuple[str, ...] = ("float32", "float64")
    suites: tuple[str, ...] = ("shapes",)
    backend: str | None = None

    def takes(self, case: Case) -> bool:
        """Return whether this is a row of the case."""
        return (
            case.operation in self.operations
            and case.layout in self.layouts
            and case.dtype in self.dtypes
            and case.suite in self.suites
        )

    def circumstances(self) -> dict[str, Any]:
        """Return what its figures depend on."""
        return {
            "threads": self.threads(),
            "instruction_set": self.instruction_set(),
            "versions": {name: version(name) for name in self.packages},
        }


LAYERS: dict[int, Any] = {
    2: bnfast.BatchNorm1d,
    3: bnfast.BatchNorm1d,
    4: bnfast.BatchNorm2d,
    5: bnfast.BatchNorm3d,
}
"""The layers by the number of dimensions that they take."""

EVERYWHERE = ("shapes", "sizes", "channels", "ranks", *EPILOGUES, "storage")


def bnfast_layer(problem: Problem, backend: str, into_out: bool = False) -> Call:
    """The layer as a user calls it; the gradient as the function that takes saved statistics."""
    x, case = problem.x, problem.case
    out = problem.out if into_out else None
    if case.operation == "backward":
        mean, invstd = problem.batch
        arguments = (problem.dy, x, problem.weight, mean, invstd)
        return lambda: F.batch_norm_backward(*arguments, out=out, backend=backend)[:3]
    layer = LAYERS[len(case.shape)]
    activation = "relu" if problem.relu else None
    dtype, count = problem.weight.dtype, case.shape[1]
    bn = layer(count, EPS, dtype=dtype, activation=activation, backend=backend)
    bn.train(case.operation == "training")
    bn.weight, bn.bias = problem.weight, problem.bias
    bn.running_mean, bn.running_var = problem.running_mean.copy(), problem.running_var.copy()
    if problem.residual is not None:
        return lambda: bn(x, problem.residual, out=out)
    return (lambda: bn(x, out=out)) if into_out else (lambda: bn(x))


def numpy_formula(problem: Problem) -> Call:
    """The formula, in the dtype of x."""
    x, operation = problem.x, problem.case.operation
    weight, bias = problem.weight[:, None, None], problem.bias[:, None, None]

    def inference() -> Any:
        mean, var = problem.running_mean[:, None, None], problem.running_var[:, None, None]
        return (x - mean) / np.sqrt(var + EPS) * weight + bias

    def training() -> Any:
        mean, var = x.mean(AXES, keepdims=True), x.var(AXES, keepdims=True)
        return (x - mean) / np.sqrt(var + EPS) * weight + bias

    def backward() -> tuple[NDArray[Any], ...]:
        dy, count = problem.dy, x[:, 0].size
        xhat = (x - mean) * invstd
        dbias, dweight = dy.sum(AXES), (dy * xhat).sum(AXES)
        shared = dbias[:, None, None] + xhat * dweight[:, None, None]
        return weight * invstd * (dy - shared / count), dweight, dbias

    if operation == "backward":
        mean, invstd = (v.astype(x.dtype)[:, None, None] for v in problem.batch)
    return {"inference": inference, "training": training, "backward": backward}[operation]


def numpy_folded(problem: Problem) -> Call:
    """Two ufunc calls; what does not depend on x is computed once."""
    x, out = problem.x, problem.out
    scale = problem.weight / np.sqrt(problem.running_var + EPS)
    shift = (problem.bias - problem.running_mean * scale)[:, None, None]
    scale = scale[:, None, None]

    def call() -> Any:
        np.multiply(x, scale, out=out)
        return np.add(out, shift, out=out)

    return call


def torch_module(problem: Problem) -> Call:
    """The layer, and the operator that its autograd calls for the gradient."""
    import torch

    torch.set_num_threads(bnfast.get_num_threads())
    case = problem.case
    x, weight, bias, mean, var = (
        torch.from_numpy(array)
        for array in (
            problem.x,
            problem.weight,
            problem.bias,
            problem.running_mean.copy(),  # training updates them
            problem.running_var.copy(),
        )
    )
    if case.operation == "backward":
        dy, saved = torch.from_numpy(problem.dy), problem.batch
        saved_mean, saved_invstd = (torch.from_numpy(v).to(x.dtype) for v in saved)
        operator = torch.ops.aten.native_batch_norm_backward
        given = (dy, x, weight, mean, var, saved_mean, saved_invstd, True, EPS, [True] * 3)
        return lambda: operator(*given)
    module = torch.nn.BatchNorm2d(case.shape[1], EPS, dtype=x.dtype)
    module.train(case.operation == "training").requires_grad_(False)
    module.weight.copy_(weight)
    module.bias.copy_(bias)
    module.running_mean, module.running_var = mean, var

    def call() -> Any:
        with torch.inference_mode():
            return module(x)

    return call


def onnx_model(problem: Problem) -> bytes:
    """Return a model that normalises x."""
    from onnx import TensorProto, checker, helper, numpy_helper

    vectors = {
        "weight": problem.weight,
        "bias": problem.bias,
        "mean": problem.running_mean,
        "var": problem.running_var,
    }
    kind = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}[problem.case.dtype]
    graph = helper.make_graph(
        [helper.make_node("BatchNormalization", ["x", *vectors], ["y"], epsilon=EPS)],
        "batch_norm",
        [helper.make_tensor_value_info("x", kind, problem.case.shape)],
        [helper.make_tensor_value_info("y", kind, problem.case.shape)],
        [numpy_helper.from_array(vector, name) for name, vector in vectors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    checker.check_model(model)
    serialized: bytes = model.SerializeToString()
    return serialized


def onnxruntime_session(problem: Problem, into_out: bool = False) -> Call:
    """One node in a session; its threads may spin, as they do for users."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = bnfast.get_num_threads()
    session = onnxruntime.InferenceSession(
        onnx_model(problem), options, providers=["CPUExecutionProvider"]
    )
    x = problem.x
    if not into_out:
        return lambda: session.run(None, {"x": x})[0]
    binding, out = session.io_binding(), problem.out
    binding.bind_cpu_input("x", x)
    binding.bind_output("y", "cpu", 0, out.dtype.type, out.shape, out.ctypes.data)

    def call() -> NDArray[Any]:
        session.run_with_iobinding(binding)
        return out

    return call


def openvino_request(problem: Problem) -> Call:
    """One node, compiled for latency, in float32 as given (its default may be bfloat16)."""
    import openvino

    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": bnfast.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(core.read_model(onnx_model(problem)), "CPU", settings)
    request, inputs = compiled.create_infer_request(), {0: problem.x}
    return lambda: request.infer(inputs, share_inputs=True, share_outputs=True)[0]


def _numpy_instructions() -> str:
    found = np.show_config(mode="dicts")["SIMD Extensions"]["found"]
    return str(found[-1] if found else "baseline")


def _torch_instructions() -> str:
    import torch

    return str(torch.backends.cpu.get_cpu_capability())


def _its_own_choice() -> str:
    return "chosen by the library"


def _contenders() -> Iterator[tuple[str, Contender]]:
    for name in bnfast.list_backends():
        row = Contender(
            make=partial(bnfast_layer, backend=name),
            packages=("bnfast", "numpy", "numba") if name == "numba" else ("bnfast", "numpy"),
            instruction_set=partial(_backend_instructions, name),
            threads=_one if name == "numpy" else bnfast.get_num_threads,
            dtypes=(*DTYPES, *STORAGE),
            suites=("shapes",) if name == "numpy" else EVERYWHERE,
            backend=name,
        )
        yield name, row
        yield f"{name} out=", row._replace(make=partial(row.make, into_out=True))
    plain = Contender(numpy_formula, ("numpy",), _numpy_instructions, _one)
    yield "NumPy formula", plain
    yield "NumPy folded out=", plain._replace(make=numpy_folded, operations=("inference",))
    yield "torch", Contender(torch_module, ("torch",), _torch_instructions)
    node = Contender(
        make=onnxruntime_session,
        packages=("onnxruntime", "onnx"),
        instruction_set=_its_own_choice,
        operations=("inference",),
        layouts=("NCHW",),
    )
    yield "onnxruntime", node
    yield "onnxruntime out=", node._replace(make=partial(onnxruntime_session, into_out=True))
    yield (
        "OpenVINO out=",
        node._replace(
            make=openvino_request,
            packages=("openvino", "onnx"),
            dtypes=("float32",),  # float64 is computed in float32
        ),
    )
    yield (
        "limit",
        Contender(
            make=lambda problem: limit.moves(problem, bnfast.get_num_threads()),
            packages=(),
            instruction_set=limit.instruction_set,
            dtypes=(*DTYPES, *STORAGE),
            suites=EVERYWHERE,
        ),
    )


def _backend_instructions(name: str) -> str:
    return bnfast.registry.load(name).instruction_set()


def _one() -> int:
    return 1


CONTENDERS: dict[str, Contender] = dict(_contenders())


@cache
def absent(name: str) -> str | None:
    """Return None, or why this contender cannot run here."""
    contender = CONTENDERS[name]
    if contender.backend is not None:
        reason = bnfast.list_backends()[contender.backend].reason
        simulated = reason is None and contender.instruction_set() == "simulator"
        return "a simulator has no speed" if simulated else reason
    missing = [package for package in contender.packages if not importlib.util.find_spec(package)]
    return f"{' and '.join(missing)} not installed" if missing else None
