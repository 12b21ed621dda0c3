"""What bnfast aims at, as ratios of one run, and whether the run met it.

A line has one target and a figure for each backend, with and without ``out=``. *Body* is every
shape but the smallest, whose time is not spent on memory; *big* is every shape whose x is of more
than 50 MB. Times are compared round by round (`saved.Run.ratio`).

The goals on a GPU are a table of their own, where *large* is every x of 100 MB and more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import geometric_mean
from typing import NamedTuple

import numpy as np
from cases import (
    BIG,
    CHANNELS,
    LARGE,
    LAYOUTS,
    OPERATIONS,
    RANKS,
    RESNET50,
    SHAPES,
    SIZES,
    STORAGE,
    Case,
    Shape,
)
from saved import LIMIT, Run

COLUMNS = ("cython out=", "cython", "numba out=", "numba")
OUT = ("cython out=", "numba out=")
FRESH = ("cython", "numba")
NUMBA = ("numba out=", "numba")
GPU_COLUMNS = ("cuda out=", "cuda")

SMALL = SHAPES[:1]
BODY = SHAPES[1:]

ON_GPU = tuple(
    (suite, shape)
    for suite, shapes in {"gpu": SHAPES, "gpu-large": LARGE}.items()
    for shape in shapes
    if 4 * np.prod(shape) >= 100e6
)
"""Suites and shapes of large arrays."""

Figure = Callable[[str], float | None]
"""From a column to its figure; None where the run lacks a row for it."""


class Line(NamedTuple):
    """One goal."""

    text: str
    at_least: bool
    target: float
    figure: Figure
    columns: tuple[str, ...] = COLUMNS

    def met(self, value: float) -> bool:
        """Return whether a figure reaches the target."""
        return value >= self.target if self.at_least else value <= self.target


def lines(run: Run) -> Iterator[Line]:
    """Yield every goal."""
    yield from _inference(run)
    yield from _training(run)
    yield from _backward(run)
    yield from _numba(run)
    yield from _evenness(run)
    yield from _ranks(run)
    yield from _epilogues(run)
    yield from _storage(run)


def gpu_lines(run: Run) -> Iterator[Line]:
    """Yield every goal on a GPU."""
    for operation, target in {"inference": 0.92, "training": 0.85, "backward": 0.80}.items():
        for layout in LAYOUTS:
            large = [Case(suite, operation, layout, "float32", shape) for suite, shape in ON_GPU]
            share = _over_cases(run, large, _share)(min)
            text = f"{operation} {layout}, limit / time: least of large"
            yield Line(text, True, target, share, GPU_COLUMNS)
    for operation in OPERATIONS:
        shapes = _over(run, operation, "NCHW", RESNET50, _device_time, suite="gpu-resnet50")
        text = f"{operation} NCHW, ResNet-50, torch / time, both on the device"
        yield Line(f"{text}: mean", True, 1.3, shapes(geometric_mean), GPU_COLUMNS)
        yield Line(f"{text}: least", True, 0.9, shapes(min), GPU_COLUMNS)
    small = _over(run, "inference", "NCHW", SMALL, _microseconds, suite="gpu")
    yield Line("inference of (1,64,8,8), microseconds", False, 40, small(max), GPU_COLUMNS)


def _inference(run: Run) -> Iterator[Line]:
    for layout in LAYOUTS:
        share = _over(run, "inference", layout, BODY, _share)
        name = f"inference {layout}, limit / time"
        yield Line(f"{name}: mean over body", True, 0.90, share(geometric_mean), OUT)
        yield Line(f"{name}: least of body", True, 0.80, share(min), OUT)
    for layout in LAYOUTS:
        kept = _over(run, "inference", layout, SHAPES, _kept_without_out)
        text = f"inference {layout}, time with `out=` / without, calls of 50 us or more: least"
        yield Line(text, True, 0.90, kept(min), FRESH)
    peers = _over(run, "inference", "NCHW", SHAPES, _peer)
    name = "inference NCHW, fastest peer / time"
    yield Line(f"{name}: mean over all", True, 1.8, peers(geometric_mean))
    yield Line(f"{name}: least", True, 0.95, peers(min))
    torch = _over(run, "inference", "NCHW", BIG, _to("torch"))
    yield Line("inference NCHW, torch / time: mean over big", True, 5, torch(geometric_mean))
    for peer in ("torch", "NumPy folded out="):
        small = _over(run, "inference", "NCHW", SMALL, _times(peer))
        text = f"`bn(x)` of (1,64,8,8), time / {peer}"
        yield Line(text, False, 0.5 if peer == "torch" else 1, small(max), FRESH)


def _training(run: Run) -> Iterator[Line]:
    bounds = {
        "NCHW": (("big", BIG, 1.45, 1.65), ("body", BODY, 1.7, None)),
        "NHWC": (("big", BIG, 1.8, 2.0),),
    }
    for layout, sets in bounds.items():
        for name, shapes, mean, most in sets:
            times = _over(run, "training", layout, shapes, _times(LIMIT))
            text = f"training {layout}, time / limit"
            yield Line(f"{text}: mean over {name}", False, mean, times(geometric_mean))
            if most is not None:
                yield Line(f"{text}: most of {name}", False, most, times(max))
        torch = _over(run, "training", layout, BODY, _to("torch"))
        least = {"NCHW": 4, "NHWC": 1.5}[layout]
        text = f"training {layout}, torch / time: mean over body"
        yield Line(text, True, least, torch(geometric_mean))
        peers = _over(run, "training", layout, SHAPES, _peer)
        yield Line(f"training {layout}, fastest peer / time: least", True, 1, peers(min))


def _backward(run: Run) -> Iterator[Line]:
    times = _over(run, "backward", "NCHW", BIG, _times(LIMIT))
    yield Line("backward NCHW, time / limit: mean over big", False, 1.5, times(geometric_mean))
    yield Line("backward NCHW, time / limit: most of big", False, 1.7, times(max))
    torch = _over(run, "backward", "NCHW", BODY, _to("torch"))
    text = "backward NCHW, torch / time: mean over body"
    yield Line(text, True, 2.5, torch(geometric_mean))


def _numba(run: Run) -> Iterator[Line]:
    for operation in OPERATIONS:
        for layout in LAYOUTS:
            times = _over(run, operation, layout, SHAPES, _to_cython)
            text = f"{operation} {layout}, numba / cython"
            yield Line(f"{text}: mean over all", False, 1.2, times(geometric_mean), NUMBA)
            yield Line(f"{text}: most", False, 1.45, times(max), NUMBA)


def _evenness(run: Run) -> Iterator[Line]:
    """Yield the goals on sizes, channels and dtypes: the share of the limit stays the same."""
    for operation in OPERATIONS:
        sizes = _over(run, operation, "NCHW", SIZES, _share, suite="sizes")
        text = f"{operation} NCHW, 2^22 to 2^27 elements, limit / time: most less least"
        yield Line(text, False, 0.15, sizes(np.ptp), OUT)
    for layout in LAYOUTS:
        channels = _over(run, "inference", layout, CHANNELS, _to_fastest, suite="channels")
        text = f"inference {layout}, 1, 3 and 64 channels, time / the least: most"
        yield Line(text, False, 1.25, channels(max), OUT)
    for operation in OPERATIONS:
        for layout in LAYOUTS:
            single, double = (
                _over(run, operation, layout, BODY, _share, dtype=dtype)(geometric_mean)
                for dtype in ("float32", "float64")
            )
            text = f"{operation} {layout}, limit / time, mean over body: float32 less float64"
            yield Line(text, False, 0.05, _difference(single, double), OUT)


def _ranks(run: Run) -> Iterator[Line]:
    for operation in ("inference", "training"):
        for shape, layout, other in RANKS:
            own, same = (
                _over(run, operation, at, [of], _share, suite="ranks")(max)
                for at, of in (("NCHW", shape), (layout, other))
            )
            labels = (Case("", "", "", "", of).label for of in (other, shape))
            text = "{}, limit / time: {} {} less {}".format(operation, layout, *labels)
            yield Line(text, False, 0.05, _difference(same, own), OUT)


def _epilogues(run: Run) -> Iterator[Line]:
    for layout in LAYOUTS:
        relu = _over(run, "inference", layout, BIG, _to_plain, suite="epilogue-relu")
        text = f"inference {layout} with ReLU, time / without: most of big"
        yield Line(text, False, 1.05, relu(max), OUT)
        residual = _over(run, "inference", layout, BIG, _share, suite="epilogue-residual")
        text = f"inference {layout} with a residual, limit of two reads and a write / time"
        yield Line(f"{text}: least of big", True, 0.85, residual(min), OUT)


def _storage(run: Run) -> Iterator[Line]:
    for operation in ("inference", "training"):
        for layout in LAYOUTS:
            for dtype in STORAGE:
                times = _over(run, operation, layout, BIG, _to_float32, "storage", dtype)(max)
                text = f"{operation} {layout}, time / float32: most of big, {dtype}"
                yield Line(text, False, 0.6, times, ("cython out=", "cython"))
                yield Line(text, False, 0.7, times, NUMBA)


Ratio = Callable[[Run, Case, str], float | None]


def _share(run: Run, case: Case, column: str) -> float | None:
    return run.ratio(case, LIMIT, column)


def _times(other: str) -> Ratio:
    return lambda run, case, column: run.ratio(case, column, other)


def _to(other: str) -> Ratio:
    return lambda run, case, column: run.ratio(case, other, column)


def _to_cython(run: Run, case: Case, column: str) -> float | None:
    return run.ratio(case, column, column.replace("numba", "cython"))


def _to_fastest(run: Run, case: Case, column: str) -> float | None:
    others = [case._replace(shape=shape) for shape in CHANNELS]
    ratios = [run.ratio(case, column, column, other) for other in others]
    present = [ratio for ratio in ratios if ratio is not None]
    return max(present) if len(present) == len(ratios) else None


def _to_plain(run: Run, case: Case, column: str) -> float | None:
    return run.ratio(case, column, column, case._replace(suite="epilogue-plain"))


def _to_float32(run: Run, case: Case, column: str) -> float | None:
    return run.ratio(case, column, column, case._replace(dtype="float32"))


def _peer(run: Run, case: Case, column: str) -> float | None:
    found = run.fastest_peer(case, column)
    return None if found is None else found[0]


def _kept_without_out(run: Run, case: Case, column: str) -> float | None:
    seconds = run.seconds(case, column)
    if seconds is not None and seconds < 50e-6:
        return float("inf")  # not among the calls that the goal is about
    return run.ratio(case, f"{column} out=", column)


def _device_time(run: Run, case: Case, column: str) -> float | None:
    torch, own = (run.device_seconds(case, name) for name in ("torch", column))
    return None if torch is None or own is None else torch / own


def _microseconds(run: Run, case: Case, column: str) -> float | None:
    seconds = run.seconds(case, column)
    return None if seconds is None else 1e6 * seconds


def _over(
    run: Run,
    operation: str,
    layout: str,
    shapes: Sequence[Shape],
    ratio: Ratio,
    suite: str = "shapes",
    dtype: str = "float32",
) -> Callable[[Callable[[list[float]], float]], Figure]:
    """Return `_over_cases` for cases that differ in their shapes alone."""
    cases = [Case(suite, operation, layout, dtype, shape) for shape in shapes]
    return _over_cases(run, cases, ratio)


def _over_cases(
    run: Run, cases: Sequence[Case], ratio: Ratio
) -> Callable[[Callable[[list[float]], float]], Figure]:
    """Return a function that makes a figure of a summary: of the ratio's values over the cases."""

    def summarised(summary: Callable[[list[float]], float]) -> Figure:
        def figure(column: str) -> float | None:
            values = [ratio(run, case, column) for case in cases]
            present = [value for value in values if value is not None]
            return float(summary(present)) if len(present) == len(values) else None

        return figure

    return summarised


