"""The accuracy report: what it measures is right, and what it measures is within the bounds."""

from __future__ import annotations

import json

import accuracy
import accuracy_report
import numpy as np
import pytest
from accuracy import Judge
from accuracy_cells import COUNTS, Cell, Row, cells
from accuracy_report import Report
from subjects import LAYOUTS, OPERATIONS, SUBJECTS

BACKENDS = ("cython", "numba", "numpy", "cython, no FMA")
SMALL = [
    Cell(operation, dtype, count, ratio)
    for operation in OPERATIONS
    for dtype, ratio in (("float32", 1e3), ("float64", 1e6), ("float16", 10.0), ("bfloat16", 1.0))
    for count in (2, 100)
]


def title(cell):
    return f"{cell.operation}-{cell.dtype}-{cell.count}"


@pytest.mark.parametrize("cell", SMALL, ids=title)
def test_backends_are_within_the_bounds(rng, cell):
    if cell.dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    rows = list(accuracy.measure(cell, rng, BACKENDS))
    present = [name for name in BACKENDS if SUBJECTS[name].absent() is None]
    assert {(row.subject, row.layout) for row in rows} == {
        (name, layout) for name in present for layout in LAYOUTS
    }
    for row in rows:
        assert 0 < row.mean <= row.p99 <= row.p999 <= row.largest
        assert row.bound <= 1, row
        assert row.sums <= (0 if cell.operation != "backward" else 4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_errors_are_those_that_were_made(rng, layout):
    cell = Cell("training", "float32", 40, 1e2)
    drawn = accuracy.draw(rng, cell, 6)
    judge = Judge(drawn, cell)
    ((_, exact, unit, _),) = judge.parts
    nearest = exact.high.astype(np.float32)
    nearest_row = judge.judge("numpy", layout, in_shape(nearest))
    assert nearest_row.largest <= 0.5
    wrong = nearest.astype(np.float64)
    wrong[4, 7] = exact.high[4, 7] + 30 * unit[4, 7]
    row = judge.judge("numpy", layout, in_shape(wrong))
    assert row.largest == pytest.approx(30)
    assert row.bound == pytest.approx(12)
    wrong[4, 7] = np.nan
    assert judge.judge("numpy", layout, in_shape(wrong)).largest == np.inf


def in_shape(rows):
    """Return rows of 40 elements as `accuracy.handed_over` lays them: four samples."""
    return rows.reshape(len(rows), 4, 1, -1).transpose(1, 0, 2, 3)


def test_a_problem_is_the_same_in_both_layouts(rng):
    drawn = accuracy.draw(rng, Cell("backward", "float32", 12, 1.0), 5)
    first, last = (
        accuracy.handed_over(drawn, Cell("backward", "float32", 12, 1.0), layout)
        for layout in LAYOUTS
    )
    assert first.x.shape == (4, 5, 1, 3)
    assert first.x.flags.c_contiguous
    assert last.x.transpose(0, 2, 3, 1).flags.c_contiguous
    np.testing.assert_array_equal(first.x, last.x)
    np.testing.assert_array_equal(np.moveaxis(first.x, 1, 0).reshape(5, 12), drawn.x)


@pytest.fixture
def report():
    """Return a report with figures that are easy to find again."""
    rows = [
        Row(name, layout, Cell(operation, dtype, count, ratio), 0.1, 0.2, 0.3, 0.4, largest, 0.5, 0)
        for operation in ("inference", "training", "backward")
        for dtype in ("float32", "float64")
        for count in (100, 10_000)
        for ratio in (1.0, 1e3, 1e7)
        for name, layout, largest in (
            ("cython", LAYOUTS[0], 1.25),
            ("cython", LAYOUTS[1], 1.5),
            ("torch", LAYOUTS[0], 123.0),
            ("torch", LAYOUTS[1], 4567.0),
        )
    ]
    return Report({"versions": {"numpy": "2"}}, rows)


def test_tables_hold_the_larger_of_two_layouts_but_for_torch(report):
    text = "\n".join(accuracy_report.page(report, []))
    assert "| mean/std | cython | torch, in NCHW | torch, in channels-last |" in text
    assert "| 1e3 | 1.50 | 123 | 4,567 |" in text
    assert "| 10,000 | 1.50 | 123 | 4,567 |" in text
    assert "| inference, float32 | 0.50 |" in text
    assert "| torch, in channels-last | 1000 | 0.10 | 0.20 | 0.30 | 0.40 | 4,567 |" in text


def test_the_later_of_two_files_counts(report, tmp_path):
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    paths[0].write_text(json.dumps(report.saved()))
    later = Report(report.circumstances, [report.rows[0]._replace(largest=9.0)])
    paths[1].write_text(json.dumps(later.saved()))
    read = accuracy_report.read(paths)
    assert len(read.rows) == len(report.rows)
    assert read.rows[0].largest == 9.0
    assert read.rows[1:] == report.rows[1:]


def test_plots_are_written(report, tmp_path):
    pytest.importorskip("matplotlib")
    accuracy_report.write(report, tmp_path)
    page = (tmp_path / "accuracy-measured.md").read_text(encoding="utf-8")
    for file in ("accuracy-float32.svg", "accuracy-float64.svg", "accuracy-n.svg"):
        assert f"({file})" in page
        assert "torch" in (tmp_path / file).read_text(encoding="utf-8")


def test_cells_go_to_what_is_promised():
    found = list(cells(("training",), ("float32", "float16"), COUNTS))
    wide = [cell for cell in found if cell.dtype == "float32"]
    assert {cell.ratio for cell in wide} == {10.0**power for power in range(8)}
    assert {cell.count for cell in wide} == {2, *(10**power for power in range(1, 8))}
    assert len(found) == len(set(found))
