"""What every call pays before its kernel runs: choosing the backend, claiming the threads."""

from __future__ import annotations

import numpy as np
import pytest

import bnfast
from bnfast import registry, threads

X = np.ones((2, 3, 4, 4), np.float32)
ROUNDS = {"rounds": 20, "iterations": 20_000, "warmup_rounds": 1}


@pytest.mark.benchmark(group="choice of the backend")
@pytest.mark.parametrize("argument", [None, "numpy"])
def test_choose(benchmark, argument):
    kernels = benchmark.pedantic(registry.choose, args=(argument, X), **ROUNDS)
    assert kernels is registry.load(argument or bnfast.get_backend())


@pytest.mark.benchmark(group="choice of the backend")
def test_choose_in_context(benchmark):
    with bnfast.use_backend("numpy"):
        kernels = benchmark.pedantic(registry.choose, args=(None, X), **ROUNDS)
    assert kernels is registry.load("numpy")


@pytest.mark.benchmark(group="claim and release of the threads")
@pytest.mark.parametrize("elements", [1, threads.SERIAL_BELOW])
def test_claim_and_release(benchmark, elements):
    def claim_and_release():
        num_threads = threads.claim(elements)
        threads.free[num_threads > 1] = True
        return num_threads

    with bnfast.use_num_threads(2):
        num_threads = benchmark.pedantic(claim_and_release, **ROUNDS)
    assert num_threads == (2 if elements >= threads.SERIAL_BELOW else 1)
