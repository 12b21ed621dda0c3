"""The rows on a GPU, as far as they go without one: torch's tensors on the CPU stand in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import goals
import gpu
import numpy as np
import pytest
import report
from cases import GPU_SUITES, LARGE, RESNET50, SHAPES, Case, Problem, cases
from saved import Run
from test_benchmarks_report import ROOT, saved_run


def test_there_are_no_rows_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "absent", lambda: "no GPU")
    for case in cases("training", timed=True):
        assert bool(gpu.present(case)) != case.on_gpu


def test_every_case_on_a_gpu_is_compared_with_torch_and_the_limit(monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu, "absent", lambda: None)
    on_gpu = [case for case in cases("training", timed=True) if case.on_gpu]
    assert {case.suite for case in on_gpu} == set(GPU_SUITES)
    for case in on_gpu:
        assert list(gpu.present(case)) == ["cuda", "cuda out=", "torch", "limit"]


def test_bytes_on_a_gpu_are_those_of_what_is_read_twice() -> None:
    moved = {
        operation: Case("gpu", operation, "NCHW", "float32", (2, 3, 4, 5)).bytes
        for operation in ("inference", "training", "backward")
    }
    assert moved == {"inference": 960, "training": 1440, "backward": 2400}


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let torch's CPU stand in for the GPU: return torch."""
    torch = pytest.importorskip("torch", reason="torch is an optional peer; CI installs it")
    monkeypatch.setattr(gpu, "tensor", torch.from_numpy)
    for name in ("randint", "empty"):
        right = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, right=right, device, **k: right(*a, **k))
    gpu.tensors.cache_clear()
    return torch


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("operation", ["inference", "training", "backward"])
def test_torch_and_the_copy_do_what_they_are_timed_for(
    operation: str, layout: str, no_gpu_needed: Any, rng: np.random.Generator
) -> None:
    problem = Problem(Case("gpu", operation, layout, "float32", (3, 8, 5, 4)), rng)
    call = gpu.CONTENDERS["torch"].make(problem)
    problem.check(call())
    assert gpu.tensors(problem).x.stride() == tuple(n // 4 for n in problem.x.strides)
    (copy,) = gpu.CONTENDERS["limit"].make(problem).values()
    copy.check()
    assert copy.source.numel() + copy.target.numel() == problem.case.bytes


def test_a_time_runs_from_behind_a_call_to_the_end_of_the_last(
    no_gpu_needed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[float] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = len(calls)

        def synchronize(self) -> None:
            assert self.at == len(calls)

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at  # a millisecond a call

    monkeypatch.setattr(no_gpu_needed, "cuda", SimpleNamespace(Event=Event))
    timed = gpu.Timed(lambda: calls.append(0.0))
    assert timed.seconds(5) == 5e-3
    assert len(calls) == 6


def test_goals_on_a_gpu(tmp_path: Path) -> None:
    seconds = {"limit": 0.95e-3, "cuda": 1e-3, "torch": 2e-3}
    suites = {"gpu": SHAPES, "gpu-large": LARGE, "gpu-resnet50": RESNET50}
    rows = {
        (Case(suite, operation, layout, "float32", shape), name): [time, 2 * time]
        for suite, shapes in suites.items()
        for operation in ("inference", "training", "backward")
        for layout in ("NCHW", "NHWC")
        for shape in shapes
        for name, time in seconds.items()
    }
    file = saved_run(tmp_path, "gpu.json", rows)
    saved = json.loads(file.read_text())
    for row in saved["benchmarks"]:
        info = row["extra_info"]
        info["gpu"] = "made up"
        if info.get("suite") == "gpu-resnet50" and info["contender"] != "limit":
            info["device_us"] = {"cuda": 100, "torch": 120}[info["contender"]]
    file.write_text(json.dumps(saved))
    page = "\n".join(report.page(Run([file]), []))
    assert "| training NHWC, limit / time: least of large | ≥ 0.85 |  | 0.95 met |" in page
    least = "| backward NCHW, ResNet-50, torch / time, both on the device"
    assert f"{least}: mean | ≥ 1.3 |  | **1.20 missed** |" in page
    assert f"{least}: least | ≥ 0.9 |  | 1.20 met |" in page
    assert "| inference of (1,64,8,8), microseconds | ≤ 40 |  | **1500.00 missed** |" in page
    assert "| GPU | made up |" in page
    assert "## Training, NCHW, float32, on a GPU: ResNet-50, batch 32" in page
    assert "no rows for" not in page
    assert next(goals.tables(Run([file]))) == "| goal | target | cuda out= | cuda |"


def run_script(folder: Path, python: str) -> subprocess.CompletedProcess[str]:
    """Run ``benchmarks/gpu.sh`` as it goes without a GPU."""
    return subprocess.run(
        [ROOT / "benchmarks/gpu.sh", folder],
        env=os.environ | {"BNFAST_GPU_DRY_RUN": "1", "PYTHON": python},
        capture_output=True,
        text=True,
    )


def test_the_script_without_a_gpu(tmp_path: Path) -> None:
    finished = run_script(tmp_path, sys.executable)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "conformance ran on: cuda" in (tmp_path / "conformance.log").read_text()
    *_, caveat, verdict = finished.stdout.splitlines()
    assert (caveat, verdict) == ("dry run: nothing was measured", "all green")


def test_the_script_fails_where_a_step_fails(tmp_path: Path) -> None:
    finished = run_script(tmp_path, "false")
    assert finished.returncode == 1
    for step in ("report", "conformance", "benchmarks"):
        assert f"FAILED: {step}: exit status 1" in finished.stdout
    assert "all green" not in finished.stdout
