"""What is compared: the cases, their arrays, and the float64 result that nobody is timed without.

Case       suite, operation, layout, dtype, shape: one group of the comparison
cases      all cases of an operation, or the small ones for a run that does not time
Problem    a case with arrays, and `Problem.check`

Suites
    ``shapes``     eight shapes, from a call whose cost is not arithmetic to arrays of 100 MB, in
                   both layouts and dtypes
    ``sizes``      the same planes, more and more of them: 2^22 to 2^27 elements
    ``channels``   the same bytes in 1, 3 and 64 channels, all in the same turns
    ``ranks``      arrays of 2, 3 and 5 dimensions, each in the same turns as 4 of the same bytes
    ``epilogue-plain``, ``epilogue-relu``, ``epilogue-residual``
                   what is fused behind the affine step, large arrays, in the same turns
    ``storage``    float16 and bfloat16, large arrays, in the same turns as float32
    ``gpu``        the eight shapes again, on a GPU, as are the next (see `gpu.py`)
    ``gpu-resnet50``   every batch norm of ResNet-50 at batch 32, once
    ``gpu-large``  what no cache of a GPU holds
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

EPS = float(np.float32(1e-5))
"""An attribute of an ONNX node is a float32: everyone gets the same."""

AXES = (0, 2, 3)

Shape = tuple[int, ...]

SHAPES: tuple[Shape, ...] = (
    (1, 64, 8, 8),
    (1, 64, 56, 56),
    (8, 64, 56, 56),
    (32, 64, 112, 112),
    (32, 256, 56, 56),
    (32, 512, 28, 28),
    (32, 1024, 14, 14),
    (32, 2048, 7, 7),
)
SIZES: tuple[Shape, ...] = tuple((2**power // 2**18, 64, 64, 64) for power in range(22, 28))
CHANNELS: tuple[Shape, ...] = ((64, 1, 512, 384), (64, 3, 256, 256), (64, 64, 48, 64))
RANKS: tuple[tuple[Shape, str, Shape], ...] = (
    ((4096, 1024), "NHWC", (64, 1024, 8, 8)),
    ((64, 32, 100000), "NCHW", (64, 32, 250, 400)),
    ((8, 64, 16, 56, 56), "NCHW", (8, 64, 224, 224)),
)
"""A shape of another rank, and the layout and the shape of four dimensions that have its bytes."""

UNTIMED_RANKS = (((64, 48), "NHWC", (4, 48, 4, 4)), ((2, 8, 3, 5, 7), "NCHW", (2, 8, 15, 7)))

EPILOGUES = ("epilogue-plain", "epilogue-relu", "epilogue-residual")

RESNET50: tuple[Shape, ...] = tuple(
    (32, channels, size, size)
    for size, all_channels in {
        112: (64,),
        56: (64, 128, 256),
        28: (128, 256, 512),
        14: (256, 512, 1024),
        7: (512, 2048),
    }.items()
    for channels in all_channels
)
LARGE: tuple[Shape, ...] = ((64, 256, 56, 56), (128, 64, 112, 112))
UNTIMED: tuple[Shape, ...] = ((1, 64, 8, 8), (2, 48, 28, 28))
"""What a run that does not time checks everyone on: a call on one thread, and one on several."""

BIG = tuple(shape for shape in SHAPES if 4 * np.prod(shape) > 50e6)
"""What has more than 50 MB in float32."""

OPERATIONS = ("inference", "training", "backward")
LAYOUTS = ("NCHW", "NHWC")
DTYPES = ("float32", "float64")
STORAGE = ("float16", "bfloat16") if importlib.util.find_spec("ml_dtypes") else ("float16",)

EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
"""The distance from 1 to the next number."""

TOUCHED = {"inference": 2, "training": 2, "backward": 3}
"""How many arrays an operation has to move at least: each input read and each output written."""

GPU_SUITES = ("gpu", "gpu-resnet50", "gpu-large")

GPU_PASSES = {"inference": 2, "training": 3, "backward": 5}
"""How many arrays an operation on a GPU has to move, whose caches do not hold what is read twice:
training reads x twice, backward x and dy."""

CHECKED = 2**21
"""Elements that a check looks at, about: all of a small array, some channels of a large one."""


class Case(NamedTuple):
    """What a comparison is about; contenders compete within one case."""

    suite: str
    operation: str
    layout: str
    dtype: str
    shape: Shape

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return "-".join((self.suite, self.operation, self.layout, self.dtype, shape))

    @property
    def label(self) -> str:
        """The shape as the tables have it."""
        return f"({','.join(map(str, self.shape))})"

    @property
    def turns(self) -> str:
        """What the cases have in common that are timed in the same turns.

        These are one case alone, except where cases are compared with each other.
        """
        if self.suite == "channels":
            return "-".join(self[:4])
        if self.suite == "ranks":
            return f"{self.suite}-{self.operation}-{self.elements}"
        if self.suite in EPILOGUES:
            return str(self._replace(suite="epilogue"))
        if self.suite == "storage":
            return str(self._replace(dtype="any"))
        return str(self)

    @property
    def on_gpu(self) -> bool:
        """Whether the arrays are on a GPU."""
        return self.suite in GPU_SUITES

    @property
    def elements(self) -> int:
        """The number of elements of x."""
        return int(np.prod(self.shape))

    @property
    def bytes(self) -> int:
        """The traffic that no implementation can avoid."""
        passes = (GPU_PASSES if self.on_gpu else TOUCHED)[self.operation]
        if self.suite == "epilogue-residual":
            passes += 1
        return passes * self.elements * numpy_dtype(self.dtype).itemsize


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return a dtype, by a name that NumPy may not know before ml_dtypes is imported."""
    if name == "bfloat16":
        import ml_dtypes  # noqa: F401

    return np.dtype(name)


