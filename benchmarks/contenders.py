"""What is compared: the problems, their solution in float64, and everyone who solves them.

Case        operation, shape, layout, dtype: a group of the comparison
Problem     a case with arrays, and `Problem.check`, which no result is timed without
contender   a function from a problem to a call without arguments that does the work once;
            `CONTENDERS` names them, `absent` says why one cannot run here

A call returns y (inference, training), or dx, dweight and dbias (backward). Everyone reads the same
arrays in the same layout, and allocates the result, unless its name ends in ``out=``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import bnfast
import bnfast.functional as F

EPS = 1e-5
AXES = (0, 2, 3)

Call = Callable[[], Any]
Contender = Callable[["Problem"], Call]

SHAPES = ((1, 64, 8, 8), (8, 64, 56, 56), (32, 256, 28, 28))
"""A call whose cost is not arithmetic; arrays that fit the cache; arrays (26 MB) that do not."""

TOUCHED = {"inference": 2, "training": 2, "backward": 3}
"""How many arrays an operation has to move at least: each input read and each output written."""


class Case(NamedTuple):
    """What a comparison is about; contenders compete within one case."""

    operation: str
    shape: tuple[int, int, int, int]
    layout: str
    dtype: str

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.operation}-{shape}-{self.layout}-{self.dtype}"

    @property
    def bytes(self) -> int:
        """The traffic that no implementation can avoid: read once, written once."""
        elements = int(np.prod(self.shape))
        return TOUCHED[self.operation] * elements * np.dtype(self.dtype).itemsize


def cases(operation: str) -> list[Case]:
    """Return the cases of an operation, for both layouts; the largest shape in float32 alone."""
    return [
        Case(operation, shape, layout, dtype)
        for shape in SHAPES
        for layout in ("NCHW", "channels-last")
        for dtype in ("float32", "float64")
        if dtype == "float32" or shape != SHAPES[-1]
    ]


class Problem:
    """A case with random arrays, which no contender may write to."""

    def __init__(self, case: Case, rng: np.random.Generator) -> None:
        count = case.shape[1]
        self.case = case
        self.x = 1.5 + 2 * self._normal(rng)
        self.weight, self.bias, self.running_mean = rng.normal(size=(3, count)).astype(case.dtype)
        self.running_var = rng.uniform(0.5, 2.0, count).astype(case.dtype)
        if case.operation == "backward":
            self.dy = self._normal(rng)

    def _normal(self, rng: np.random.Generator) -> NDArray[Any]:
        n, c, h, w = self.case.shape
        dtype: Any = np.dtype(self.case.dtype)
        if self.case.layout == "NCHW":
            return rng.standard_normal((n, c, h, w), dtype)
        return rng.standard_normal((n, h, w, c), dtype).transpose(0, 3, 1, 2)

    @cached_property
    def batch(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and invstd of the batch, what a training forward leaves for the backward."""
        mean = self.x.mean(AXES, dtype=np.float64)
        return mean, 1 / np.sqrt(self.x.var(AXES, dtype=np.float64) + EPS)

    def solution(self, channels: slice) -> tuple[NDArray[np.float64], ...]:
        """Return the result in float64, of some channels."""
        x = self.x[:, channels].astype(np.float64)
        weight, bias = wide(self.weight[channels]), wide(self.bias[channels])
        if self.case.operation == "inference":
            mean, var = wide(self.running_mean[channels]), wide(self.running_var[channels])
        else:
            mean, var = x.mean(AXES, keepdims=True), x.var(AXES, keepdims=True)
        invstd = 1 / np.sqrt(var + EPS)
        xhat = (x - mean) * invstd
        if self.case.operation != "backward":
            return (xhat * weight + bias,)
        dy = self.dy[:, channels].astype(np.float64)
        dbias, dweight = dy.sum(AXES), (dy * xhat).sum(AXES)
        count = dy[:, 0].size
        return weight * invstd * (dy - (wide(dbias) + xhat * wide(dweight)) / count), dweight, dbias

    def check(self, result: Any, channels: slice = slice(None)) -> None:
        """Raise AssertionError unless ``result`` solves the problem.

        The tolerance grows with the number of terms of a sum, for who adds them up in float32:
        torch's channels-last training is 33 ulp off at 16,384 terms and 300 ulp at 401,408.
        """
        results = result if isinstance(result, tuple) else (result,)
        terms = self.x[:, 0].size
        tolerance = (8 + terms**0.5) * np.finfo(self.case.dtype).eps
        for actual, exact in zip(results, self.solution(channels), strict=False):
            if exact.ndim == 4:
                scale, actual = np.abs(exact).max(), np.asarray(actual)[:, channels]
            else:  # a sum over the batch, of terms of size 1
                scale, actual = terms, np.asarray(actual)[channels]
            np.testing.assert_allclose(actual, exact, rtol=0, atol=tolerance * scale)


def wide(vector: NDArray[Any]) -> NDArray[np.float64]:
    """Return a channel vector in float64, ready to be broadcast against (N, C, H, W)."""
    return vector.astype(np.float64)[:, None, None]


def bnfast_layer(problem: Problem, backend: str, into_out: bool = False) -> Call:
    """The layer as a user calls it; the gradient as the function that takes saved statistics."""
    x, case = problem.x, problem.case
    out = np.empty_like(x) if into_out else None
    if case.operation == "backward":
        mean, invstd = problem.batch
        arguments = (problem.dy, x, problem.weight, mean, invstd)
        return lambda: F.batch_norm_backward(*arguments, out=out, backend=backend)[:3]
    bn = bnfast.BatchNorm2d(case.shape[1], EPS, dtype=case.dtype, backend=backend)
    bn.train(case.operation == "training")
    bn.weight, bn.bias = problem.weight, problem.bias
    bn.running_mean, bn.running_var = problem.running_mean, problem.running_var
    return lambda: bn(x, out=out)


def numpy_formula(problem: Problem) -> Call:
    """The formula as one writes it in NumPy, in the dtype of x."""
    x, operation = problem.x, problem.case.operation
    weight, bias = problem.weight[:, None, None], problem.bias[:, None, None]

    def inference() -> NDArray[Any]:
        mean, var = problem.running_mean[:, None, None], problem.running_var[:, None, None]
        return (x - mean) / np.sqrt(var + EPS) * weight + bias

    def training() -> NDArray[Any]:
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


def torch_module(problem: Problem) -> Call:
    """torch's layer, and the operator that its autograd calls for the gradient."""
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


def _contenders() -> Iterator[tuple[str, Contender]]:
    for name in bnfast.list_backends():
        yield name, partial(bnfast_layer, backend=name)
        yield f"{name}, out=", partial(bnfast_layer, backend=name, into_out=True)
    yield "NumPy formula", numpy_formula
    yield "torch", torch_module


CONTENDERS: dict[str, Contender] = dict(_contenders())


def absent(name: str) -> str | None:
    """Return None, or why this contender cannot run here."""
    if name == "torch":
        return None if importlib.util.find_spec("torch") else "torch is not installed"
    backend = bnfast.list_backends().get(name.removesuffix(", out="))
    return None if backend is None else backend.reason
