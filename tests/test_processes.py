"""Processes: whatever was used before a fork, children and grandchildren are right, and soon done.

Each test runs in an interpreter of its own, in which results are compared with those of the backend
`numpy` from before the fork. A process that is not done after `PATIENCE` seconds counts as hung.
"""

from __future__ import annotations

import os
import sys

import pytest
from backends_here import AVAILABLE
from fresh_python import output_of, run
from numba_layers import LAYERS, environment_of

from bnfast import forks

PATIENCE = 60
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork"),
    pytest.mark.skipif(
        not {"cython", "numba"} <= set(AVAILABLE), reason="needs both compiled backends"
    ),
]

PREAMBLE = f"""
import os, signal, sys, threading, time, warnings
import numpy as np

warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks with threads
x = np.random.default_rng().normal(3, 2, (4, 8, 64, 64)).astype(np.float32)

def compute(*backends):
    import bnfast
    for backend in backends:
        with bnfast.use_num_threads(2):
            y = bnfast.BatchNorm2d(8, backend=backend)(x)
        assert np.allclose(y, right, rtol=0, atol=1e-5), backend

def correct():
    axes = (0, 2, 3)
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)

def child_of(work):
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        os._exit(1)
    end = time.monotonic() + {PATIENCE}
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0, os.waitstatus_to_exitcode(status)
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the child hangs")

right = correct()
"""


def check(code, layer="omp", **environment):
    assert output_of(PREAMBLE + code, **environment_of(layer), **environment) == "right"


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "before", [["cython"], ["numba"], ["cython", "numba"], ["numba", "cython"]]
)
def test_child_and_grandchild(layer, before):
    check(
        f"""
compute(*{before})

def work():
    compute("cython", "numba")
    child_of(lambda: compute("numba", "cython"))

child_of(work)
child_of(lambda: child_of(lambda: compute("cython", "numba")))
compute("cython", "numba")
print("right")
""",
        layer,
    )


@pytest.mark.parametrize("imported", ["", "import bnfast", "compute('cython')"])
@pytest.mark.parametrize("layer", LAYERS)
def test_somebody_else_used_numba_in_the_parent(layer, imported):
    """And bnfast is imported there, or in the child alone."""
    check(
        f"""
{imported}
import numba

@numba.njit(parallel=True)
def somebody_elses(a):
    for i in numba.prange(a.size):
        a[i] += 1.0

somebody_elses(np.ones(1000))
assert "bnfast.backends.numba_parallel" not in sys.modules

def work():
    compute("cython", "numba")
    child_of(lambda: compute("numba", "cython"))

child_of(work)
child_of(lambda: child_of(lambda: compute("cython", "numba")))
compute("cython", "numba")
print("right")
""",
        layer,
    )


def test_only_the_thread_that_came_from_the_fork_is_without_threads():
    check(
        """
import bnfast

def work():
    import numba
    from bnfast import threads
    with bnfast.use_num_threads(2):
        assert bnfast.get_num_threads() == 1
        assert threads.current().source.startswith("a fork")
    found = []
    def in_thread():
        with bnfast.use_num_threads(2):
            found.append(bnfast.get_num_threads())
            compute("cython")
    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert found == [2]

compute("numba")
assert "bnfast.backends.cython_openmp" not in sys.modules
child_of(work)
print("right")
"""
    )


def test_a_child_of_an_ordinary_fork_has_threads():
    check(
        """
compute("cython")

def work():
    import bnfast
    with bnfast.use_num_threads(2):
        assert bnfast.get_num_threads() == 2
        compute("cython")

child_of(work)
child_of(lambda: child_of(work))
print("right")
"""
    )


def test_a_fork_by_a_program_that_calls_no_hooks_before_it():
    """As servers do that embed Python: fork in C, then PyOS_AfterFork_Child."""
    check(
        """
import ctypes
compute("cython")
python = ctypes.PyDLL(None)
os.fork = lambda: python.fork() or (python.PyOS_AfterFork_Child() and 0) or 0
child_of(lambda: compute("cython", "numba"))
print("right")
"""
    )


