"""Numba's disk cache under faults: always a right answer, at worst compiled for one process."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from backends_here import AVAILABLE
from fresh_python import output_of

import bnfast

if "numba" not in AVAILABLE:
    pytest.skip(str(bnfast.list_backends()["numba"].reason), allow_module_level=True)

import numba

from bnfast.backends.numba_kernels import compiling, team

CANNOT = "Numba's disk cache cannot be used, so this process compiles for itself: "


@pytest.fixture
def cache(tmp_path, monkeypatch, caplog):
    """Return the folder of an empty cache, and collect what is logged."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    caplog.set_level(logging.INFO, "bnfast")
    numba.get_num_threads()  # the kernel asks for them
    if compiling._announcement.locked():
        compiling._announcement.release()
    return tmp_path


def build(dtype="float64"):
    """Build the smallest kernel as if in a new process, and check that it works."""
    kernel = compiling.build(team.exchange, dtype, parallel=False)
    before = kernel(1)
    assert kernel(before) == 1
    return kernel


def files(cache, suffix):
    return sorted(cache.rglob(f"*.{suffix}"))


def hits(caplog):
    return [record.getMessage() for record in caplog.records]


def test_a_kernel_is_kept_and_loaded(cache, caplog, monkeypatch):
    build()
    (index,) = files(cache, "nbi")
    (data,) = files(cache, "nbc")
    times = [path.stat().st_mtime_ns for path in (index, data)]
    build()
    assert [path.stat().st_mtime_ns for path in (index, data)] == times
    assert hits(caplog) == []


def test_each_kernel_and_dtype_has_an_index_of_its_own(cache):
    """Numba's writers of one index overwrite each other's entries, and then their data."""
    build("float32")
    build("float64")
    assert len(files(cache, "nbi")) == len(files(cache, "nbc")) == 2


def test_the_name_of_a_file_tells_the_cpu(cache, monkeypatch):
    build()
    codegen = type(compiling.cpu_target.target_context.codegen())
    monkeypatch.setattr(codegen, "magic_tuple", lambda self: ("another", "cpu", ""))
    compiling._digest.cache_clear()
    try:
        build()
    finally:
        compiling._digest.cache_clear()
    assert len({path.name.rpartition(".")[0] for path in files(cache, "nbi")}) == 2


def damage_by_garbage(path):
    path.write_bytes(b"garbage" * 10)


def damage_by_length(share):
    def damage(path):
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    return damage


def damage_by_foreign_pickle(path):
    path.write_bytes(pickle.dumps({"another": "program's"}))


def damage_by_directory(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "empty": damage_by_length(0),
    "cut short": damage_by_length(0.5),
    "without its last bytes": damage_by_length(0.99),
    "garbage": damage_by_garbage,
    "foreign": damage_by_foreign_pickle,
}


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_replaced(cache, caplog, damage, suffix):
    build()
    (path,) = files(cache, suffix)
    whole = path.read_bytes()
    damage(path)
    build()
    # A pickle that is no version number is taken for the index of another version.
    expected = 0 if (damage, suffix) == (damage_by_foreign_pickle, "nbi") else 1
    assert len(hits(caplog)) == expected
    assert all(line.startswith("replacing what Numba's disk cache has of") for line in hits(caplog))
    assert len(path.read_bytes()) > 0.9 * len(whole)
    build()
    assert len(hits(caplog)) == expected


def test_the_data_of_another_kernel_is_replaced(cache, caplog):
    build()
    (path,) = files(cache, "nbc")
    other = numba.njit("float32(float32)", cache=True)(_double)
    (foreign,) = (file for file in files(cache, "nbc") if file != path)
    assert other(2) == 4
    shutil.copy(foreign, path)
    build()
    (line,) = hits(caplog)
    assert line.startswith("replacing what Numba's disk cache has of exchange: ")


def _double(x):
    return x + x


def test_data_that_is_gone_is_compiled_again(cache, caplog):
    build()
    files(cache, "nbc")[0].unlink()
    build()
    assert len(files(cache, "nbc")) == 1
    assert hits(caplog) == []


