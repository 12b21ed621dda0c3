"""dask arrays give the results of the call in memory: on every scheduler, after a lost worker."""

from __future__ import annotations

import pytest
from fresh_python import run

pytest.importorskip("dask", reason="dask is not installed")

from dask_draws import check_all

DISTRIBUTED = """
import os, signal, sys, threading, time
import numpy as np
sys.path[:0] = {paths!r}
import dask, dask.array as da
from distributed import Client, LocalCluster, get_worker
from dask_draws import check_all
import bnfast
from bnfast.interop import dask as bnd

def main():
    rng = np.random.default_rng({seed})
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None,
                           worker_dashboard_address=None)
    with cluster, Client(cluster):
        {test}

def slow_chunk(block_info=None):
    (start, stop), *_ = block_info[None]["array-location"]
    time.sleep(0.05)
    rows = np.random.default_rng(start).normal(1e3, 1, (stop - start, 4, 50))
    return rows.astype(np.float32)

if __name__ == "__main__":
    main()
"""

EQUAL = """
        check_all(rng, {amount})
        print("equal")
"""

KILLED = """
        x = da.map_blocks(slow_chunk, chunks=((10,) * 40, (4,), (50,)), dtype=np.float32)
        with dask.config.set(scheduler="sync"):
            expected = bnd.moments(x).compute()
        client = Client.current()
        pids = client.run(os.getpid)
        future = client.compute(bnd.moments(x))
        time.sleep(0.5)
        assert not future.done()
        os.kill(list(pids.values())[0], signal.SIGKILL)
        assert future.result(timeout=60) == expected
        assert client.run(os.getpid) != pids
        print("survived")
"""


@pytest.fixture
def amount(request):
    """Return how many arrays to compare: 200, or with --slow 2,000."""
    return 2000 if request.config.option.slow else 200


@pytest.mark.parametrize("scheduler", ["sync", "threads", "processes"])
def test_equal_to_the_call_in_memory(rng, scheduler, amount):
    check_all(rng, amount, scheduler=scheduler, num_workers=2)


@pytest.fixture
def on_a_cluster(rng, tmp_path, request):
    """Return a function that runs a piece of code in a program with a cluster of two workers."""
    pytest.importorskip("distributed", reason="distributed is not installed")

    def program(test):
        paths = [str(request.path.parent)]
        text = DISTRIBUTED.format(seed=int(rng.integers(2**32)), test=test.strip(), paths=paths)
        (tmp_path / "program.py").write_text(text)
        finished = run(str(tmp_path / "program.py"))
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    return program


def test_equal_to_the_call_in_memory_on_a_cluster(on_a_cluster, amount):
    """A tenth of the arrays: a task takes some milliseconds there."""
    assert "equal" in on_a_cluster(EQUAL.format(amount=amount // 10))


def test_a_worker_is_killed_during_a_reduction(on_a_cluster):
    assert "survived" in on_a_cluster(KILLED)