def cases(operation: str, timed: bool) -> Iterator[Case]:
    """Yield the cases of an operation."""
    yield from _host_and_gpu(operation, timed)
    if operation != "backward":
        yield from _ranks(operation, RANKS if timed else UNTIMED_RANKS)
        yield from _storage(operation, BIG if timed else UNTIMED)
    if operation == "inference":
        yield from _epilogues(operation, BIG if timed else UNTIMED)


def _ranks(operation: str, ranks: tuple[tuple[Shape, str, Shape], ...]) -> Iterator[Case]:
    for shape, layout, other in ranks:
        yield Case("ranks", operation, "NCHW", "float32", shape)
        yield Case("ranks", operation, layout, "float32", other)


def _epilogues(operation: str, shapes: tuple[Shape, ...]) -> Iterator[Case]:
    for layout in LAYOUTS:
        for shape in shapes:
            for suite in EPILOGUES:
                yield Case(suite, operation, layout, "float32", shape)


def _storage(operation: str, shapes: tuple[Shape, ...]) -> Iterator[Case]:
    for layout in LAYOUTS:
        for shape in shapes:
            for dtype in ("float32", *STORAGE):
                yield Case("storage", operation, layout, dtype, shape)


def _host_and_gpu(operation: str, timed: bool) -> Iterator[Case]:
    for suite in ("shapes", "gpu"):
        for dtype in DTYPES:
            for layout in LAYOUTS:
                for shape in SHAPES if timed else UNTIMED:
                    yield Case(suite, operation, layout, dtype, shape)
    if timed:
        for layout in LAYOUTS:
            for shape in RESNET50:
                yield Case("gpu-resnet50", operation, layout, "float32", shape)
            for shape in LARGE:
                yield Case("gpu-large", operation, layout, "float32", shape)
        for shape in SIZES:
            yield Case("sizes", operation, "NCHW", "float32", shape)
        if operation == "inference":
            for layout in LAYOUTS:
                for shape in CHANNELS:
                    yield Case("channels", operation, layout, "float32", shape)


