"""Tables, goals and plots from a saved run.

    python -m pytest benchmarks/ --benchmark-json=run.json
    python benchmarks/report.py run.json                  # the report, as Markdown
    python benchmarks/report.py run.json --into docs      # docs/measured.md and its plots

Several files are taken together: a run may be made in parts, with ``-k``. A time is the median over
the rounds, in microseconds. A ratio is taken round by round, and its median shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import goals
from cases import DTYPES, GPU_SUITES, LAYOUTS, OPERATIONS, Case
from saved import LIMIT, Run

RATED = ("cython out=", "cython", "numba out=", "numba", "cuda out=", "cuda")

SUITE_TITLES = {
    "ranks": ": other ranks, and 4 dimensions of the same bytes",
    "epilogue-plain": ": nothing fused",
    "epilogue-relu": ", ReLU fused",
    "epilogue-residual": ", residual fused",
    "storage": ": beside other dtypes",
}

GPU_TITLES = dict(zip(GPU_SUITES, ("", ": ResNet-50, batch 32", ": large arrays"), strict=True))


def main() -> None:
    """Read the runs, and print or write the report."""
    parser = argparse.ArgumentParser(description="Tables, goals and plots from a saved run.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.json")
    parser.add_argument("--into", type=Path, metavar="DIRECTORY", help="write measured.md there")
    options = parser.parse_args()
    run = Run(options.runs)
    if options.into is None:
        print(*page(run, []), sep="\n")
        return
    import plots  # here, because matplotlib takes a second

    pictures = plots.save(run, options.into)
    text = "\n".join(page(run, pictures))
    (options.into / "measured.md").write_text(text + "\n", encoding="utf-8")


def page(run: Run, pictures: list[tuple[str, str]]) -> Iterator[str]:
    """Yield the lines of the page; a picture is a title and a file."""
    yield "# Measured"
    yield ""
    yield "Written by `benchmarks/report.py`. What it means, and how to make such a page on another"
    yield "machine: [speed](speed.md)."
    yield ""
    yield from machine(run)
    yield ""
    yield "## Goals"
    yield ""
    yield "Body: every shape but (1,64,8,8). Big: every shape whose x has more than 50 MB."
    yield "Large, on a GPU: every shape whose x has 100 MB and more. float32 where nothing else is"
    yield "said. Means are geometric."
    yield ""
    yield from goals.tables(run)
    for title, file in pictures:
        yield ""
        yield f"![{title}]({file})"
    for operation in OPERATIONS:
        for dtype in DTYPES:
            for layout in LAYOUTS:
                cases = [
                    case for case in run.groups if case[:4] == ("shapes", operation, layout, dtype)
                ]
                yield from section(run, f"{operation.title()}, {layout}, {dtype}", cases)
    for operation in OPERATIONS:
        cases = [case for case in run.groups if case[:2] == ("sizes", operation)]
        yield from section(run, f"{operation.title()}, more and more elements", cases)
    for layout in LAYOUTS:
        cases = [case for case in run.groups if case[0] == "channels" and case.layout == layout]
        yield from section(
            run, f"Inference, {layout}, the same bytes in 1, 3 and 64 channels", cases
        )
    for suite, what in SUITE_TITLES.items():
        for operation in OPERATIONS:
            for layout in LAYOUTS:
                cases = [
                    case
                    for case in run.groups
                    if (case.suite, case.operation, case.layout) == (suite, operation, layout)
                ]
                for dtype in dict.fromkeys(case.dtype for case in cases):
                    some = [case for case in cases if case.dtype == dtype]
                    title = f"{operation.title()}, {layout}, {dtype}{what}"
                    yield from section(run, title, some)
    for suite, what in GPU_TITLES.items():
        for operation in OPERATIONS:
            for dtype in DTYPES:
                for layout in LAYOUTS:
                    kind = (suite, operation, layout, dtype)
                    cases = [case for case in run.groups if case[:4] == kind]
                    title = f"{operation.title()}, {layout}, {dtype}, on a GPU{what}"
                    yield from section(run, title, cases)


def section(run: Run, title: str, cases: list[Case]) -> Iterator[str]:
    """Yield two tables with a row for each case: the times, and the ratios; nothing if no case."""
    if not cases:
        return
    names = dict.fromkeys(name for case in cases for name in run.groups[case])
    yield from ("", f"## {title}", "", "Microseconds:", "")
    yield from _markdown(
        ["shape", *names],
        (
            [case.label, *(microseconds(run.seconds(case, name)) for name in names)]
            for case in cases
        ),
    )
    yield from device_times(run, cases, list(names))
    rated = [name for name in RATED if name in names]
    if not rated:
        return
    columns = [f"limit / {name}" for name in rated if LIMIT in names]
    columns += [f"peer / {name}" for name in rated]
    rows = (
        [
            case.label,
            *(number(run.ratio(case, LIMIT, name)) for name in rated if LIMIT in names),
            *(peer(run, case, name) for name in rated),
        ]
        for case in cases
    )
    yield from ("", "Share of the limit, and the fastest peer's time over bnfast's:", "")
    yield from _markdown(["shape", *columns], rows)


def device_times(run: Run, cases: list[Case], names: list[str]) -> Iterator[str]:
    """Yield a table of what kernels and copies alone took; nothing where it was not taken."""
    taken = [name for name in names if any(run.device_seconds(c, name) for c in cases)]
    if taken:
        rows = (
            [case.label, *(microseconds(run.device_seconds(case, name)) for name in taken)]
            for case in cases
        )
        yield from ("", "Microseconds of kernels and copies on the device:", "")
        yield from _markdown(["shape", *taken], rows)


def _markdown(header: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|---" * len(header) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def microseconds(seconds: float | None) -> str:
    """Return a time with three digits or all before the point."""
    if seconds is None:
        return ""
    time = 1e6 * seconds
    return f"{time:,.0f}" if time >= 99.5 else f"{time:.3g}"


def number(ratio: float | None) -> str:
    """Return a ratio with two decimals."""
    return "" if ratio is None else f"{ratio:.2f}"


def peer(run: Run, case: Case, name: str) -> str:
    """Return the ratio to the fastest peer, and who that is."""
    found = run.fastest_peer(case, name)
    return "" if found is None else f"{found[0]:.2f} {found[1].removesuffix(' out=')}"


def machine(run: Run) -> Iterator[str]:
    """Yield what the figures depend on."""
    config, cpu = run.machine["bnfast"], run.machine["cpu"]
    versions = {name: number for name, number in config["versions"].items() if number}
    for info in run.info.values():
        versions |= info["versions"]
    rows = {
        "date": run.date,
        "machine": f"{cpu.get('brand_raw', run.machine['machine'])}, {config['platform']}",
        "threads": ", ".join(
            sorted(
                {
                    str(info["threads"])
                    for (case, name), info in run.info.items()
                    if name == LIMIT and not case.on_gpu
                }
            )
        ),
        "instructions": ", ".join(
            f"{name} {text}"
            for name, text in sorted(
                {(name, i["instruction_set"]) for (_, name), i in run.info.items()}
            )
            if "out=" not in name
        ),
        "versions": ", ".join(f"{name} {number}" for name, number in sorted(versions.items())),
        "GPU": ", ".join(sorted({info["gpu"] for info in run.info.values() if "gpu" in info})),
    }
    yield from _markdown(["", ""], ([name, text] for name, text in rows.items() if text))


if __name__ == "__main__":
    main()
