"""From a command line to a report: what is timed, what is saved, and what is made of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import goals
import pytest
import report
from cases import CHANNELS, SHAPES, Case
from saved import Run

ROOT = Path(__file__).parents[1]


def run_pytest(*arguments: str) -> str:
    """Return what pytest prints, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    finished = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_a_named_run_is_timed_and_reported(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    rows = "shapes-inference-NCHW-float32-1x64x8x8 and (formula or limit)"
    run_pytest("benchmarks", "-k", rows, f"--benchmark-json={file}", "--benchmark-min-rounds=2")
    run = Run([file])
    (case,) = run.groups
    assert case == Case("shapes", "inference", "NCHW", "float32", SHAPES[0])
    assert {name: len(times) for name, times in run.groups[case].items()} == {
        "NumPy formula": 2,
        "limit": 2,
    }
    info = run.info[case, "limit"]
    assert info["bytes"] == 2 * 4 * 64 * 64
    assert {"threads", "instruction_set", "versions", "GB/s", "variants"} <= info.keys()
    page = "\n".join(report.page(run, []))
    times = r"\| \(1,64,8,8\) \| [\d.]+ \| [\d.]+ \|"
    assert re.search(times, page)


def test_a_run_of_everything_is_not_timed() -> None:
    printed = run_pytest("-o", "testpaths=benchmarks", "--collect-only", "-q")
    assert "shapes-inference-NCHW-float32-1x64x8x8-limit" in printed
    assert "32x64x112x112" not in printed
    assert "sizes" not in printed


def saved_run(tmp_path: Path, name: str, rows: dict[tuple[Case, str], list[float]]) -> Path:
    """Return a file as pytest-benchmark writes it, with these rounds."""
    benchmarks: list[dict[str, Any]] = [
        {
            "stats": {"data": rounds},
            "extra_info": {
                **case._asdict(),
                "contender": contender,
                "threads": 2,
                "instruction_set": "any",
                "versions": {"numpy": "2"},
            },
        }
        for (case, contender), rounds in rows.items()
    ]
    benchmarks.append({"stats": {"data": [1.0]}, "extra_info": {}})  # the benchmark of the import
    machine = {"machine": "m", "cpu": {}, "bnfast": {"versions": {}, "platform": "p"}}
    path = tmp_path / name
    text = {"machine_info": machine, "datetime": "2026-01-02T03", "benchmarks": benchmarks}
    path.write_text(json.dumps(text))
    return path


@pytest.fixture
def inference(tmp_path: Path) -> Run:
    """Return a run that slows down by half in its second round, the same for everyone."""
    seconds = {
        "limit": 0.9e-3,
        "cython out=": 1e-3,
        "cython": 1.25e-3,
        "torch": 6e-3,
        "OpenVINO out=": 1.8e-3,
    }
    rows = {
        (Case("shapes", "inference", "NCHW", "float32", shape), name): [time, 2 * time, time]
        for shape in SHAPES
        for name, time in seconds.items()
    }
    return Run([saved_run(tmp_path, "a.json", rows)])


def figures(run: Run) -> dict[str, dict[str, float | None]]:
    return {
        line.text: {column: line.figure(column) for column in line.columns}
        for line in goals.lines(run)
    }


def test_goals_are_ratios_of_rounds(inference: Run) -> None:
    found = figures(inference)
    share = found["inference NCHW, limit / time: mean over body"]
    assert share == {"cython out=": pytest.approx(0.9), "numba out=": None}
    kept = found["inference NCHW, time with `out=` / without, calls of 50 us or more: least"]
    assert kept["cython"] == pytest.approx(0.8)
    # who allocates its result is compared with whoever does so too
    peers = found["inference NCHW, fastest peer / time: least"]
    assert peers["cython out="] == pytest.approx(1.8)
    assert peers["cython"] == pytest.approx(4.8)
    assert found["`bn(x)` of (1,64,8,8), time / torch"]["cython"] == pytest.approx(1.25 / 6)
    assert found["training NCHW, time / limit: mean over big"]["cython"] is None


def test_channels_are_compared_round_by_round(tmp_path: Path) -> None:
    cases = [Case("channels", "inference", "NCHW", "float32", shape) for shape in CHANNELS]
    assert len({case.turns for case in cases}) == 1
    factors = dict(zip(cases, (1.0, 1.1, 1.3), strict=True))
    rows = {
        (case, "cython out="): [factor * time for time in (1e-3, 5e-3, 2e-3)]
        for case, factor in factors.items()
    }
    run = Run([saved_run(tmp_path, "channels.json", rows)])
    most = figures(run)["inference NCHW, 1, 3 and 64 channels, time / the least: most"]
    assert most["cython out="] == pytest.approx(1.3)


def test_a_goal_is_met_or_missed_or_left_out(inference: Run) -> None:
    text = "\n".join(goals.tables(inference))
    assert "| inference NCHW, limit / time: least of body | ≥ 0.8 | 0.90 met |" in text
    assert "calls of 50 us or more: least | ≥ 0.9 |  | **0.80 missed** |" in text
    assert "training" not in text
    assert re.search(r"Goals that this run has no rows for: \d+", text)


def test_a_goal_wants_every_shape(inference: Run) -> None:
    del inference.groups[Case("shapes", "inference", "NCHW", "float32", SHAPES[3])]
    share = figures(inference)["inference NCHW, limit / time: mean over body"]
    assert share["cython out="] is None


def test_the_later_of_two_files_counts(tmp_path: Path) -> None:
    case = Case("shapes", "inference", "NCHW", "float32", SHAPES[0])
    one = saved_run(tmp_path, "one.json", {(case, "limit"): [1.0], (case, "torch"): [2.0]})
    two = saved_run(tmp_path, "two.json", {(case, "limit"): [3.0]})
    run = Run([one, two])
    assert run.seconds(case, "limit") == 3.0
    assert run.seconds(case, "torch") is None


def test_plots_are_written(inference: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import plots

    ((title, file),) = plots.save(inference, tmp_path)
    assert title == "Share of the limit: inference, float32"
    text = (tmp_path / file).read_text()
    assert "torch" in text
    assert "(8,64,56,56)" in text
