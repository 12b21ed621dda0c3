"""SyncBatchNorm over MPI equals one process: programs run by mpiexec, on 1 to 4 ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mpi4py", reason="mpi4py is not installed")

PROGRAMS = Path(__file__).parent / "mpi_programs"
ALLOWED = {  # for Open MPI, which refuses more ranks than cores, and root
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def mpiexec(ranks, program, *arguments, timeout=60):
    """Return what a program prints on all ranks; fail if it does not end well and in time."""
    beside = Path(sys.executable).parent / "mpiexec"
    starter = str(beside) if beside.exists() else shutil.which("mpiexec")
    assert starter, "mpi4py is here, mpiexec is not: pip install mpich"
    finished = subprocess.run(
        [starter, "-n", str(ranks), sys.executable, "-m", "mpi4py", str(PROGRAMS / program)]
        + [str(argument) for argument in arguments],
        env=os.environ | ALLOWED | {"OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture
def seed(rng):
    return int(rng.integers(2**32))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equal_to_one_process(ranks, seed, request):
    amount = 300 if request.config.option.slow else 30
    printed = mpiexec(ranks, "equal.py", seed, amount)
    assert printed.count(f"equal in {amount} draws") == ranks


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_same_error_on_every_rank(ranks, seed):
    start = time.monotonic()
    printed = mpiexec(ranks, "errors.py", seed, timeout=30)
    assert printed.count("all errors alike") == ranks
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("dtype", "reference", "rtol"), [("float64", 0, 1e-12), ("float32", 1, 1e-6)]
)
def test_sgd_split_over_two_ranks(dtype, reference, rtol):
    """In float32 the reference computes convolutions in parts, as the ranks do."""
    losses = np.array(mpiexec(2, "sgd.py", dtype).split(), float).reshape(10, 3)
    np.testing.assert_allclose(losses[:, 0], losses[:, 1 + reference], rtol=rtol)
    assert losses[-1, 0] < 0.5 * losses[0, 0]