def _difference(one: Figure, other: Figure) -> Figure:
    def figure(column: str) -> float | None:
        a, b = one(column), other(column)
        return None if a is None or b is None else a - b

    return figure


def tables(run: Run) -> Iterator[str]:
    """Yield the goals of the host, those on a GPU, or both: as the run has rows."""
    on_gpu = {case.on_gpu for case in run.groups}
    if on_gpu != {True}:
        yield from table(lines(run), COLUMNS)
    if len(on_gpu) == 2:
        yield ""
    if True in on_gpu:
        yield from table(gpu_lines(run), GPU_COLUMNS)


def table(goals: Iterator[Line], columns: tuple[str, ...]) -> Iterator[str]:
    """Yield the lines of a Markdown table: each goal that was measured, its target, its figures."""
    yield "| goal | target | " + " | ".join(columns) + " |"
    yield "|---|---|" + "---|" * len(columns)
    missing = 0
    for line in goals:
        cells = [_cell(line, column) for column in columns]
        if any(cells):
            sign = "≥" if line.at_least else "≤"
            yield f"| {line.text} | {sign} {line.target:g} | " + " | ".join(cells) + " |"
        else:
            missing += 1
    if missing:
        yield ""
        yield f"Goals that this run has no rows for: {missing}."


def _cell(line: Line, column: str) -> str:
    if column not in line.columns:
        return ""
    value = line.figure(column)
    if value is None:
        return ""
    return f"{value:.2f} met" if line.met(value) else f"**{value:.2f} missed**"
