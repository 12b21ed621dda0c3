"""Recalibrate batch norm on data larger than the memory, then normalise the data.

The data lie in a ``.npy`` file (2 GB, made at the first run), and this program may use 512 MB. dask
cuts the array into chunks of rows; a task maps one chunk of the file into memory, works on it and
unmaps it. Two passes::

    recalibrate   the moments of each chunk, merged: running mean and variance of all the data
    normalise     each chunk, to zero mean and unit variance; ``--output`` keeps the result

Between them nothing but the running statistics is kept. The program prints the time of each pass
beside that of just reading the file, and its peak memory, and exits with 1 if that is over the
limit or if a channel did not come out with mean 0 and variance 1.

    python docs/examples/recalibrate_large.py --gigabytes 2 --limit 512
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import dask.array as da
import dask.threaded
import numpy as np
from numpy.typing import NDArray
from tqdm.dask import TqdmCallback

import bnfast
import bnfast.interop.dask as bnd

CHANNELS, SIDE = 64, 28
SAMPLE = 4 * CHANNELS * SIDE**2  # bytes


class Rows:
    """An array in a ``.npy`` file of which only what is asked for is ever mapped into memory.

    `numpy.load` with ``mmap_mode`` maps the whole file, and all of it that was ever read counts as
    memory in use.
    """

    def __init__(self, path: Path) -> None:
        whole = np.load(path, mmap_mode="r")
        self.path, self.offset = path, whole.offset
        self.shape, self.dtype, self.ndim = whole.shape, whole.dtype, whole.ndim

    def mapped(self, index: tuple[slice, ...], mode: str) -> NDArray[Any]:
        rows, *rest = index
        start, stop, _ = rows.indices(self.shape[0])
        shape = (stop - start, *self.shape[1:])
        at = self.offset + start * math.prod(shape[1:]) * self.dtype.itemsize
        chunk = np.memmap(self.path, self.dtype, mode, at, shape)
        return chunk.view(np.ndarray)[(slice(None), *rest)]

    def __getitem__(self, index: tuple[slice, ...]) -> NDArray[Any]:
        return self.mapped(index, "r")

    def __setitem__(self, index: tuple[slice, ...], values: NDArray[Any]) -> None:
        self.mapped(index, "r+")[...] = values

    def __dask_tokenize__(self) -> tuple[str, int, int]:
        state = os.stat(self.path)
        return str(self.path), state.st_size, state.st_mtime_ns


def make(path: Path, gigabytes: float, seed: int = 0) -> None:
    """Write activations to a file: each channel with a mean and a deviation of its own."""
    rng = np.random.default_rng(seed)
    samples = round(gigabytes * 1e9 / SAMPLE)
    mean, std = rng.normal(0, 5, (CHANNELS, 1, 1)), rng.uniform(0.1, 3, (CHANNELS, 1, 1))
    unfinished = path.with_suffix(".part")
    with unfinished.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (samples, CHANNELS, SIDE, SIDE)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, samples, 32):
            rows = min(32, samples - start)
            noise = rng.standard_normal((rows, CHANNELS, SIDE, SIDE), np.float32)
            (mean + std * noise).astype(np.float32).tofile(file)
    unfinished.rename(path)


def seconds_to_read(path: Path, nbytes: int) -> float:
    """Return how long it takes to read a file once, a chunk at a time into the same memory."""
    buffer = np.empty(nbytes, np.uint8)
    with path.open("rb", buffering=0) as file:
        start = time.perf_counter()
        while file.readinto(buffer):
            pass
        return time.perf_counter() - start


def normalise(bn: Any, x: Any, output: Path | None) -> None:
    """Compute ``bn(x)`` chunk by chunk; write it, or look at it and forget it."""
    y = bn(x)
    with TqdmCallback(desc="normalise", unit="task"):
        if output is None:
            check(y)
        else:
            np.lib.format.open_memmap(output, "w+", x.dtype, x.shape).flush()  # a file of zeros
            da.store(y, Rows(output), lock=False)


def check(y: Any) -> None:
    """Raise unless each channel has mean 0 and variance 1."""
    whole = bnd.moments(y).compute()
    np.testing.assert_allclose(whole.mean, 0, atol=1e-4)
    np.testing.assert_allclose(whole.m2 / whole.count, 1, atol=1e-3)


def peak_memory() -> int:
    """Return the most bytes of this program that were in memory at a time, mapped files included.

    On Linux from /proc: what getrusage says begins with the memory of the process that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Recalibrate on data larger than the memory.")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the data")
    parser.add_argument("--limit", type=int, default=512, help="memory to use, in MB")
    parser.add_argument("--chunk", type=int, default=192, help="samples in a chunk, of 0.2 MB each")
    parser.add_argument("--data", type=Path, help="where the data are, or are made")
    parser.add_argument("--output", type=Path, help="where to write the normalised data")
    options = parser.parse_args(arguments)
    path = options.data or Path(tempfile.gettempdir()) / f"bnfast-{options.gigabytes:g}GB.npy"
    if not path.exists():
        print(f"making {path}")
        make(path, options.gigabytes)
    # Of the limit the kernel enforces what a process allocates; what it maps of a file is added in
    # the peak that is printed.
    resource.setrlimit(resource.RLIMIT_DATA, (options.limit * 10**6,) * 2)

    # Given as a function: for a name, or none, dask imports distributed to ask for a cluster.
    dask.config.set(scheduler=dask.threaded.get)

    x = da.from_array(Rows(path), chunks=(options.chunk, -1, -1, -1), fancy=False)
    print(f"{path}: {x.nbytes / 1e9:.2f} GB, {x.numblocks[0]} chunks of {x.chunks[0][0]} samples")
    bn = bnfast.BatchNorm2d(CHANNELS)
    passes = {
        "recalibrate": functools.partial(bnfast.recalibrate, bn, [bn], x),
        "normalise": functools.partial(normalise, bn.eval(), x, options.output),
    }
    # Once for nothing: whether the file is cached is no matter of ours.
    seconds_to_read(path, options.chunk * SAMPLE)
    reading = working = 0.0
    for name, run in passes.items():
        read = seconds_to_read(path, options.chunk * SAMPLE)
        start = time.perf_counter()
        run()
        took = time.perf_counter() - start
        reading, working = reading + read, working + took
        print(f"{name}: {took:.2f} s, reading the file {read:.2f} s")
    peak = peak_memory() / 1e6
    print(f"speed: {reading / working:.2f} of that of reading the file once per pass")
    print(f"peak memory: {peak:.0f} MB of {options.limit} MB")
    return 0 if peak <= options.limit else 1


if __name__ == "__main__":
    sys.exit(main())