class Problem:
    """A case with random arrays, which no contender may write to except for ``out``."""

    def __init__(self, case: Case, rng: np.random.Generator) -> None:
        count = case.shape[1]
        self.case = case
        self.axes = (0, *range(2, len(case.shape)))
        self.x = self._normal(rng, 2, 1.5)
        parameters = "float64" if case.dtype == "float64" else "float32"
        self.weight, self.bias, self.running_mean = rng.normal(size=(3, count)).astype(parameters)
        self.running_var = rng.uniform(0.5, 2.0, count).astype(parameters)
        if case.operation == "backward":
            self.dy = self._normal(rng)
        self.relu = case.suite == "epilogue-relu"
        self.residual = self._normal(rng) if case.suite == "epilogue-residual" else None

    def _normal(
        self, rng: np.random.Generator, scale: float = 1.0, offset: float = 0.0
    ) -> NDArray[Any]:
        n, c, *places = self.case.shape
        shape = self.case.shape if self.case.layout == "NCHW" else (n, *places, c)
        drawn: Any = np.float64 if self.case.dtype == "float64" else np.float32
        values = rng.standard_normal(shape, drawn)
        values *= scale
        values += offset
        values = values.astype(numpy_dtype(self.case.dtype), copy=False)
        return values if self.case.layout == "NCHW" else np.moveaxis(values, -1, 1)

    @property
    def inputs(self) -> list[NDArray[Any]]:
        """The arrays that have to be read."""
        if self.case.operation == "backward":
            return [self.x, self.dy]
        return [self.x] if self.residual is None else [self.x, self.residual]

    @cached_property
    def out(self) -> NDArray[Any]:
        """What the rows named ``out=`` write to, by turns."""
        return np.empty_like(self.x)

    @cached_property
    def batch(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and invstd of the batch, what a training forward leaves for the backward."""
        mean = self.x.mean(self.axes, dtype=np.float64)
        return mean, 1 / np.sqrt(self.x.var(self.axes, dtype=np.float64) + EPS)

    @cached_property
    def checked(self) -> NDArray[np.intp]:
        """The channels that a check looks at, the first and the last among them."""
        count = self.case.shape[1]
        some = min(count, max(2, count * CHECKED // self.case.elements))
        return np.unique(np.linspace(0, count - 1, some).round().astype(np.intp))

    @cached_property
    def solution(self) -> tuple[NDArray[np.float64], ...]:
        """The result in float64: y, or dx, dweight and dbias; the checked channels of it."""
        channels, axes = self.checked, self.axes
        x = self.x[:, channels].astype(np.float64)
        weight, bias = self._wide(self.weight[channels]), self._wide(self.bias[channels])
        if self.case.operation == "inference":
            mean = self._wide(self.running_mean[channels])
            var = self._wide(self.running_var[channels])
        else:
            mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        invstd = 1 / np.sqrt(var + EPS)
        xhat = (x - mean) * invstd
        if self.case.operation != "backward":
            y = xhat * weight + bias
            if self.residual is not None:
                y += self.residual[:, channels]
            return (np.maximum(y, 0) if self.relu else y,)
        dy = self.dy[:, channels].astype(np.float64)
        dbias, dweight = dy.sum(axes), (dy * xhat).sum(axes)
        count = dy[:, 0].size
        shared = (self._wide(dbias) + xhat * self._wide(dweight)) / count
        return weight * invstd * (dy - shared), dweight, dbias

    def _wide(self, vector: NDArray[Any]) -> NDArray[np.float64]:
        """Return a channel vector in float64, ready to be broadcast against x."""
        return vector.astype(np.float64).reshape(-1, *(1 for _ in self.axes[1:]))

    def check(self, result: Any) -> None:
        """Raise AssertionError unless ``result`` solves the problem.

        The tolerance grows with the number of terms of a sum, for who adds them up in float32:
        torch's channels-last training is 33 ulp off at 16,384 terms and 300 ulp at 401,408.
        """
        results = result if isinstance(result, tuple) else (result,)
        terms = self.x[:, 0].size
        tolerance = (8 + terms**0.5) * EPSILON[self.case.dtype]
        for actual, exact in zip(results, self.solution, strict=True):
            if exact.ndim > 1:
                scale, actual = np.abs(exact).max(), on_host(actual)[:, self.checked]
            else:  # a sum over the batch, of terms of size 1
                scale, actual = terms, on_host(actual)[self.checked]
            np.testing.assert_allclose(actual, exact, rtol=0, atol=tolerance * scale)


def on_host(array: Any) -> NDArray[Any]:
    """Return an array as one of NumPy; a tensor may be anywhere."""
    return np.asarray(array.cpu() if hasattr(array, "cpu") else array)
