"""Many threads at once, and the pools that programs run them in: right answers, and no deadlock."""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from backends_here import AVAILABLE, over_backends
from fresh_python import run
from numba_layers import LAYERS, environment_of

import bnfast
from bnfast.testing.bounds import assert_same_bits

SHAPE = (8, 16, 32, 32)  # large enough for a team of threads
WORKERS, TASKS, PATIENCE = 8, 40, 100


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.skipif("numba" not in AVAILABLE, reason="needs Numba")
def test_sixty_four_threads_on_all_backends(layer):
    """A cut of ``tests/soak.py``, whose whole length is a command of its own."""
    script = str(Path(__file__).with_name("soak.py"))
    finished = run(script, "--threads", "64", "--seconds", "3", **environment_of(layer))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"Numba's layer {layer}" in finished.stdout
    assert int(re.search(r"(\d+) calls", finished.stdout)[1]) >= 64


def step(layer, x):
    """Return what one training step of a copy of a layer gives."""
    own = bnfast.BatchNorm2d(layer.num_features, backend=layer.backend)
    own.load_state_dict(layer.state_dict())
    y = own(x)
    return y, own.backward(y), own.running_mean


def assert_all_right(results, layer, inputs):
    assert len(results) == len(inputs)
    for result, x in zip(results, inputs, strict=True):
        for one, other in zip(result, step(layer, x), strict=True):
            assert_same_bits("in a pool against alone", one, other)


@pytest.fixture
def inputs(rng):
    return [rng.normal(3, 2, SHAPE).astype(np.float32) for _ in range(TASKS)]


@pytest.fixture(autouse=True)
def two_threads():
    bnfast.set_num_threads(2)
    yield
    bnfast.set_num_threads(None)


@over_backends
def test_threads_of_concurrent_futures(backend, inputs):
    layer = bnfast.BatchNorm2d(SHAPE[1], backend=backend)
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        results = list(pool.map(lambda x: step(layer, x), inputs, timeout=PATIENCE))
    assert_all_right(results, layer, inputs)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@over_backends
def test_processes_of_concurrent_futures(backend, inputs, method):
    layer, inputs = bnfast.BatchNorm2d(SHAPE[1], backend=backend), inputs[:8]
    step(layer, inputs[0])
    context = multiprocessing.get_context(method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks with threads
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
            results = list(pool.map(step, [layer] * len(inputs), inputs, timeout=PATIENCE))
    assert_all_right(results, layer, inputs)


@over_backends
def test_asyncio(backend, inputs):
    layer = bnfast.BatchNorm2d(SHAPE[1], backend=backend)

    async def work():
        tasks = [asyncio.to_thread(step, layer, x) for x in inputs]
        return await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)

    assert_all_right(asyncio.run(work()), layer, inputs)


@pytest.mark.parametrize("pool", ["threading", "loky", "multiprocessing"])
@over_backends
def test_joblib(backend, inputs, pool):
    joblib = pytest.importorskip("joblib")
    layer = bnfast.BatchNorm2d(SHAPE[1], backend=backend)
    inputs = inputs if pool == "threading" else inputs[:8]
    step(layer, inputs[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        parallel = joblib.Parallel(n_jobs=4, backend=pool, timeout=PATIENCE)
        results = parallel(joblib.delayed(step)(layer, x) for x in inputs)
    assert_all_right(results, layer, inputs)


@over_backends
def test_joblib_within_joblib(backend, inputs):
    joblib = pytest.importorskip("joblib")
    layer = bnfast.BatchNorm2d(SHAPE[1], backend=backend)

    def inner(some):
        parallel = joblib.Parallel(n_jobs=2, backend="threading", timeout=PATIENCE)
        return parallel(joblib.delayed(step)(layer, x) for x in some)

    parallel = joblib.Parallel(n_jobs=4, backend="threading", timeout=PATIENCE)
    parts = parallel(joblib.delayed(inner)(inputs[i : i + 10]) for i in range(0, TASKS, 10))
    assert_all_right([result for part in parts for result in part], layer, inputs)


@over_backends
def test_dask(backend, inputs):
    dask = pytest.importorskip("dask")
    layer = bnfast.BatchNorm2d(SHAPE[1], backend=backend)
    tasks = [dask.delayed(step)(layer, x) for x in inputs]
    results = dask.compute(*tasks, scheduler="threads", num_workers=WORKERS)
    assert_all_right(results, layer, inputs)