def test_another_version_of_numba_is_not_read(cache, monkeypatch):
    build()
    (path,) = files(cache, "nbi")
    path.write_bytes(pickle.dumps("0.1.0") + b"what only that version can read")
    build()
    assert len(files(cache, "nbc")) == 1


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_what_cannot_be_replaced_is_compiled_for_one_process(cache, caplog, suffix):
    build()
    damage_by_directory(files(cache, suffix)[0])
    build()
    build("float32")
    build()
    (line,) = (line for line in hits(caplog) if line.startswith(CANNOT))
    assert "Error" in line


def test_a_full_disk(cache, caplog, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    build()
    build("float32")
    assert hits(caplog) == [CANNOT + "OSError: [Errno 28] No space left on device"]


def test_an_error_of_the_kernel_itself_is_raised(cache):
    def wrong(threads: int) -> int:
        return threads + "text"

    with pytest.raises(numba.core.errors.TypingError):
        compiling.build(wrong, "float64", parallel=False)


# Processes of their own

COMPUTE = """
    import logging, sys
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    import numpy as np
    import bnfast
    dtype = sys.argv[1] if sys.argv[1:] else "float32"
    x = np.random.default_rng().normal(3, 2, (4, 8, 5, 5)).astype(dtype)
    y = bnfast.BatchNorm2d(8, backend="numba")(x)
    expected = bnfast.BatchNorm2d(8, backend="numpy")(x)
    print(np.allclose(y, expected, rtol=0, atol=1e-5))
"""


def test_no_place_can_be_written(tmp_path):
    """As in a read-only container: neither the package's folder nor the home."""
    package = tmp_path / "bnfast"
    ignore = shutil.ignore_patterns("__pycache__", "*.c")
    shutil.copytree(Path(bnfast.__file__).parent, package, ignore=ignore)
    # A file in the place of the folder stops even the superuser.
    (package / "backends" / "numba_kernels" / "__pycache__").write_text("")
    lines = output_of(
        COMPUTE,
        PYTHONPATH=str(tmp_path),
        PYTHONSAFEPATH="1",  # else the current folder comes first
        HOME="/dev/null",
        XDG_CACHE_HOME="/dev/null/cache",
    ).splitlines()
    assert lines[-1] == "True"
    assert len(lines) == 2
    assert lines[0].startswith(f"{CANNOT}RuntimeError: cannot cache function")


@pytest.mark.parametrize("layer", ["nonsense", "tbb"])
def test_a_threading_layer_that_is_missing(layer):
    code = COMPUTE.replace("(4, 8, 5, 5)", "(4, 8, 64, 64)").replace(
        "import bnfast", "import bnfast; bnfast.set_num_threads(2)"
    )
    # Without the folder of the package tbb, its library is not found either.
    lines = output_of(code, NUMBA_THREADING_LAYER=layer, LD_LIBRARY_PATH="").splitlines()
    assert lines[-1] == "True"
    assert len(lines) == 2
    assert lines[0].startswith("Numba cannot start threads, one is used: ")


RACE = """
    import os, sys, time
    import numba
    from bnfast.backends.numba_kernels import compiling, team
    numba.get_num_threads()
    open(sys.argv[2], "w").close()
    while not os.path.exists("start"):
        time.sleep(0.001)
    kernel = compiling.build(team.exchange, sys.argv[1], parallel=False)
    before = kernel(1)
    print(kernel(before))
"""


def at_once(code, tmp_path, processes):
    """Run processes on one empty cache, all of them at once; return what each printed."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = str(Path(bnfast.__file__).parent.parent)
    running = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                textwrap.dedent(code),
                ("float32", "float64")[i % 2],
                f"ready{i}",
            ],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]
    if "start" in code:
        while len(list(tmp_path.glob("ready*"))) < processes:
            assert all(process.poll() is None for process in running)
        (tmp_path / "start").touch()
    return [process.communicate(timeout=280)[0].strip() for process in running]


def test_processes_race_for_an_empty_cache(tmp_path):
    assert at_once(RACE, tmp_path, 8) == ["1"] * 8
    indices = files(tmp_path / "cache", "nbi")
    assert len(indices) == 2
    for index in indices:
        content = index.read_bytes()
        assert content.count(b".nbc") == 1


@pytest.mark.slow
def test_processes_race_with_whole_kernels(tmp_path):
    assert at_once(COMPUTE, tmp_path, 8) == ["True"] * 8
    count = len(files(tmp_path / "cache", "nbc"))
    assert at_once(COMPUTE, tmp_path, 8) == ["True"] * 8
    assert len(files(tmp_path / "cache", "nbc")) == count
