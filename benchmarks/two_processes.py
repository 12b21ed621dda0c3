"""Two processes with one thread each against one process with one thread, on a batch of 200 MB.

    mpiexec -n 2 python benchmarks/two_processes.py mpi [--rounds 15]
    python benchmarks/two_processes.py dask [--rounds 15]

A round times each operation in one process, on the whole batch, and in two, on halves. The figure
is the quotient of the two: 0.5 is what two machines could do. Beside it stands what bounds it, with
no batch norm in it: with MPI the same for a copy of the batch, with dask the time for the graph
alone. With MPI the one process is a rank like the others, and then a `BatchNorm2d`, which reads the
batch once where a rank, whose statistics come from outside, reads it twice. The medians over the
rounds count, and the rounds are printed as well.

Needs mpi4py and an MPI, or dask and distributed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

os.environ["BNFAST_NUM_THREADS"] = "1"
os.environ["BNFAST_CACHE_BYTES"] = str(2**31)  # room for all results of a round

import numpy as np

from bnfast import BatchNorm2d

SHAPE = (250, 64, 56, 56)
"""200 MB in float32."""

CHUNKS = 2
"""Of the batch, in dask: one for each worker."""

Rounds = dict[str, list[tuple[float, float]]]
"""Seconds in one process and in two, for each operation and round."""


def mpi(rounds: int) -> Rounds | None:
    """Return the times with MPI, on rank 0."""
    from mpi4py import MPI

    from bnfast.interop.mpi import SyncBatchNorm2d

    comm = MPI.COMM_WORLD
    if comm.size != 2:
        raise SystemExit("run this with: mpiexec -n 2 python benchmarks/two_processes.py mpi")
    rng = np.random.default_rng(comm.rank)
    size = SHAPE[0] if comm.rank == 0 else SHAPE[0] // 2
    batch = [rng.standard_normal((size, *SHAPE[1:]), dtype=np.float32) for _ in range(2)]
    half = [array[: SHAPE[0] // 2] for array in batch]
    copy = np.zeros_like(batch[0])
    alone, together = BatchNorm2d(64), SyncBatchNorm2d(64)
    one_rank = SyncBatchNorm2d(64, comm=comm.Split(comm.rank))

    def meet() -> None:
        """Wait for the other rank without keeping its core busy."""
        arrived = comm.Ibarrier()
        while not arrived.Test():
            time.sleep(1e-4)

    def seconds(call: Callable[[], Any], ranks: int) -> float:
        meet()
        start = time.perf_counter()
        if comm.rank < ranks:
            call()
        meet()
        return time.perf_counter() - start

    operations: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "copy": (
            lambda: np.copyto(copy, batch[0]),
            lambda: np.copyto(copy[: len(half[0])], half[0]),
        ),
        "forward": (lambda: one_rank(batch[0]), lambda: together(half[0])),
        "backward": (lambda: one_rank.backward(batch[1]), lambda: together.backward(half[1])),
        "forward, BatchNorm2d": (lambda: alone(batch[0]), lambda: together(half[0])),
        "backward, BatchNorm2d": (
            lambda: alone.backward(batch[1]),
            lambda: together.backward(half[1]),
        ),
    }
    times: Rounds = {name: [] for name in operations}
    for _ in range(rounds + 1):
        for name, (one, two) in operations.items():
            times[name].append((seconds(one, 1), seconds(two, 2)))
    return {name: row[1:] for name, row in times.items()} if comm.rank == 0 else None


def dask(rounds: int) -> Rounds:
    """Return the times on one and on two workers of a cluster, which hold the chunks.

    "graph" is the forward call on planes of one element: what dask needs for the tasks themselves.
    """
    import dask.array as da
    from distributed import Client, LocalCluster, wait

    from bnfast.interop.dask import batch_norm

    times: Rounds = {"graph": [], "forward": []}
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        workers = list(client.scheduler_info()["workers"])
        rng = da.random.default_rng(0)

        def spread(planes: tuple[int, int], hosts: list[str]) -> Any:
            """Return a batch in chunks, each of which one of the hosts holds."""
            shape = (SHAPE[0] // CHUNKS, SHAPE[1], *planes)
            chunks = [
                rng.normal(3, 2, shape, chunks=shape).astype(np.float32) for _ in range(CHUNKS)
            ]
            held = [
                client.persist(chunk, workers=[hosts[n % len(hosts)]])
                for n, chunk in enumerate(chunks)
            ]
            whole = client.persist(da.concatenate(held), workers=hosts)
            wait(whole)
            return whole

        def seconds(x: Any, hosts: list[str]) -> float:
            lazy = batch_norm(x, None, None, training=True)
            start = time.perf_counter()
            wait(client.persist(lazy, workers=hosts))
            return time.perf_counter() - start

        sides = workers[:1], workers
        batches = {
            name: [(spread(planes, hosts), hosts) for hosts in sides]
            for name, planes in (("graph", (1, 1)), ("forward", SHAPE[2:]))
        }
        for _ in range(rounds + 1):
            for name, (one, two) in batches.items():
                times[name].append((seconds(*one), seconds(*two)))
    return {name: row[1:] for name, row in times.items()}


def main() -> None:
    """Print the medians and the rounds."""
    parser = argparse.ArgumentParser(description="Two processes against one.")
    parser.add_argument("engine", choices=["mpi", "dask"])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    times = {"mpi": mpi, "dask": dask}[options.engine](options.rounds)
    for name, row in (times or {}).items():
        one, two = (median(column) * 1e3 for column in zip(*row, strict=True))
        ratios = [second / first for first, second in row]
        print(
            f"{name:22} one {one:6.1f} ms, two {two:6.1f} ms: {median(ratios):.2f}  rounds:",
            *(f"{ratio:.2f}" for ratio in ratios),
        )


if __name__ == "__main__":
    main()
