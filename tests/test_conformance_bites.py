"""The conformance suite bites: it fails on every kernel of `wrong_kernels`, for the right reason.

Each wrong backend goes through pytest itself, in this process, in a class of two lines like any
third party's. Only the tests that should catch it are collected; each of them must fail, and by
its own assertion rather than by an accident of the wrong kernel. The right kernels, wrapped in the
same way, must pass all of those tests.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import wrong_kernels
import wrong_storage_kernels  # noqa: F401  (its kernels join the table)

from bnfast import registry
from bnfast.testing import KernelConformance, seeding

TESTS = {name for name in dir(KernelConformance) if name.startswith("test_")}

RIGHT = wrong_kernels.reference_with(
    "right",
    {
        name: lambda right, arguments: right(**arguments)
        for name in ("moments", "normalize", "train", "backward_sums", "backward_input", "backward")
    },
)

MODULE = """\
import test_conformance_bites, wrong_kernels
from bnfast.testing import KernelConformance

class TestSubject(KernelConformance):
    backend = {backend}
    seed = {seed}
    most_elements = {most_elements}
"""


class Outcome:
    """A pytest plugin that runs some test functions, each until it has failed once.

    `failures` has for each of them the exception's type and the report. A function is also left
    after ``enough`` of its parameters have passed.
    """

    def __init__(self, wanted: Sequence[str], enough: float) -> None:
        self.wanted = wanted
        self.enough = enough
        self.passed: Counter[str] = Counter()
        self.failures: dict[str, tuple[str, str]] = {}
        self.skipped: list[str] = []
        self.others: list[str] = []

    def pytest_pycollect_makeitem(self, name: str) -> list[pytest.Item] | None:
        """Leave out the tests that are not wanted."""
        return [] if name in TESTS and name not in self.wanted else None

    def pytest_runtest_protocol(self, item: pytest.Function) -> bool | None:
        """Pass over the further parameters of a test that needs no more of them."""
        name = item.originalname
        return True if name in self.failures or self.passed[name] >= self.enough else None

    def pytest_runtest_makereport(self, item: pytest.Function, call: pytest.CallInfo[None]) -> None:
        """Sort the outcomes."""
        name = item.originalname
        if call.excinfo is None:
            self.passed.update([name] if call.when == "call" else [])
        elif call.excinfo.typename == "Skipped":
            self.skipped.append(str(call.excinfo.value))
        elif call.when == "call":
            self.failures[name] = (call.excinfo.typename, str(call.excinfo.getrepr()))
        else:
            self.others.append(f"{item.nodeid}: {call.excinfo.exconly()} in {call.when}")


@pytest.fixture
def conformance(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch):
    """Return a function that runs some tests of the suite on a backend."""

    def run(
        name: str,
        backend: str,
        wanted: Sequence[str],
        enough: float = math.inf,
        most_elements: int | None = None,
    ) -> Outcome:
        module = tmp_path / f"test_{name}.py"
        seed = int(rng.integers(2**32))
        module.write_text(MODULE.format(backend=backend, seed=seed, most_elements=most_elements))
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
        outcome = Outcome(wanted, enough)
        # That plugin collects garbage at the end, 0.5 s each time under the items of the outer run.
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]
        try:
            pytest.main([*options, f"--rootdir={tmp_path}", str(module)], plugins=[outcome])
        finally:
            wrong_kernels.restore_floating_point()
        assert not outcome.others
        return outcome

    return run


@pytest.mark.parametrize("name", wrong_kernels.WRONG)
def test_wrong_kernel_is_caught(name, conformance) -> None:
    wrong = wrong_kernels.WRONG[name]
    assert set(wrong.caught_by) <= TESTS
    outcome = conformance(name, f"wrong_kernels.WRONG[{name!r}].kernels", wrong.caught_by)
    missed = set(wrong.caught_by) - outcome.failures.keys()
    assert not missed, f"passed on a kernel with {name.replace('_', ' ')}: {sorted(missed)}"
    for test, (error, report) in outcome.failures.items():
        assert error == wrong.error, f"{test} failed otherwise than it should:\n{report}"


ABSENT = wrong_kernels.reference_with(
    "absent", {"unavailable": lambda right, arguments: "the device is switched off"}
)


def test_unavailable_backend_is_skipped_with_its_sentence(conformance) -> None:
    outcome = conformance("absent", "test_conformance_bites.ABSENT", ["test_empty"])
    assert not outcome.passed
    assert set(outcome.skipped) == {"the device is switched off"}


def test_unavailable_backend_of_the_table_is_skipped_with_its_sentence(
    conformance, monkeypatch
) -> None:
    row = registry.Entry("absent", "bnfast.no_such_module", "pip install absent", None)
    monkeypatch.setitem(registry._table, "absent", row)
    outcome = conformance("absent_too", "'absent'", ["test_empty"])
    assert not outcome.passed
    assert set(outcome.skipped) == {f"absent: {registry.list_backends()['absent'].reason}"}


@pytest.mark.parametrize("name", ["numpy", "cuda"])
def test_required_backend_that_cannot_run_fails_the_run(name) -> None:
    backend = registry.list_backends()[name]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-k", "no_such_test", "--require-backend", name],
        capture_output=True,
        text=True,
        check=False,
    )
    if backend.available:
        assert run.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    else:
        assert run.returncode == pytest.ExitCode.TESTS_FAILED
        assert f"required backend {name} cannot run here: {backend.reason}" in run.stdout


def test_same_seed_gives_the_same_inputs(request) -> None:
    one, other, next_seed = (seeding.generator(request, seed).random(4) for seed in (1, 1, 2))
    assert np.array_equal(one, other)
    assert not np.array_equal(one, next_seed)


def test_right_kernel_passes_the_same_way(conformance) -> None:
    wanted = sorted({test for wrong in wrong_kernels.WRONG.values() for test in wrong.caught_by})
    # Twelve parameters of each test; `test_conformance` has the NumPy backend pass them all.
    outcome = conformance("right", "test_conformance_bites.RIGHT", wanted, enough=12)
    assert not outcome.failures, outcome.failures
    assert set(outcome.passed) == set(wanted)


def test_every_test_of_the_suite_catches_something() -> None:
    catching = {test for wrong in wrong_kernels.WRONG.values() for test in wrong.caught_by}
    assert TESTS - catching == set()
