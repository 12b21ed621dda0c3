"""When benchmarks are timed, which rows there are, and what is saved with the figures.

Timing is on if the command line names this directory or something in it, as
``pytest benchmarks/ -k "inference and NCHW"`` does, or asks for it (``--benchmark-enable``). In a
run of all tests it is off: then every contender is checked once, on small arrays.

Every figure carries what it depends on under ``extra_info`` (see `Group.result`), and the saved
file the report of `bnfast.show_config` under ``machine_info``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu
import pytest
from cases import Case, cases
from contenders import CONTENDERS, absent
from groups import Group, Row
from measuring import CLOCK

import bnfast
from bnfast.testing import seeding

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """Turn timing on if the command line names the benchmarks, unless it also says not to."""
    named = config.args_source is pytest.Config.ArgsSource.ARGS and any(
        (config.invocation_params.dir / argument.partition("::")[0]).resolve().is_relative_to(HERE)
        for argument in config.args
    )
    if named and "--benchmark-disable" not in config.invocation_params.args:
        config.option.benchmark_disable = False


def is_timed(config: pytest.Config) -> bool:
    """Return whether benchmarks are timed in this run."""
    return bool(config.option.benchmark_enable or not config.option.benchmark_disable)


def pytest_report_header(config: pytest.Config) -> Iterator[str]:
    """Say who is compared, and who cannot be."""
    state = "timed" if is_timed(config) else "checked once, not timed"
    yield f"benchmarks: {state}; {', '.join(name for name in CONTENDERS if not absent(name))}"
    for name in CONTENDERS:
        if reason := absent(name):
            yield f"benchmarks without {name}: {reason}"
    if reason := gpu.absent():
        yield f"benchmarks without a GPU: {reason}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a benchmark of an operation for each of its cases, and for each contender in turn."""
    if "case" in metafunc.fixturenames:
        operation = metafunc.function.__name__.removeprefix("test_")
        rows = [
            pytest.param(case, name, id=f"{case}-{_short(name)}")
            for case in cases(operation, is_timed(metafunc.config))
            for name in gpu.present(case)
        ]
        metafunc.parametrize(("case", "contender"), rows)


def _short(name: str) -> str:
    """Return a contender's name for ``-k``, where "numpy" means the backend alone."""
    return name.removeprefix("NumPy ").removesuffix("=").replace(" ", "-")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    """Put the report on this installation into the saved file."""
    machine_info["bnfast"] = bnfast.show_config(mode="dict")


@pytest.fixture(scope="session")
def groups() -> list[Group]:
    """Return the place of the group that is being run: one at a time, for its arrays are large."""
    return []


@pytest.fixture
def timed(groups: list[Group], request: pytest.FixtureRequest) -> Callable[[Case, str], None]:
    """Return a function that checks a row against float64, then reports its times."""

    def check_and_time(case: Case, contender: str) -> None:
        if not groups or groups[0].turns != case.turns:
            groups.clear()
            groups.append(Group(_same_turns(case, request), seeding.generator(request)))
            if is_timed(request.config):
                groups[0].measure(request.config.option.benchmark_min_rounds)
        groups[0].require(case, contender)
        # Not before: pytest-benchmark complains of a benchmark that ends without a time.
        if is_timed(request.config):
            benchmark = request.getfixturevalue("benchmark")
            benchmark.group = str(case)
            times, info = groups[0].result(case, contender)
            benchmark.extra_info.update(info)
            CLOCK.load(times)
            benchmark.pedantic(CLOCK.play, rounds=len(times))

    return check_and_time


def _same_turns(case: Case, request: pytest.FixtureRequest) -> list[Row]:
    """Return the rows that are timed together with a case, without those that are deselected."""
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    rows = [
        (s.params["case"], s.params["contender"]) for s in specs if s and "contender" in s.params
    ]
    return [row for row in rows if row[0].turns == case.turns]
