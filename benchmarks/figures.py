"""How the figures of the docs look: panels side by side, with one legend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

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


def save(path: Path, names: Sequence[str], draw: Callable[[Any, str], None], label: str) -> None:
    """Write a figure of one panel for each name, which ``draw(axes, name)`` fills."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    all_axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axes, name in zip(all_axes, names, strict=True):
        draw(axes, name)
        axes.set_title(name)
        lines, shown = axes.get_legend_handles_labels()
        handles |= dict(zip(shown, lines, strict=True))
    all_axes[0].set_ylabel(label)
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", frameon=False)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
