"""The plots of the report, as SVG files: the share of the limit, by shape and by size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import figures
from cases import LAYOUTS, OPERATIONS, Case
from saved import LIMIT, Run

SHOWN = {  # contender: colour, marker; filled where it writes to memory that is there already
    "cython out=": ("C0", "o"),
    "cython": ("C0", "o"),
    "numba out=": ("C1", "s"),
    "numba": ("C1", "s"),
    "torch": ("C3", "^"),
    "onnxruntime out=": ("C2", "v"),
    "OpenVINO out=": ("C4", "D"),
    "NumPy folded out=": ("C7", "P"),
    "NumPy formula": ("C7", "X"),
}


def save(run: Run, directory: Path) -> list[tuple[str, str]]:
    """Write the plots that the run has rows for; return the title and the file of each."""
    pictures: dict[str, tuple[str, dict[str, tuple[str, ...]], Callable[[Case], str]]] = {}
    for operation in OPERATIONS:
        pictures[operation] = (
            f"Share of the limit: {operation}, float32",
            {layout: ("shapes", operation, layout, "float32") for layout in LAYOUTS},
            lambda case: case.label,
        )
    pictures["sizes"] = (
        "Share of the limit: 4 to 128 million elements, NCHW, float32",
        {operation: ("sizes", operation) for operation in OPERATIONS},
        lambda case: f"$2^{{{case.elements.bit_length() - 1}}}$",
    )
    saved = []
    for name, (title, keys, tick) in pictures.items():
        panels = {
            panel: cases
            for panel, key in keys.items()
            if (cases := [case for case in run.groups if case[: len(key)] == key])
        }
        if panels:
            file = f"measured-{name}.svg"
            figures.save(
                directory / file,
                list(panels),
                lambda axes, name, panels=panels, tick=tick: _panel(run, axes, panels[name], tick),
                "limit / time",
            )
            saved.append((title, file))
    return saved


def _panel(run: Run, axes: Any, cases: list[Case], tick: Callable[[Case], str]) -> None:
    labels = [tick(case) for case in cases]
    for name, (colour, marker) in SHOWN.items():
        shares = [run.ratio(case, LIMIT, name) for case in cases]
        points = [
            (at, share) for at, share in zip(labels, shares, strict=True) if share is not None
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                marker=marker,
                markerfacecolor=colour if name.endswith("out=") else "none",
                linestyle="-" if name.endswith("out=") else ":",
                linewidth=0.8,
                markersize=4,
                label=name,
            )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylim(0, 1.15)
    axes.tick_params(axis="x", rotation=40)
    for text in axes.get_xticklabels():
        text.set_horizontalalignment("right")
