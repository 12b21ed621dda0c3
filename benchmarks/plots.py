"""The plots of the report, as SVG files: the share of the limit, by shape and by size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from cases import LAYOUTS, OPERATIONS, Case
from matplotlib.figure import Figure
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

mpl.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "bnfast",  # the same file for the same figures
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)


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
            _write(run, panels, tick, directory / file)
            saved.append((title, file))
    return saved


def _write(
    run: Run, panels: dict[str, list[Case]], tick: Callable[[Case], str], path: Path
) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axes, (name, cases) in zip(all_axes, panels.items(), strict=True):
        _panel(run, axes, cases, [tick(case) for case in cases])
        axes.set_title(name)
        lines, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, lines, strict=True))
    all_axes[0].set_ylabel("limit / time")
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", frameon=False)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def _panel(run: Run, axes: Any, cases: list[Case], labels: list[str]) -> None:
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
