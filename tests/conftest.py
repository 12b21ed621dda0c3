"""What every test run shows and shares: what ran where, and random inputs that can be had again.

Header
    The backends, each with its instruction set or the reason why it cannot run; the threads; the
    seed of all random inputs, which ``--seed N`` sets.
``--require-backend NAME``
    Repeatable, or a comma list: the run fails at once if one of them cannot run here.
``--fuzz-seconds N``, ``--fuzz-backend NAME``
    How long, and on which backends, each test that fuzzes goes on after its fixed number of cases.
``--slow``
    Also runs the tests marked ``slow``.
Closing lines
    For each backend how many tests of the conformance suite really ran on it, and how many cases
    of oneDNN's benchdnn.
``NUMBA_ENABLE_CUDASIM=0``
    Tests the CUDA kernels on a GPU. Otherwise they run in Numba's simulator.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pytest

os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")  # Numba looks once, when it is imported

import bnfast
from bnfast import memory, registry
from bnfast.testing import seeding

if TYPE_CHECKING:
    from bad_calls import Scene
    from made_up_gpu import Gpu, Kind

pytest.register_assert_rewrite(
    "bad_calls", "made_up_gpu", "torch_comparison", "torch_twin", "trained_layers"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("bnfast")
    group.addoption(
        "--seed", type=int, metavar="N", help="seed of the random inputs; default: a fresh one"
    )
    group.addoption(
        "--require-backend",
        action="append",
        default=[],
        metavar="NAME[,NAME...]",
        help="fail if this backend cannot run here; repeatable",
    )
    group.addoption("--slow", action="store_true", help="also run the tests marked slow")
    group.addoption(
        "--fuzz-seconds",
        type=float,
        default=0.0,
        metavar="N",
        help="go on fuzzing for N seconds in each test that fuzzes",
    )
    group.addoption(
        "--fuzz-backend", default="", metavar="NAME[,NAME...]", help="fuzz these backends only"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Settle the seed here, so that the processes of a distributed run share it."""
    if config.option.seed is None:
        config.option.seed = seeding.fresh_seed()


def pytest_sessionstart(session: pytest.Session) -> None:
    """End the run if a required backend cannot run."""
    backends = bnfast.list_backends()
    for name in _required(session.config):
        if name not in backends:
            raise pytest.UsageError(
                f"--require-backend {name}: unknown backend; known are {', '.join(backends)}"
            )
        if not backends[name].available:
            reason = backends[name].reason
            pytest.exit(f"required backend {name} cannot run here: {reason}", returncode=1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what is marked ``slow`` unless it was asked for."""
    if not config.option.slow:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


def pytest_report_header(config: pytest.Config) -> Iterator[str]:
    """Return the lines above the first test."""
    report = bnfast.show_config("dict")
    for name, row in report["backends"].items():
        state = row["instruction_set"] if row["available"] else f"not here: {row['reason']}"
        yield f"backend {name} (simulator)" if state == "simulator" else f"backend {name}: {state}"
    threads = report["threads"]
    yield f"threads: {threads['error'] or threads['count']} ({threads['source']})"
    yield f"random inputs: --seed {config.option.seed}"


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say on which backends the conformance suite ran, and how much of it; so for `exact_data`."""
    properties = [
        item
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if report.when == "call"
        for item in report.user_properties
    ]
    ran = Counter(value for key, value in properties if key == "conformance_backend")
    counts = ", ".join(f"{name} {count} tests" for name, count in ran.items())
    terminalreporter.write_line(f"conformance ran on: {counts or 'no backend'}")
    cases: Counter[str] = Counter()
    for key, value in properties:
        if key.startswith("benchdnn-style cases"):
            cases[key] += value
    for key, count in cases.items():
        terminalreporter.write_line(f"{key}: {count}")
    if absent := [name for name in _required(config) if name not in ran]:
        terminalreporter.write_line(f"required, but not conformance-tested: {', '.join(absent)}")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Return this test's own generator of random inputs; see ``--seed``."""
    return seeding.generator(request)


@pytest.fixture
def scene(rng: np.random.Generator) -> Scene:
    """Return a layer that has trained, and arguments that would be fine."""
    from bad_calls import Scene  # not at the top: pytest is first to rewrite its asserts

    return Scene(rng)


@pytest.fixture
def absent_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the backend ``absent``, which is known and cannot run."""
    entry = registry.Entry("absent", "absent_kernels", "pip install absent", automatic_for=None)
    monkeypatch.setitem(registry._table, "absent", entry)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Let the backend ``cuda`` be unavailable, whatever is here; return the reason."""
    reason = "there is no GPU"
    monkeypatch.setattr("bnfast.backends.numba_cuda.unavailable", lambda: reason)
    registry._reset()
    yield reason
    registry._reset()


@pytest.fixture
def fresh_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start and end a test in the state right after import, with BNFAST_BACKEND unset."""
    monkeypatch.delenv("BNFAST_BACKEND", raising=False)
    registry._reset()
    yield
    registry._reset()


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[object], None]]:
    """Start and end a test without recycled memory; return a function that sets the bound on it."""

    def set_bound(size: object) -> None:
        monkeypatch.setenv("BNFAST_CACHE_BYTES", str(size))
        memory._reset()

    monkeypatch.delenv("BNFAST_CACHE_BYTES", raising=False)
    memory._reset()
    yield set_bound
    memory._reset()


@pytest.fixture
def gpu(fresh_registry: None, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Return a made-up GPU that ``auto`` finds."""
    import made_up_gpu

    return made_up_gpu.install(monkeypatch)


@pytest.fixture(params=["cupy", "torch", "numba", "interface", "dlpack"])
def kind(request: pytest.FixtureRequest, gpu: Gpu) -> Kind:
    """Return, for each kind of array, what puts NumPy arrays on the made-up GPU as that kind."""
    from made_up_gpu import Kind

    return Kind(gpu, request.param)


@pytest.fixture
def numbers(rng: np.random.Generator) -> Callable[..., np.ndarray]:
    """Return a function that draws float32 arrays of a shape."""
    return lambda *shape: rng.normal(3, 2, shape).astype(np.float32)


@pytest.fixture
def add_backend(fresh_registry: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Return a function that registers a backend whose module is made up."""

    def add(name: str, unavailable: str | None = None, accepts: type = np.ndarray) -> ModuleType:
        module = ModuleType(f"made_up_{name}")
        module.unavailable = lambda: unavailable
        module.accepts = lambda x: isinstance(x, accepts)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        bnfast.register_backend(name, module=module.__name__, install=f"pip install {name}")
        return module

    return add


@pytest.fixture
def write_backend(
    fresh_registry: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[str, str], None]]:
    """Return a function that registers a backend whose module is a file with the given text."""
    names = []
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, text: str) -> None:
        names.append(f"written_{name}")
        (tmp_path / f"written_{name}.py").write_text(text)
        bnfast.register_backend(name, module=f"written_{name}", install=f"pip install {name}")

    yield write
    for name in names:
        sys.modules.pop(name, None)


def _required(config: pytest.Config) -> list[str]:
    return [
        name.strip() for value in config.option.require_backend for name in value.split(",") if name
    ]
