"""Errors in ulps of bnfast and its peers against `exact` arithmetic, over mean/std and n.

    python benchmarks/accuracy.py --save errors.json            # measure; half an hour
    python benchmarks/accuracy.py --quick                       # a minute, and print
    python benchmarks/accuracy.py errors.json --into docs       # tables and plots

For each operation, dtype, number n of elements per channel and ratio mean/std, `measure` draws one
problem and gives it to every subject of `subjects`. The error of an element is counted in ulps of
the dtype at a scale, that of `bnfast.spec`:

    y          t = max(|weight| max(1, |xhat|), |bias|, |residual|, |y|)
    dx         |weight| invstd (|g| + |mean(g)| + max(1, |xhat|) |mean(g xhat)|), the sum of its
               terms' magnitudes; of float64, whose sums over g and g xhat are themselves rounded
               to float64, with means of magnitudes: mean(|g|) and mean(|g| max(1, |xhat|))
    dweight,   these means times n; in ulps of the parameters' dtype, which is float32 unless x is
    dbias      float64

and compared with the bound of the contract, of which a `Row` has the largest share. float64 bounds,
and float64 sums, grow with 1 + |mean|/std, because a mean in float64 is itself rounded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")  # Numba looks once, when it is imported

import exact
from accuracy_cells import COUNTS, TYPICAL, Cell, Row, cells
from subjects import DTYPES, EPS, LAYOUTS, OPERATIONS, SUBJECTS, TRAINING, Problem

import bnfast
from bnfast import registry, spec
from bnfast.testing.reference import FORMATS

PACKAGES = ("bnfast", "numpy", "numba", "torch", "onnxruntime", "openvino")

ELEMENTS, CHANNELS = 1 << 17, (2, 1 << 12)
"""Of an array: as many elements, unless the subject is slow, in at least and at most so many
channels. One channel would have the same memory in both layouts."""

FEW_ELEMENTS, FEW_COUNTS = 400, (2, 10, 100)
"""For a subject that runs in a simulator."""

CHUNK = 1 << 18


class Drawn(NamedTuple):
    """A problem in rows of float64, and what is exact about it."""

    x: NDArray[np.float64]
    dy: NDArray[np.float64]
    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    given: exact.Statistics
    mean: NDArray[np.float64]
    var: NDArray[np.float64]


def as_dtype(name: str) -> np.dtype[Any]:
    """Return a dtype by name; bfloat16 is that of ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def draw(rng: np.random.Generator, cell: Cell, channels: int) -> Drawn:
    """Draw a problem with its own std, weight and bias for each channel, of either sign."""
    dtype = as_dtype(cell.dtype)
    vectors = np.float64 if cell.dtype == "float64" else np.float32

    def stored(values: NDArray[Any], kind: Any) -> NDArray[np.float64]:
        return values.astype(kind).astype(np.float64)

    std = rng.uniform(0.5, 2.0, (channels, 1))
    centre = cell.ratio * std * rng.choice([-1.0, 1.0], std.shape)
    x = stored(centre + std * rng.standard_normal((channels, cell.count)), dtype)
    dy = stored(rng.standard_normal(x.shape) + rng.uniform(-1.0, 1.0, std.shape), dtype)
    weight, bias = stored(
        rng.choice([-1.0, 1.0], (2, channels)) * rng.uniform(0.25, 4.0, (2, channels)), vectors
    )
    # Running statistics: near those of the batch, without being them.
    mean = stored((centre + std * rng.uniform(-1.0, 1.0, std.shape))[:, 0], vectors)
    var = stored((std**2 * rng.uniform(0.5, 2.0, std.shape))[:, 0], vectors)
    if cell.operation not in TRAINING:
        given = exact.Statistics(exact.fractions(mean), exact.fractions(var))
    else:
        given = exact.statistics(x)
    return Drawn(x, dy, weight, bias, given, mean, var)


def handed_over(drawn: Drawn, cell: Cell, layout: str) -> Problem:
    """Return the problem as arrays of shape (N, C, 1, n / N)."""
    dtype = as_dtype(cell.dtype)
    vectors = np.float64 if cell.dtype == "float64" else np.float32
    samples = 4 if cell.count % 4 == 0 else 1

    def array(rows: NDArray[np.float64]) -> NDArray[Any]:
        stored = rows.astype(dtype).reshape(len(rows), samples, 1, -1)
        if layout == LAYOUTS[0]:
            return np.ascontiguousarray(stored.transpose(1, 0, 2, 3))
        return np.ascontiguousarray(stored.transpose(1, 2, 3, 0)).transpose(0, 3, 1, 2)

    small = (v.astype(vectors) for v in (drawn.weight, drawn.bias, drawn.mean, drawn.var))
    return Problem(cell.operation, cell.dtype, layout, array(drawn.x), array(drawn.dy), *small)


