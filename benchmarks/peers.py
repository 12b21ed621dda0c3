"""The ratios to torch: ``python benchmarks/peers.py``, about three minutes on two cores.

For each shape, layout and operation torch and bnfast take turns, in an order that rotates from
round to round. A turn is a pause, in which the threads of whoever came before go to sleep; a call
that is not counted, which fills the cache; and then several calls back to back, of which the
fastest counts: on a shared machine the others measure its neighbours. The figures are medians over
all turns. The ratio is the median of the rounds' own ratios: a machine that slows down for a while
slows both.

    inference, training   torch's module in `inference_mode` against the layer ``bn(x)``; the row
                          ``out=`` gives the layer an array to write to, which torch's cannot take
    backward              torch's operator on saved statistics against `batch_norm_backward`

A ratio above 1 says that bnfast is faster.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
from contenders import CONTENDERS, Call, Case, Problem

import bnfast

INFERENCE = (
    (1, 64, 8, 8),
    (1, 64, 56, 56),
    (8, 64, 56, 56),
    (32, 64, 112, 112),
    (32, 256, 56, 56),
    (32, 512, 28, 28),
    (32, 1024, 14, 14),
    (32, 2048, 7, 7),
)
TRAINING = tuple(INFERENCE[i] for i in (1, 2, 3, 4, 6, 7))

PAUSE = 0.01
"""Seconds. OpenMP's idle threads spin for about 4 ms, on the core that the next one needs."""

TURN = 0.05
"""Seconds of calls in a turn, at least; a turn has no fewer than two."""

GROUP = 0.0002
"""Seconds of calls between two readings of the clock: a tenth of a scheduler's time slice."""


def main() -> None:
    """Measure, print the table, and count the rows that lose."""
    options = parser().parse_args()
    rows = []
    header = f"{'shape':>18}  {'layout':13} {'operation':16}"
    print(f"{header} {'torch us':>10} {options.backend + ' us':>10} {'ratio':>7}")
    for case in cases(options):
        for row in compare(case, options):
            rows.append(row)
            label = f"{row['shape']!s:>18}  {row['layout']:13} {row['operation']:16}"
            times = f"{row['torch_us']:10.1f} {row['bnfast_us']:10.1f}"
            print(f"{label} {times} {row['ratio']:7.2f}", flush=True)
    slower = sum(row["ratio"] < 1.0 for row in rows)
    print(f"{slower} of {len(rows)} rows are below 1.0")
    if options.json:
        report = {"machine": machine(options), "rows": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(description="Compare bnfast with torch, row by row.")
    result.add_argument("--backend", default="cython", help="default: %(default)s")
    result.add_argument("--threads", type=int, default=2, help="of each; default: %(default)s")
    result.add_argument("--rounds", type=int, default=5, help="turns of each; default: %(default)s")
    result.add_argument(
        "--shapes", nargs="+", metavar="N,C,H,W", help="only these of the table; default: all"
    )
    result.add_argument("--operations", nargs="+", default=["inference", "training", "backward"])
    result.add_argument("--layouts", nargs="+", default=["NCHW", "channels-last"])
    result.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    return result


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Return the rows that were asked for."""
    wanted = options.shapes and [tuple(map(int, text.split(","))) for text in options.shapes]
    for operation in options.operations:
        for shape in INFERENCE if operation == "inference" else TRAINING:
            if not wanted or shape in wanted:
                for layout in options.layouts:
                    yield Case(operation, shape, layout, "float32")


def compare(case: Case, options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Yield the row of the layer's own output, and that of ``out=``."""
    problem = Problem(case, np.random.default_rng())
    some = slice(None, None, max(1, case.shape[1] // 8))
    calls = {}
    with bnfast.use_num_threads(options.threads):
        for name in ("torch", options.backend, f"{options.backend}, out="):
            calls[name] = CONTENDERS[name](problem)
            problem.check(calls[name](), some)
        times = interleave(calls, options.rounds)
    for name, suffix in ((options.backend, ""), (f"{options.backend}, out=", " out=")):
        ratios = [a / b for a, b in zip(times["torch"], times[name], strict=True)]
        yield {
            "operation": case.operation + suffix,
            "shape": case.shape,
            "layout": case.layout,
            "torch_us": 1e6 * median(times["torch"]),
            "bnfast_us": 1e6 * median(times[name]),
            "ratio": median(ratios),
        }


def interleave(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Return the seconds per call of each contender, one figure for each of its turns."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(PAUSE)
            times[name].append(take_turn(calls[name]))
    return times


def take_turn(call: Call) -> float:
    """Return the least of the seconds that calls take, back to back, after one to warm up.

    Short calls are timed in groups, so that reading the clock costs them nothing.
    """
    group = max(1, int(GROUP / seconds(call, 1)))
    samples: list[float] = []
    while len(samples) < 2 or sum(samples) * group < TURN:
        samples.append(seconds(call, group))
    return min(samples)


def seconds(call: Call, repeat: int) -> float:
    """Return the mean time of ``repeat`` calls. Each result lives until the next one is made."""
    start = time.perf_counter()
    for _ in range(repeat):
        result = call()
    elapsed = time.perf_counter() - start
    del result
    return elapsed / repeat


def machine(options: argparse.Namespace) -> dict[str, object]:
    """Return what the figures depend on."""
    versions = {name: importlib.metadata.version(name) for name in ("bnfast", "numpy", "torch")}
    return {
        "platform": platform.platform(),
        "threads": options.threads,
        "backend": options.backend,
        "rounds": options.rounds,
        "versions": versions,
        "config": bnfast.show_config(mode="dict"),
    }


if __name__ == "__main__":
    main()
