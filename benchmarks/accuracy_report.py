"""Tables and plots of what `accuracy` has measured: docs/accuracy-measured.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from accuracy_cells import FEW_RATIOS, RATIOS, RATIOS_16BIT, TYPICAL, Cell, Row
from subjects import DTYPES, LAYOUTS, OPERATIONS, SUBJECTS

from bnfast.testing.reference import FORMATS

UNITS = {
    "inference": "y, in ulps of t",
    "training": "y, in ulps of t",
    "backward": "dx, in ulps of the sum of its terms' magnitudes",
    "residual": "y, in ulps of t",
}
LEAST = 100
"""Of fewer elements mean/std can be anything, whatever it was drawn with."""

TITLES = {"residual": "Inference and a residual"}


class Report(NamedTuple):
    """Rows and what they depend on."""

    circumstances: dict[str, Any]
    rows: list[Row]

    def saved(self) -> dict[str, Any]:
        """Return everything as JSON holds it."""
        return {"circumstances": self.circumstances, "rows": self.rows}

    def subjects(self, operation: str, dtype: str) -> list[str]:
        """Return the columns of an operation and a dtype: those of one name in two layouts apart.

        bnfast's layouts share a column, and so do a peer's that has one.
        """
        cells = [r for r in self.rows if r.cell.operation == operation and r.cell.dtype == dtype]
        return [
            column
            for name in SUBJECTS
            for column in columns_of(name)
            if any(self._is(row, column) for row in cells)
        ]

    def select(
        self, column: str, operation: str, dtype: str, ratio: float | None = None, count: int = 0
    ) -> list[Row]:
        """Return the rows of a column, of all ratios and counts but where one is given."""
        return [
            row
            for row in self.rows
            if self._is(row, column)
            and row.cell.operation == operation
            and row.cell.dtype == dtype
            and ratio in (None, row.cell.ratio)
            and count in (0, row.cell.count)
        ]

    def many(self, column: str, operation: str, dtype: str, ratio: float) -> list[Row]:
        """Return the same for a ratio, without counts below `LEAST`."""
        rows = self.select(column, operation, dtype, ratio)
        return [row for row in rows if row.cell.count >= LEAST]

    @staticmethod
    def _is(row: Row, column: str) -> bool:
        name, _, layout = column.partition(", in ")
        return row.subject == name and layout in ("", row.layout)


def columns_of(name: str) -> list[str]:
    """Return the columns of a subject."""
    return [f"{name}, in {layout}" for layout in LAYOUTS] if name == "torch" else [name]


def read(paths: list[Path]) -> Report:
    """Return what files hold, together. Of two that have measured the same, the later counts."""
    rows: dict[tuple[str, str, Cell], Row] = {}
    circumstances: dict[str, Any] = {}
    for path in paths:
        saved = json.loads(path.read_text(encoding="utf-8"))
        circumstances = saved["circumstances"]
        for name, layout, cell, *rest in saved["rows"]:
            rows[name, layout, Cell(*cell)] = Row(name, layout, Cell(*cell), *rest)
    return Report(circumstances, list(rows.values()))


def write(report: Report, directory: Path) -> None:
    """Write the page and its plots."""
    import accuracy_plots  # here, because matplotlib takes a second

    pictures = accuracy_plots.save(report, directory)
    text = "\n".join(page(report, pictures))
    (directory / "accuracy-measured.md").write_text(text + "\n", encoding="utf-8")


def page(report: Report, pictures: list[tuple[str, str]]) -> Iterator[str]:
    """Yield the lines of the page; a picture is a title and a file."""
    yield "# Accuracy, measured"
    yield ""
    yield "Written by `benchmarks/accuracy.py`. What it means, and what is promised:"
    yield "[accuracy](accuracy.md)."
    yield ""
    yield from _circumstances(report)
    yield ""
    yield "## Against the bounds"
    yield ""
    yield from _bounds(report)
    for title, file in pictures:
        yield ""
        yield f"![{title}]({file})"
    for operation in OPERATIONS:
        for dtype in DTYPES:
            if report.subjects(operation, dtype):
                yield ""
                yield f"## {TITLES.get(operation, operation.title())}, {dtype}"
                yield ""
                yield f"Errors of {UNITS[operation]}."
                yield ""
                yield from _by_ratio(report, operation, dtype)
                yield ""
                yield from _by_count(report, operation, dtype)
                yield ""
                yield from _distribution(report, operation, dtype)


def _circumstances(report: Report) -> Iterator[str]:
    yield "|  |  |"
    yield "|---|---|"
    for name, value in report.circumstances.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        yield f"| {name} | {value} |"


def _bounds(report: Report) -> Iterator[str]:
    """The largest share of the contract's bound, over all ratios and counts."""
    yield "The largest error of y and dx as a share of the bound that the contract has for a dtype;"
    yield "that of dweight and dbias in ulps of the parameters' dtype at the sum of their terms'"
    yield "magnitudes, |xhat| at least 1, and for float64 by 1 + |mean|/std. Over all n, both"
    yield "layouts, and mean/std up to 1e6; in brackets with 1e7, of which nothing is promised."
    yield ""
    names = [name for name in SUBJECTS if SUBJECTS[name].backend is not None]
    yield "| | " + " | ".join(names) + " |"
    yield "|---" * (len(names) + 1) + "|"
    for dtype in DTYPES:
        for operation in OPERATIONS:
            shares = [_share(report.select(name, operation, dtype), "bound") for name in names]
            yield f"| {operation}, {dtype} | " + " | ".join(shares) + " |"
        sums = [_share(report.select(name, "backward", dtype), "sums") for name in names]
        yield f"| dweight and dbias, {dtype} | " + " | ".join(sums) + " |"