def ulp(scale: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """Return the distance of adjacent numbers of a dtype at ``scale``."""
    if dtype in FORMATS:
        return FORMATS[dtype].spacing(scale)
    return np.spacing(scale.astype(dtype)).astype(np.float64)


class Judge:
    """Computes a problem exactly, once, and the errors of every subject's result.

    ``ulps`` and ``bounds`` are the sizes of an ulp, and the contract's bounds, by element.
    """

    def __init__(self, drawn: Drawn, cell: Cell) -> None:
        self.cell, self.drawn = cell, drawn
        mean = exact.paired(drawn.given.mean)
        inverse = exact.invstd(drawn.given.var, EPS)
        weights = exact.fractions(drawn.weight)
        scale = exact.paired([w * i for w, i in zip(weights, inverse, strict=True)])
        invstd = exact.paired(inverse).high
        self.ratio = np.abs(mean.high) * invstd
        made = None
        if cell.operation == "backward":
            made = exact.gradient(drawn.x, drawn.dy, drawn.given, drawn.weight, EPS)
        self.made, self.parts = made, []
        self.magnitudes = np.zeros((2, len(drawn.weight)))
        if made is not None:
            for part in self._chunks():
                g, xhat = np.abs(drawn.dy[:, part]), (drawn.x[:, part] - mean.high) * invstd
                terms = g, g * np.maximum(1.0, np.abs(xhat))
                self.magnitudes += [term.sum(axis=1) for term in terms]
        for part in self._chunks():
            x, g = drawn.x[:, part], drawn.dy[:, part]
            xhat = (x - mean.high) * invstd
            if made is None:
                result, added = exact.output(x, mean, scale, drawn.bias), np.zeros_like(g)
                if cell.operation == "residual":
                    result, added = exact.add(result, exact.single(g)), g
                size = spec.output_scale(
                    xhat, drawn.weight[:, None], drawn.bias[:, None], added, result.high
                )
            else:
                result = exact.gradient_input(x, g, mean, made)
                sums = made.shift.high, made.slope.high / invstd
                if cell.dtype == "float64":
                    sums = tuple(self.magnitudes[..., None] / cell.count)
                size = spec.gradient_scale(g, xhat, invstd, drawn.weight[:, None], *sums)
            self.parts.append((part, result, ulp(size, cell.dtype), self._float64(size)))

    def _chunks(self) -> Iterator[slice]:
        channels, count = self.drawn.x.shape
        step = max(1, CHUNK // channels)
        for start in range(0, count, step):
            yield slice(start, min(start + step, count))

    def _float64(self, size: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """Return the bound of float64, which is no number of ulps."""
        if self.cell.dtype != "float64":
            return None
        units = spec.Y_UNITS_FLOAT64 if self.made is None else spec.DX_UNITS_FLOAT64
        return units * 2.0**-53 * (1.0 + self.ratio) * size

    def judge(self, name: str, layout: str, result: Any) -> Row:
        """Return the errors of a result."""
        array, sums = result, 0.0
        if self.made is not None:
            array, dweight, dbias = result
            sums = self._sums(dweight, dbias)
        rows = np.moveaxis(np.asarray(array), 1, 0).reshape(self.drawn.x.shape)
        errors, shares = [], []
        for part, expected, unit, bound in self.parts:
            found = rows[:, part].astype(np.float64)
            with np.errstate(invalid="ignore"):
                off = exact.distance(found, expected)
            off[np.isnan(off)] = np.inf
            errors.append((off / unit).ravel())
            if bound is not None:
                shares.append(float((off / bound).max()))
        ulps = np.concatenate(errors)
        share = max(shares) if shares else float(ulps.max()) / self._bound(name)
        points = np.quantile(ulps, (0.5, 0.99, 0.999), method="higher")
        return Row(
            name, layout, self.cell, float(ulps.mean()), *map(float, points), float(ulps.max()),
            share, sums,
        )  # fmt: skip

    def _bound(self, name: str) -> float:
        """Return the contract's number of ulps."""
        if self.cell.dtype in FORMATS:
            return spec.ULPS_16BIT
        if self.made is not None:
            return spec.DX_ULPS_FLOAT32
        fused = name != "cython, no FMA"
        ulps = spec.Y_ULPS_FLOAT32 if fused else spec.Y_ULPS_FLOAT32_WITHOUT_FMA
        return ulps + spec.Y_ULPS_RESIDUAL * (self.cell.operation == "residual")

    def _sums(self, dweight: Any, dbias: Any) -> float:
        """Return the larger error of dweight and dbias; of float64, by 1 + |mean|/std."""
        assert self.made is not None
        worst, dtype = 0.0, "float64" if self.cell.dtype == "float64" else "float32"
        growth = 1.0 + (self.ratio[:, 0] if dtype == "float64" else 0.0)
        for found, expected, size in zip(
            (dbias, dweight), (self.made.dbias, self.made.dweight), self.magnitudes, strict=True
        ):
            pair = exact.paired(expected)
            off = exact.distance(np.asarray(found, np.float64).reshape(-1, 1), pair)[:, 0]
            worst = max(worst, float((off / (growth * ulp(size, dtype))).max()))
        return worst


def measure(cell: Cell, rng: np.random.Generator, names: tuple[str, ...]) -> Iterator[Row]:
    """Yield the errors of the subjects in a cell, one problem for all but the slow ones."""
    for slow in (False, True):
        takers = [
            (name, layout)
            for name in names
            for layout in LAYOUTS
            if SUBJECTS[name].slow() == slow
            and SUBJECTS[name].absent() is None
            and SUBJECTS[name].takes(cell.operation, cell.dtype, layout)
        ]
        if not takers or (slow and cell.count not in FEW_COUNTS):
            continue
        channels = (FEW_ELEMENTS if slow else ELEMENTS) // cell.count
        drawn = draw(rng, cell, min(max(channels, CHANNELS[0]), CHANNELS[1]))
        judge = Judge(drawn, cell)
        problems = {layout: handed_over(drawn, cell, layout) for _, layout in takers}
        for name, layout in takers:
            with np.errstate(all="ignore"):
                result = SUBJECTS[name].call(problems[layout])
            yield judge.judge(name, layout, result)


def circumstances(seed: int) -> dict[str, Any]:
    """Return what the figures depend on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    backends = bnfast.list_backends()
    return {
        "machine": f"{platform.machine()}, {platform.system()}",
        "instruction sets": {
            name: registry.load(name).instruction_set()
            for name, backend in backends.items()
            if backend.available
        },
        "versions": versions,
        "seed": seed,
    }


def main() -> None:
    """Measure, and save or show."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("saved", nargs="*", type=Path, help="files that --save has written")
    parser.add_argument("--save", type=Path, metavar="FILE.json", help="measure, and write this")
    parser.add_argument("--into", type=Path, metavar="DIRECTORY", help="write tables and plots")
    parser.add_argument("--quick", action="store_true", help="at most 10,000 per channel")
    parser.add_argument("--only", action="append", metavar="SUBJECT", choices=list(SUBJECTS))
    parser.add_argument("--operation", action="append", choices=OPERATIONS)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--count", action="append", type=int, choices=COUNTS)
    parser.add_argument("--seed", type=int, default=np.random.SeedSequence().entropy % 2**32)
    options = parser.parse_args()
    import accuracy_report

    if options.saved:
        found = accuracy_report.read(options.saved)
    else:
        names = tuple(options.only or SUBJECTS)
        rows = []
        counts = options.count or [n for n in COUNTS if n <= TYPICAL or not options.quick]
        for cell in cells(
            tuple(options.operation or OPERATIONS), tuple(options.dtype or DTYPES), tuple(counts)
        ):
            place = [OPERATIONS.index(cell.operation), DTYPES.index(cell.dtype)]
            rng = np.random.default_rng([options.seed, *place, cell.count, int(cell.ratio)])
            rows += measure(cell, rng, names)
            print(*cell, file=sys.stderr, flush=True)
        found = accuracy_report.Report(circumstances(options.seed), rows)
        if options.save:
            options.save.write_text(json.dumps(found.saved()), encoding="utf-8")
    if options.into:
        accuracy_report.write(found, options.into)
    elif not options.save:
        print(*accuracy_report.page(found, []), sep="\n")


if __name__ == "__main__":
    main()
