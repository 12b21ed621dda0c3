"""Mixed load on many threads for a while: no wrong answer, no growth. Run it as a script::

    python3 tests/soak.py [--threads 64] [--seconds 60] [--layer omp|tbb|workqueue]

Every thread calls every backend in turns. Eval layers are shared by all threads; each thread trains
layers of its own, forward and backward; some calls are large enough for a team of threads. Each
result is compared, to the bit, with what the same call gave when it ran alone. The memory of the
process is read ten times a second, from when every thread has made 20 calls. How much is in use at
a moment depends on which calls run, so the medians of every ten seconds are compared: after the
first, they may grow by 5 %. The C library is told to keep no freed memory for itself.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numba_layers import environment_of

import bnfast
import bnfast.functional as F
from bnfast.testing.bounds import assert_same_bits

SHAPES = ((2, 3, 5, 5), (4, 8, 16, 16), (1, 64, 14, 14), (8, 16, 32, 32), (2, 8, 128, 96))
DTYPES = (np.float32, np.float64, np.float16)
WARM_UP = 10.0  # seconds
MALLOC = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "131072"}  # glibc's, read at its start
GROWTH = 0.05
FIRST_CALLS = 20  # of every thread, before the time begins: each starts a team of its own

Job = tuple[str, Callable[[], list[Any]], list[Any]]


def jobs(backends: list[str], rng: np.random.Generator) -> list[Job]:
    """Return calls to make, each with the results that it gives when it runs alone."""
    made = []
    for backend in backends:
        for shape in SHAPES:
            for dtype in DTYPES:
                x = rng.normal(3, 2, shape).astype(dtype)
                for name, call in calls_on(backend, x).items():
                    expected = [np.array(value) for value in call()]
                    made.append((f"{backend} {name} {shape} {x.dtype}", call, expected))
    return made


def calls_on(backend: str, x: np.ndarray) -> dict[str, Callable[[], list[Any]]]:
    """Return calls on one array, by what they do."""
    channels = x.shape[1]
    shared = bnfast.BatchNorm2d(channels, activation="relu", backend=backend)
    shared(x)
    shared.eval()
    frozen = shared.freeze()
    last = np.moveaxis(np.moveaxis(x, 1, -1).copy(), -1, 1)

    def train() -> list[Any]:
        own = bnfast.BatchNorm2d(channels, backend=backend)
        y = own(x, x)
        dx = own.backward(y)
        return [y, dx, own.grad_weight, own.running_mean, own.running_var]

    def in_place() -> list[Any]:
        y = x.copy()
        return [shared(y, out=y)]

    def moments() -> list[Any]:
        found = F.moments(x, backend=backend)
        return [found.mean, found.m2]

    return {
        "shared eval layer": lambda: [shared(x)],
        "frozen layer": lambda: [frozen(last)],
        "in place": in_place,
        "own training layer": train,
        "moments": moments,
    }


def soak(
    threads: int, seconds: float, backends: list[str]
) -> tuple[int, int, list[str], list[float]]:
    """Run the load; return the calls made, their kinds, the errors, and the memory over time."""
    bnfast.set_num_threads(2)
    work = jobs(backends, np.random.default_rng())
    errors: list[str] = []
    counts = [0] * threads
    stop = threading.Event()
    together = threading.Barrier(threads + 1)

    def run(number: int) -> None:
        chosen = random.Random(number)
        together.wait()
        while True:
            name, call, expected = chosen.choice(work)
            try:
                for one, other in zip(call(), expected, strict=True):
                    assert_same_bits(name, np.asarray(one), other)
            except BaseException as error:
                errors.append(f"{name}: {type(error).__name__}: {error}")
                stop.set()
            counts[number] += 1
            if stop.is_set():
                return

    started = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(threads)]
    for thread in started:
        thread.start()
    together.wait()
    while not stop.is_set() and min(counts) < FIRST_CALLS:  # on a busy machine that takes a while
        time.sleep(0.1)
    memory = watch(seconds, stop)
    stop.set()
    for thread in started:
        thread.join(60)
    errors += [f"{t.name} hangs" for t in started if t.is_alive()]
    idle = [n for n, count in enumerate(counts) if not count]
    errors += [f"thread {n} made no call" for n in idle]
    return sum(counts), len(work), errors, memory


def watch(seconds: float, stop: threading.Event) -> list[float]:
    """Read the memory in use until the time is over; return the median of every ten seconds."""
    begin, windows = time.monotonic(), [[resident()]]
    while not stop.is_set() and (passed := time.monotonic() - begin) < seconds:
        while len(windows) <= passed // WARM_UP:
            windows.append([])
        windows[int(passed // WARM_UP)].append(resident())
        time.sleep(0.1)
    return [statistics.median(window) for window in windows if window]


def resident() -> float:
    """Return the bytes of memory that this process has."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return float(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> int:
    """Parse the arguments, run, and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--layer", choices=("omp", "tbb", "workqueue"), help="of Numba")
    arguments = parser.parse_args()
    wanted = MALLOC | (environment_of(arguments.layer) if arguments.layer else {})
    if not MALLOC.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)
    sys.setswitchinterval(1e-4)
    backends = [
        name for name in ("cython", "numba", "numpy") if bnfast.list_backends()[name].available
    ]
    calls, kinds, errors, memory = soak(arguments.threads, arguments.seconds, backends)
    layer = "none"
    if "numba" in backends:
        import numba

        layer = numba.threading_layer()
    after = memory[1:] or memory
    growth = max(after) / after[0] - 1
    sys.stdout.write(
        f"{arguments.threads} threads, {arguments.seconds:g} s, backends {', '.join(backends)}, "
        f"Numba's layer {layer}: {calls} calls of {kinds} kinds, {len(errors)} errors, "
        f"memory up by {100 * growth:.1f} % after the first {WARM_UP:g} s: "
        f"{', '.join(f'{size / 2**20:.0f}' for size in memory)} MiB\n"
    )
    sys.stdout.writelines(f"{error}\n" for error in errors[:10])
    judged = arguments.seconds >= 2 * WARM_UP
    return int(bool(errors) or (judged and growth > GROWTH))


if __name__ == "__main__":
    raise SystemExit(main())