def _share(rows: list[Row], what: str) -> str:
    if not rows:
        return ""
    promised = max(getattr(row, what) for row in rows if row.cell.ratio <= 1e6)
    beyond = max(getattr(row, what) for row in rows)
    return figure(promised) + (f" ({figure(beyond)})" if beyond > promised else "")


def _by_ratio(report: Report, operation: str, dtype: str) -> Iterator[str]:
    columns = report.subjects(operation, dtype)
    few = ", ".join(f"{r:g}" for r in FEW_RATIOS)
    yield f"Largest, over all n from {LEAST} on; a million and more were taken at {few} alone:"
    yield ""
    yield "| mean/std | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for ratio in RATIOS_16BIT if dtype in FORMATS else RATIOS:
        figures = [_largest(report.many(c, operation, dtype, ratio)) for c in columns]
        yield f"| {ratio:.0e} | ".replace("e+0", "e") + " | ".join(figures) + " |"


def _by_count(report: Report, operation: str, dtype: str) -> Iterator[str]:
    columns = report.subjects(operation, dtype)
    ratio = 1.0 if dtype in FORMATS else 1e3
    counts = sorted({row.cell.count for row in report.rows if row.cell.ratio == ratio})
    yield f"Largest, at mean/std = {ratio:g}:"
    yield ""
    yield "| n | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for count in counts:
        figures = [_largest(report.select(c, operation, dtype, ratio, count)) for c in columns]
        if any(figures):
            yield f"| {count:,} | " + " | ".join(figures) + " |"


def _distribution(report: Report, operation: str, dtype: str) -> Iterator[str]:
    ratios = (1.0, 10.0) if dtype in FORMATS else (1.0, 1e3)
    yield f"Mean, median, and percentiles, at n = {TYPICAL:,}; of two layouts the larger:"
    yield ""
    yield "| | mean/std | mean | median | 99 % | 99.9 % | largest |"
    yield "|---" * 7 + "|"
    for column in report.subjects(operation, dtype):
        for ratio in ratios:
            rows = report.select(column, operation, dtype, ratio, TYPICAL)
            if rows:
                figures = (
                    figure(max(getattr(row, what) for row in rows))
                    for what in ("mean", "median", "p99", "p999", "largest")
                )
                yield f"| {column} | {ratio:g} | " + " | ".join(figures) + " |"


def _largest(rows: list[Row]) -> str:
    return figure(max(row.largest for row in rows)) if rows else ""


def figure(value: float) -> str:
    """Return a number with two or three digits."""
    if value == 0 or value == float("inf"):
        return "not finite" if value else "0"
    if value >= 1e5:
        return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if value >= 100 else f"{value:.{1 if value >= 10 else 2}f}"
