"""Plots of errors over mean/std and over n, as SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import figures
from accuracy_report import LEAST, Report

from bnfast import spec

# name: colour, marker
SHOWN = {
    "cython": ("C0", "o"),
    "numba": ("C1", "s"),
    "numpy": ("C2", "D"),
    "torch, in NCHW": ("C3", "^"),
    "torch, in channels-last": ("C3", "v"),
    "NumPy formula": ("C7", "X"),
    "NumPy folded": ("C7", "P"),
    "onnxruntime": ("C4", "<"),
    "OpenVINO": ("C5", ">"),
}

OPERATIONS = ("inference", "training", "backward")
BOUNDS = {"inference": spec.Y_ULPS_FLOAT32, "training": spec.Y_ULPS_FLOAT32}


def save(report: Report, directory: Path) -> list[tuple[str, str]]:
    """Write the plots; return the title and the file of each."""
    saved = []
    for dtype in ("float32", "float64"):
        saved.append(
            (f"Largest error over mean/std, {dtype}, n from {LEAST} on", f"accuracy-{dtype}.svg")
        )
        _write(report, dtype, "ratio", directory / saved[-1][1])
    saved.append(("Largest error over n, float32, mean/std = 1000", "accuracy-n.svg"))
    _write(report, "float32", "count", directory / saved[-1][1])
    return saved


def _write(report: Report, dtype: str, over: str, path: Path) -> None:
    def draw(axes: Any, operation: str) -> None:
        _panel(report, axes, operation, dtype, over)

    figures.save(path, OPERATIONS, draw, "largest error, ulps")


def _panel(report: Report, axes: Any, operation: str, dtype: str, over: str) -> None:
    for name, (colour, marker) in SHOWN.items():
        largest: dict[float, float] = {}
        for row in report.select(name, operation, dtype, 1e3 if over == "count" else None):
            if over == "ratio" and row.cell.count < LEAST:
                continue
            at = getattr(row.cell, over)
            largest[at] = max(row.largest, largest.get(at, 0.0))
        if largest:
            axes.plot(
                *zip(*sorted(largest.items()), strict=True),
                color=colour,
                marker=marker,
                linewidth=0.8,
                markersize=4,
                markerfacecolor=colour if name in ("cython", "numba", "numpy") else "none",
                label=name,
            )
    if dtype == "float32":
        bound = BOUNDS.get(operation, spec.DX_ULPS_FLOAT32)
        axes.axhline(bound, color="black", linewidth=0.8, linestyle="--", label="bound of bnfast")
    axes.set_xlabel("mean/std" if over == "ratio" else "n")
    axes.set_xscale("log")
    axes.set_yscale("log")
