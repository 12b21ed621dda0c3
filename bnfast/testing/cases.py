"""The shapes and dtypes that a backend is tried on, and the inputs drawn for them.

A shape of three numbers is channels-first ``(N, C, S)``, one of two is channels-last ``(M, C)``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray

from bnfast.spec import Channels, Floats
from bnfast.testing.reference import FORMATS, limits

Shape: TypeAlias = tuple[int, ...]

DTYPES = (np.float32, np.float64)
"""What arithmetic is done in."""


def _bfloat16() -> Any:
    try:
        import ml_dtypes
    except ImportError:
        absent = pytest.mark.skip(reason="the package ml_dtypes, which has bfloat16, is missing")
        return pytest.param(None, id="bfloat16", marks=absent)
    return ml_dtypes.bfloat16


STORAGE = (np.float16, _bfloat16())
"""What is stored in 16 bits: tried where the backend names it in its ``STORAGE_DTYPES``."""

ALL_DTYPES = DTYPES + STORAGE

SHAPES: tuple[Shape, ...] = (
    # One element, one channel, one sample, one position.
    (1, 1, 1),
    (2, 1, 1),
    (5, 3, 1),
    (257, 19, 1),
    (1, 4, 37),
    (7, 1, 13),
    # Planes of 7x7 and 14x14, the small ends of real networks.
    (4, 5, 49),
    (3, 6, 196),
    # Lengths beside the powers of two that blocks are made of, and primes.
    (2, 67, 15),
    (2, 3, 17),
    (129, 2, 3),
    (2, 3, 1023),
    (3, 2, 1025),
    (1, 2, 4097),
    (31, 3, 61),
    # The same in channels-last.
    (1, 1),
    (1, 3),
    (2, 1),
    (5, 3),
    (49, 4),
    (67, 257),
    (3, 1031),
    (97, 15),
    (97, 17),
    (147, 3),
    (1023, 3),
    (1025, 16),
    (4097, 5),
)
"""Small shapes, each with a feature that a kernel may stumble over."""

LARGE_SHAPES: tuple[Shape, ...] = (
    # More than 64k elements per channel: in one run, in long runs, in short runs, in single ones.
    (1, 1, 70001),
    (9, 2, 8191),
    (1031, 1, 67),
    (70001, 1, 1),
    # Enough work for several threads.
    (4, 64, 3136),
    (70001, 1),
    (70001, 3),
    (12289, 64),
)
"""Shapes that take the divided and the multi-threaded paths."""

EMPTY_SHAPES: tuple[Shape, ...] = (
    (0, 3, 5),
    (2, 0, 5),
    (2, 3, 0),
    (0, 0, 0),
    (0, 3),
    (5, 0),
    (0, 0),
)


class Outliers(NamedTuple):
    """Where outliers come first: in a shape, in so many of the samples or rows."""

    shape: Shape
    samples: int
    elements: int | None
    """Of each channel-run of these samples how many elements; None for all. Of rows, all."""


OUTLIERS = (
    # The first element of a channel, or the first of each of its runs.
    Outliers((1, 1, 70001), 1, 1),
    Outliers((9, 2, 8191), 1, 1),
    Outliers((9, 2, 8191), 9, 1),
    Outliers((31, 3, 61), 1, 1),
    Outliers((5, 2, 61), 1, 1),
    # The first run.
    Outliers((1031, 2, 67), 1, None),
    # The first rows.
    Outliers((1023, 3), 1, None),
    Outliers((61, 3), 4, None),
    Outliers((70001, 1), 4, None),
    Outliers((70001, 3), 4, None),
    Outliers((12289, 16), 1, None),
)
"""A kernel that takes a first guess of the mean from there has to notice that it is a bad one."""

RATIOS = (1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
"""The values of mean/std that the bounds are promised for."""

EPILOGUES = ("plain", "residual", "relu", "residual_relu")
"""What follows the affine step."""

OPERATIONS = ("moments", "normalize", "train", "backward_sums", "backward_input", "backward")
"""The kernels of the contract."""


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """One of each argument that the kernels of the contract take."""

    x: Floats
    residual: Floats | None
    dy: Floats
    y: Floats
    mean: Channels
    var: Channels
    invstd: Channels
    weight: Channels
    bias: Channels
    sum_dy: Channels
    sum_dy_xhat: Channels
    eps: float
    count: int

    def replace(self, **changes: Any) -> Inputs:
        """Return a copy with the given arguments changed."""
        return dataclasses.replace(self, **changes)


def draw(
    rng: np.random.Generator,
    shape: Shape,
    dtype: type[np.floating[Any]],
    *,
    ratio: float | None = None,
    size: float | None = None,
    eps: float = 1e-5,
) -> Inputs:
    """Draw inputs whose every part is large enough for its loss to show.

    Parameters
    ----------
    ratio
        |mean|/std of every channel of x; None draws one for each channel between 1 and 1e6, or 10
        for a 16-bit dtype, which has no more digits to show.
    size
        std of every channel of x; None draws one for each channel between 0.01 and 100.
    eps
        Handed on.

    Notes
    -----
    Means, weights and biases have either sign; where there are three channels or more, one has
    weight 0. dy has a mean, so that both sums of the backward pass matter. ``mean`` and ``var``
    are near those of x without being them, as running statistics are.
    """
    largest = limits(np.dtype(dtype))[0]
    most = 1e1 if np.dtype(dtype).name in FORMATS else 1e6
    channels = shape[1]
    count = math.prod(shape) // max(channels, 1)
    std = _magnitudes(rng, channels, 1e-2, 1e2) if size is None else np.full(channels, size)
    ratios = _magnitudes(rng, channels, 1e0, most) if ratio is None else np.full(channels, ratio)
    centre = ratios * std * _signs(rng, channels)
    var = np.square(std) * rng.uniform(0.5, 2.0, channels)
    weight = _magnitudes(rng, channels, 1e-2, 1e2) * _signs(rng, channels)
    if channels >= 3:
        weight[rng.integers(channels)] = 0.0

    def spread(scale: NDArray[Any], offset: NDArray[Any]) -> Floats:
        values = rng.standard_normal(shape)
        values *= _along(scale, shape)
        values += _along(offset, shape)
        # A std of 1e38 reaches past the largest float32.
        return np.clip(values, -0.9 * largest, 0.9 * largest).astype(dtype)

    return Inputs(
        x=spread(std, centre),
        residual=spread(_magnitudes(rng, channels, 1e-2, 1e2), np.zeros(channels)),
        dy=spread(np.ones(channels), rng.uniform(-1.0, 1.0, channels)),
        y=np.maximum(spread(np.ones(channels), rng.uniform(-0.5, 0.5, channels)), 0),
        mean=centre + std * rng.uniform(-1.0, 1.0, channels),
        var=var,
        invstd=1.0 / np.sqrt(var + eps),
        weight=weight,
        bias=_magnitudes(rng, channels, 1e-2, 1e2) * _signs(rng, channels),
        sum_dy=count * rng.uniform(-1.0, 1.0, channels),
        sum_dy_xhat=count * rng.uniform(-1.0, 1.0, channels),
        eps=eps,
        count=count,
    )


def draw_outliers(
    rng: np.random.Generator, outliers: Outliers, dtype: type[np.floating[Any]]
) -> Inputs:
    """Draw inputs whose x has mean 0 and std 1, but for outliers around 1e6."""
    inputs = draw(rng, outliers.shape, dtype, ratio=0.0, size=1.0)
    inputs.x[: outliers.samples, ..., : outliers.elements] += dtype(1e6)
    return inputs


def name(value: object) -> str | None:
    """Return how a value is written in the name of a test; None leaves it to pytest."""
    if isinstance(value, bool):
        return "relu" if value else "plain"
    if isinstance(value, Outliers):
        elements = "" if value.elements is None else f"_of_{value.elements}"
        return f"{name(value.shape)}_in_{value.samples}{elements}"
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return value.__name__ if isinstance(value, type) else None


def over(argument: str, values: tuple[Any, ...]) -> pytest.MarkDecorator:
    """Run a test once for each value of an argument."""
    return pytest.mark.parametrize(argument, values, ids=name)


def leave_out_larger(suite: type, most_elements: int) -> None:
    """Give a class of tests copies of those it inherits, without the shapes that are larger."""
    _leave_out(suite, {"shape", "outliers"}, lambda value: _elements(value) <= most_elements)


def leave_out_dtypes(suite: type, kept: tuple[str, ...]) -> None:
    """Give it copies of these without the dtypes that are not among those to be ``kept``."""
    _leave_out(suite, {"dtype"}, lambda value: dtype_name(value) in kept)


def dtype_name(value: Any) -> str:
    """Return the name of one of `ALL_DTYPES`."""
    return str(getattr(value, "__name__", None) or value.id)


def _leave_out(suite: type, arguments: set[str], keep: Callable[[Any], bool]) -> None:
    """Leave out values of arguments. A test that is left without a value is left out."""
    for test in dir(suite):
        function = getattr(suite, test)
        marks = list(getattr(function, "pytestmark", ()))
        for i, mark in enumerate(marks):
            if test.startswith("test_") and mark.args[0] in arguments:
                kept = tuple(value for value in mark.args[1] if keep(value))
                marks[i] = over(mark.args[0], kept).mark
                copy = FunctionType(
                    function.__code__, function.__globals__, test, None, function.__closure__
                )
                functools.update_wrapper(copy, function, updated=())
                copy.__kwdefaults__ = function.__kwdefaults__
                copy.pytestmark = marks  # type: ignore[attr-defined]
                setattr(suite, test, copy if kept else None)


def _elements(value: Shape | Outliers) -> int:
    return math.prod(value.shape if isinstance(value, Outliers) else value)


def _along(vector: NDArray[Any], shape: Shape) -> NDArray[Any]:
    return vector[:, None] if len(shape) == 3 else vector


def _magnitudes(rng: np.random.Generator, count: int, low: float, high: float) -> Channels:
    return 10.0 ** rng.uniform(math.log10(low), math.log10(high), count)


def _signs(rng: np.random.Generator, count: int) -> Channels:
    return rng.choice([-1.0, 1.0], count)
