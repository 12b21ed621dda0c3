"""The report: what it contains, what it looks like, and that bad settings do not break it."""

from __future__ import annotations

import json
import platform
import re
import sys
from importlib import metadata
from types import ModuleType

import numpy as np
import pytest
from fresh_python import run

import bnfast
from bnfast import memory, registry, threads
from bnfast.__main__ import main


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    """Start and end every test in the state right after import, with the variables unset."""
    for variable in (
        "BNFAST_BACKEND",
        "BNFAST_CACHE_BYTES",
        "BNFAST_NUM_THREADS",
        "OMP_NUM_THREADS",
    ):
        monkeypatch.delenv(variable, raising=False)
    registry._reset()
    threads._reset()
    memory._reset()
    yield
    registry._reset()
    threads._reset()
    memory._reset()


@pytest.fixture
def stand_in(monkeypatch):
    """Return a function that puts a made-up module in the place of the Cython extension."""

    def put(**attributes):
        module = ModuleType("bnfast.backends.cython_openmp")
        module.unavailable = lambda: None
        module.instruction_set = lambda: "AVX2+FMA"
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return put


def line(report, label):
    """Return the second column of a line of the report."""
    (found,) = re.findall(rf"^{label} +(.*)$", report, re.MULTILINE)
    return found


def printed(capsys):
    assert bnfast.show_config() is None
    return capsys.readouterr().out


def test_dict(stand_in, no_gpu):
    stand_in(OPENMP=True, CYTHON_VERSION="3.3.1")
    bnfast.set_num_threads(3)
    config = bnfast.show_config(mode="dict")
    assert list(config) == ["versions", "platform", "backends", "backend", "threads", "cache"]
    assert list(config["versions"]) == ["bnfast", "python", "numpy", "numba", "cython"]
    assert config["versions"]["numpy"] == np.__version__
    assert config["versions"]["cython"] == "3.3.1"
    assert list(config["backends"]) == ["cython", "numba", "cuda", "numpy"]
    assert config["backends"]["cython"] == {
        "available": True,
        "reason": None,
        "install": bnfast.list_backends()["cython"].install,
        "module": "bnfast.backends.cython_openmp",
        "instruction_set": "AVX2+FMA",
        "openmp": True,
    }
    assert config["backends"]["cuda"]["instruction_set"] is None
    assert config["backend"] == {"name": "cython", "chosen_by": "auto", "error": None}
    assert config["threads"] == {"count": 3, "source": "set_num_threads()", "error": None}
    assert config["cache"] == {
        "idle": 0,
        "limit": 268435456,
        "source": "the default",
        "error": None,
    }
    assert json.loads(json.dumps(config)) == config


def test_rows_agree_with_list_backends():
    rows = bnfast.show_config("dict")["backends"]
    for name, backend in bnfast.list_backends().items():
        assert rows[name]["available"] == backend.available
        assert rows[name]["reason"] == backend.reason
        assert (rows[name]["instruction_set"] is None) != backend.available


@pytest.mark.parametrize(
    ("openmp", "text"),
    [
        (True, "yes: AVX2+FMA, with OpenMP"),
        (False, "yes: AVX2+FMA, built without OpenMP, so on one thread"),
        (None, "yes: AVX2+FMA"),
    ],
)
def test_openmp_is_shown(stand_in, capsys, openmp, text):
    stand_in(OPENMP=openmp)
    assert line(printed(capsys), "cython") == text


def test_reason_and_install_line_are_shown(no_gpu, capsys):
    report = printed(capsys)
    assert line(report, "cuda") == f"no: {no_gpu}"
    assert '            install: pip install --upgrade "bnfast[cuda12]"  # or' in report


def test_choice_and_its_maker_are_shown(capsys):
    with bnfast.use_backend("numpy"), bnfast.use_num_threads(2):
        report = printed(capsys)
    assert line(report, "in use") == "numpy, chosen by use_backend()"
    assert line(report, "threads") == "2, from use_num_threads()"


def test_memory_kept_is_shown(monkeypatch, capsys):
    monkeypatch.setenv("BNFAST_CACHE_BYTES", "20000000")
    x = np.ones((1, 2, 1024, 1024), np.float32)
    bnfast.BatchNorm2d(2)(x)
    assert bnfast.show_config("dict")["cache"]["idle"] == x.nbytes
    assert line(printed(capsys), "cache") == (
        "8388608 bytes idle, 20000000 at most, from the environment variable BNFAST_CACHE_BYTES"
    )


def test_bad_settings_are_lines_of_the_report(monkeypatch, no_gpu, capsys):
    monkeypatch.setenv("BNFAST_BACKEND", "nunba")
    monkeypatch.setenv("BNFAST_NUM_THREADS", "two")
    monkeypatch.setenv("BNFAST_CACHE_BYTES", "1 GB")
    config = bnfast.show_config("dict")
    assert config["backend"]["name"] is None
    assert config["backend"]["error"].startswith("unknown backend 'nunba' (asked for by the env")
    assert config["threads"]["count"] is None
    assert config["threads"]["error"].startswith("the environment variable BNFAST_NUM_THREADS must")
    assert config["cache"]["limit"] is None
    assert config["cache"]["error"].startswith("the environment variable BNFAST_CACHE_BYTES must")
    report = printed(capsys)
    assert line(report, "in use").startswith("unknown backend 'nunba'")
    assert line(report, "threads").startswith("the environment variable BNFAST_NUM_THREADS")
    assert line(report, "cache").startswith("the environment variable BNFAST_CACHE_BYTES")
    monkeypatch.setenv("BNFAST_BACKEND", "cuda")
    assert line(printed(capsys), "in use").startswith("backend 'cuda' (asked for by the env")


def test_versions_are_shown(stand_in, monkeypatch, capsys):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    stand_in(CYTHON_VERSION="3.3.1")
    monkeypatch.setattr(metadata, "version", absent)
    assert line(printed(capsys), "versions") == (
        f"bnfast {bnfast.__version__}, python {platform.python_version()}, "
        f"numpy {np.__version__}, numba (none), cython 3.3.1"
    )


@pytest.mark.parametrize("settings", [{}, {"BNFAST_BACKEND": "cuda", "BNFAST_NUM_THREADS": "-1"}])
def test_report_fits_in_a_window(monkeypatch, no_gpu, capsys, settings):
    for variable, value in settings.items():
        monkeypatch.setenv(variable, value)
    assert all(len(text) < 100 and text == text.rstrip() for text in printed(capsys).splitlines())


@pytest.mark.parametrize("mode", ["dicts", "", None])
def test_unknown_mode(mode):
    with pytest.raises(ValueError, match=f"^mode must be 'stdout' or 'dict', not {mode!r}$"):
        bnfast.show_config(mode=mode)


def test_command_line(capsys):
    main([])
    assert capsys.readouterr().out == printed(capsys)
    main(["--json"])
    assert json.loads(capsys.readouterr().out) == bnfast.show_config("dict")


def test_command_line_in_a_fresh_process():
    finished = run("-m", "bnfast", "--json", BNFAST_BACKEND="numpy", BNFAST_NUM_THREADS="2")
    assert (finished.returncode, finished.stderr) == (0, "")
    config = json.loads(finished.stdout)
    assert config["backend"]["name"] == "numpy"
    assert config["backend"]["chosen_by"] == "the environment variable BNFAST_BACKEND"
    assert config["threads"]["count"] == 2