def test_fork_while_another_thread_compiles():
    check(
        """
from bnfast import registry
from numba.core.compiler_lock import global_compiler_lock

registry.load("numba")
holds, done = threading.Event(), threading.Event()

def compile_for_long():
    with global_compiler_lock:
        holds.set()
        done.wait(1)

thread = threading.Thread(target=compile_for_long)
thread.start()
holds.wait()
child_of(lambda: compute("numba"))
done.set()
thread.join()
print("right")
""",
        NUMBA_CACHE_DIR="",
    )


def test_fork_while_other_threads_compute():
    check(
        """
import bnfast
compute("cython", "numba")
stop = threading.Event()

def keep_on(backend):
    while not stop.is_set():
        compute(backend)

threads = [threading.Thread(target=keep_on, args=(b,)) for b in ("cython", "numba") * 2]
for thread in threads:
    thread.start()
for _ in range(10):
    child_of(lambda: compute("cython", "numba"))
stop.set()
for thread in threads:
    thread.join()
print("right")
"""
    )


POOLS = """
import multiprocessing, sys, time
import numpy as np

def work(backend, seed):
    import bnfast
    x = np.random.default_rng(seed).normal(3, 2, (4, 8, 64, 64)).astype(np.float32)
    bnfast.set_num_threads(2)
    layer = bnfast.BatchNorm2d(8, backend=backend)
    y = layer(x)
    dx = layer.backward(x)
    return float(np.square(y).sum()), float(dx.sum()), layer.running_mean

def main(method):
    import bnfast
    tasks = [(backend, seed) for seed in range(3) for backend in ("cython", "numba")]
    expected = [work("numpy", seed) for _, seed in tasks]
    for backend in ("cython", "numba"):
        work(backend, 0)
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        results = pool.starmap_async(work, tasks).get(timeout=100)
    for (y, dx, mean), (y_, dx_, mean_) in zip(results, expected):
        assert abs(y - y_) < 1e-3 * abs(y_) and abs(dx - dx_) < 1.0 and np.allclose(mean, mean_)
    layer = bnfast.BatchNorm2d(8)
    layer(np.ones((2, 8, 3, 3), np.float32))
    with context.Pool(1) as pool:  # a layer travels
        (there,) = pool.map(bnfast.BatchNorm2d.state_dict, [layer])
    assert all(np.array_equal(there[name], value) for name, value in layer.state_dict().items())
    print("right")

if __name__ == "__main__":
    main(sys.argv[1])
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing(tmp_path, method):
    script = tmp_path / "pools.py"
    script.write_text(POOLS)
    finished = run(str(script), method, **environment_of("omp"))
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == "right"


@pytest.mark.skipif(sys.platform != "linux", reason="what Linux tells")
def test_what_the_system_tells_of_a_fork(tmp_path):
    proc = tmp_path
    (proc / "cmdline").write_bytes(b"python\0app.py\0")
    for flags, expected in ((0x40, True), (0x400000 | 0x40, True), (0x400000, False)):
        (proc / "stat").write_bytes(b"12 (a (b) c) S 1 2 3 0 -1 %d 5 6" % flags)
        assert forks.forked(str(proc)) is expected
    (proc / "stat").write_bytes(b"12 (python) S 1 2 3 0 -1 64 5 6")
    (proc / "cmdline").write_bytes(b"python\0-c\0from multiprocessing.forkserver import main")
    assert forks.forked(str(proc)) is False
    assert forks.forked(str(tmp_path / "absent")) is False
    (proc / "maps").write_bytes(b"7f r-xp /usr/lib/libgomp.so.1.0.0\n")
    assert forks.openmp_is_loaded(str(proc))
    (proc / "maps").write_bytes(b"7f r-xp /site-packages/x.libs/libgomp-a34b3233.so.1.0.0\n")
    assert not forks.openmp_is_loaded(str(proc))
    assert not forks.openmp_is_loaded(str(tmp_path / "absent"))
