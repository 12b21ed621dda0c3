"""What a benchmark needs beside its contenders: its problem, made once for all of them.

Contenders of one case share the arrays, and the table shows them as one group. Every figure
carries what it depends on under ``extra_info`` (see `timed`), and the saved file the report of
`bnfast.show_config` under ``machine_info``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
from contenders import CONTENDERS, Call, Problem, absent

import bnfast
from bnfast.testing import seeding


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each benchmark for every contender, and say why one is left out."""
    if "contender" in metafunc.fixturenames:
        rows = [
            pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=reason or ""))
            for name in CONTENDERS
            for reason in [absent(name)]
        ]
        metafunc.parametrize("contender", rows)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    """Put the report on this installation into the saved file."""
    machine_info["bnfast"] = bnfast.show_config(mode="dict")


@pytest.fixture(scope="module")
def problem(request: pytest.FixtureRequest) -> Problem:
    """Return the problem of the case that the test names."""
    return Problem(request.param, seeding.generator(request))


@pytest.fixture
def timed(benchmark: Any, problem: Problem) -> Callable[[str], None]:
    """Return a function that checks a contender's result against float64, then times it."""

    def check_and_time(contender: str) -> None:
        call: Call = CONTENDERS[contender](problem)
        problem.check(call())
        benchmark.group = str(problem.case)
        benchmark.extra_info.update(_circumstances(contender), bytes=problem.case.bytes)
        benchmark(call)
        if benchmark.enabled:
            per_second = problem.case.bytes / benchmark.stats.stats.median
            benchmark.extra_info["GB/s"] = round(per_second / 1e9, 2)

    return check_and_time


def _circumstances(contender: str) -> dict[str, Any]:
    """Return who ran: threads, instruction set, versions."""
    name = contender.removesuffix(", out=")
    if name in bnfast.list_backends():
        packages = ("bnfast", "numpy", "numba") if name == "numba" else ("bnfast", "numpy")
        return {
            "threads": bnfast.get_num_threads(),
            "instruction_set": bnfast.registry.load(name).instruction_set(),
            "versions": {package: version(package) for package in packages},
        }
    if name == "torch":
        import torch

        return {
            "threads": torch.get_num_threads(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "versions": {"torch": torch.__version__},
        }
    return {"threads": 1, "instruction_set": "NumPy's", "versions": {"numpy": version("numpy")}}
