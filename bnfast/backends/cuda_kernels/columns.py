"""Kernels for channels-last arrays (M, C): a channel is a column.

A thread keeps to its columns: a vector of each wide row of a tile (`geometry.cut_columns`), so that
what it knows of them stays in registers. The blocks share the tiles evenly.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from bnfast.backends.cuda_kernels.arithmetic import (
    affine_fits,
    affine_of,
    gradient_on,
    line_fits,
    line_of,
    load,
    masked,
    moved,
    output,
    store,
    tail_of,
    wide_gradient,
    wide_output,
)
from bnfast.backends.cuda_kernels.driver import (
    MOST_THREADS,
    VECTOR,
    barrier,
    cuda,
    float64,
    int64,
)
from bnfast.backends.cuda_kernels.reductions import fold
from bnfast.backends.cuda_kernels.signatures import Elements, Kernel, Numbers

BATCH = 4
"""Vectors that a thread asks memory for at a time in a sum."""


def moments(real) -> Kernel:
    """Return the kernel that measures count, mean and m2 of each part, as `rows.moments` does."""

    def columns_moments(
        x: Elements, known: Numbers, rows: int, channels: int,
        folds: int, width: int, tiles: int, span: int, parts: int, aligned: bool,
    ) -> None:  # fmt: skip
        numbers = cuda.shared.array(VECTOR * MOST_THREADS, float64)
        values = cuda.local.array(VECTOR * BATCH, real)
        has = cuda.local.array(BATCH, int64)
        columns = cuda.local.array(VECTOR, int64)
        counts = cuda.local.array(VECTOR, int64)
        shifts = cuda.local.array(VECTOR, float64)
        guesses = cuda.local.array(VECTOR, float64)
        offs = cuda.local.array(VECTOR, float64)
        squares = cuda.local.array(VECTOR, float64)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        wide, elements, plane = folds * channels, rows * channels, parts * channels
        tile = cuda.blockIdx.x % tiles
        limit = min(width, wide - tile * width)
        at = VECTOR * thread
        for k in range(VECTOR):
            columns[k] = (tile * width + at + k) % channels
            shifts[k] = float64(x[columns[k]])
        for part in range(cuda.blockIdx.x // tiles, parts, cuda.gridDim.x // tiles):
            end = min((part + 1) * span * wide, elements)
            for k in range(VECTOR):
                counts[k], guesses[k], offs[k], squares[k] = 0, 0.0, 0.0, 0.0
            for row in range(part * span, (part + 1) * span, BATCH):
                for b in range(BATCH):
                    start = (row + b) * wide + tile * width
                    stop = min(start + limit, end)
                    has[b] = max(min(stop - start - at, VECTOR), 0)
                    if has[b] > 0:
                        load(x, start + at, stop, aligned, values, b * VECTOR)
                for k in range(VECTOR):
                    fresh = 0
                    guess = 0.0
                    for b in range(BATCH):
                        if k < has[b]:
                            fresh += 1
                            guess += float64(values[b * VECTOR + k]) - shifts[k]
                    if counts[k] == 0:
                        guesses[k] = guess / max(fresh, 1)
                    counts[k] += fresh
                    for b in range(BATCH):
                        if k < has[b]:
                            d = (float64(values[b * VECTOR + k]) - shifts[k]) - guesses[k]
                            offs[k] += d
                            squares[k] += d * d
            for k in range(VECTOR):
                low = offs[k] / max(counts[k], 1)
                squares[k] = max(squares[k] - offs[k] * low, 0.0)
                guesses[k] += low
                if at + k < limit:
                    numbers[at + k] = counts[k] * guesses[k]
            fold(numbers, folds, channels, thread, threads)
            n = min((part + 1) * span * folds, rows) - part * span * folds
            for k in range(VECTOR):
                if at + k < limit:
                    shifted = numbers[columns[k] - tile * width] / n
                    offs[k] = shifted
                    squares[k] += counts[k] * (guesses[k] - shifted) * (guesses[k] - shifted)
            barrier()
            for k in range(VECTOR):
                if at + k < limit:
                    numbers[at + k] = squares[k]
            fold(numbers, folds, channels, thread, threads)
            for k in range(VECTOR):
                if at + k < min(limit, channels):
                    known[part * channels + columns[k]] = n
                    known[plane + part * channels + columns[k]] = offs[k]
                    known[2 * plane + part * channels + columns[k]] = numbers[at + k]
            barrier()

    return columns_moments


def sums(real) -> Kernel:
    """Return the kernel that sums, over each part, g and g times the distance to the mean."""

    def columns_sums(
        dy: Elements, x: Elements, y: Elements, factors: Numbers, known: Numbers,
        rows: int, channels: int, folds: int, width: int, tiles: int, span: int, parts: int,
        relu: bool, aligned: bool,
    ) -> None:  # fmt: skip
        numbers = cuda.shared.array(VECTOR * MOST_THREADS, float64)
        dys = cuda.local.array(VECTOR, real)
        xs = cuda.local.array(VECTOR, real)
        ys = cuda.local.array(VECTOR, real)
        columns = cuda.local.array(VECTOR, int64)
        means = cuda.local.array(VECTOR, float64)
        gs = cuda.local.array(VECTOR, float64)
        offs = cuda.local.array(VECTOR, float64)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        wide, elements, plane = folds * channels, rows * channels, parts * channels
        tile = cuda.blockIdx.x % tiles
        limit = min(width, wide - tile * width)
        at = VECTOR * thread
        for k in range(VECTOR):
            columns[k] = (tile * width + at + k) % channels
            means[k] = factors[columns[k]]
        for part in range(cuda.blockIdx.x // tiles, parts, cuda.gridDim.x // tiles):
            end = min((part + 1) * span * wide, elements)
            for k in range(VECTOR):
                gs[k], offs[k] = 0.0, 0.0
            for row in range(part * span, (part + 1) * span):
                start = row * wide + tile * width
                stop = min(start + limit, end)
                if start + at < stop:
                    load(dy, start + at, stop, aligned, dys, 0)
                    load(x, start + at, stop, aligned, xs, 0)
                    if relu:
                        load(y, start + at, stop, aligned, ys, 0)
                    for k in range(VECTOR):
                        if start + at + k < stop:
                            g = float64(masked(dys[k], ys[k], relu))
                            gs[k] += g
                            offs[k] += g * (float64(xs[k]) - means[k])
            for which in range(2):
                for k in range(VECTOR):
                    if at + k < limit:
                        numbers[at + k] = gs[k] if which == 0 else offs[k]
                fold(numbers, folds, channels, thread, threads)
                for k in range(VECTOR):
                    if at + k < min(limit, channels):
                        known[which * plane + part * channels + columns[k]] = numbers[at + k]
                barrier()

    return columns_sums


def normalize(real) -> Kernel:
    """Return the kernel of ``normalize``, and of the second half of ``train``."""
    exact = real is float64

    def columns_normalize(
        x: Elements, residual: Elements, y: Elements, moments: Numbers, affine: Numbers,
        eps: float, divisor: float, rows: int, channels: int,
        folds: int, width: int, tiles: int, span: int, parts: int,
        add: bool, relu: bool, aligned: bool, reverse: bool,
    ) -> None:  # fmt: skip
        xs = cuda.local.array(VECTOR, real)
        added = cuda.local.array(VECTOR, real)
        columns = cuda.local.array(VECTOR, int64)
        heads = cuda.local.array(VECTOR, real)
        scales = cuda.local.array(VECTOR, real)
        shifts = cuda.local.array(VECTOR, real)
        fitting = cuda.local.array(VECTOR, int64)
        wide, elements = folds * channels, rows * channels
        tile = cuda.blockIdx.x % tiles
        limit = min(width, wide - tile * width)
        at = VECTOR * cuda.threadIdx.x
        for k in range(VECTOR):
            columns[k] = (tile * width + at + k) % channels
            mean, scale, bias = affine_of(moments, affine, divisor, eps, channels, columns[k])
            heads[k] = mean
            scales[k] = scale
            shifts[k] = moved(bias, tail_of(mean, heads[k]), scale)
            fitting[k] = affine_fits(mean, scale, bias)
        for step in range(cuda.blockIdx.x // tiles, parts, cuda.gridDim.x // tiles):
            part = parts - 1 - step if reverse else step
            end = min((part + 1) * span * wide, elements)
            for row in range(part * span, (part + 1) * span):
                start = row * wide + tile * width
                stop = min(start + limit, end)
                if start + at < stop:
                    load(x, start + at, stop, aligned, xs, 0)
                    if add:
                        load(residual, start + at, stop, aligned, added, 0)
                    for k in range(VECTOR):
                        if exact or fitting[k] != 0:
                            xs[k] = output(
                                xs[k], added[k], heads[k], scales[k], shifts[k], add, relu
                            )
                        else:
                            mean, scale, bias = affine_of(
                                moments, affine, divisor, eps, channels, columns[k]
                            )
                            xs[k] = wide_output(xs[k], added[k], mean, scale, bias, add, relu)
                    store(y, start + at, stop, aligned, xs, 0)

    return columns_normalize


def gradient(real) -> Kernel:
    """Return the kernel of ``backward_input``, and of the second half of ``backward``."""
    exact = real is float64

    def columns_gradient(
        dy: Elements, x: Elements, y: Elements, dx: Elements, dresidual: Elements,
        factors: Numbers, sums: Numbers, count: float, rows: int, channels: int,
        folds: int, width: int, tiles: int, span: int, parts: int,
        relu: bool, passes: bool, aligned: bool, reverse: bool,
    ) -> None:  # fmt: skip
        dys = cuda.local.array(VECTOR, real)
        xs = cuda.local.array(VECTOR, real)
        ys = cuda.local.array(VECTOR, real)
        columns = cuda.local.array(VECTOR, int64)
        heads = cuda.local.array(VECTOR, real)
        scales = cuda.local.array(VECTOR, real)
        slopes = cuda.local.array(VECTOR, real)
        shifts = cuda.local.array(VECTOR, real)
        fitting = cuda.local.array(VECTOR, int64)
        wide, elements = folds * channels, rows * channels
        tile = cuda.blockIdx.x % tiles
        limit = min(width, wide - tile * width)
        at = VECTOR * cuda.threadIdx.x
        for k in range(VECTOR):
            columns[k] = (tile * width + at + k) % channels
            mean, scale, slope, offset = line_of(factors, sums, count, channels, columns[k])
            heads[k] = mean
            scales[k] = scale
            slopes[k] = slope
            shifts[k] = moved(offset, tail_of(mean, heads[k]), slope)
            fitting[k] = line_fits(mean, scale, slope, offset)
        for step in range(cuda.blockIdx.x // tiles, parts, cuda.gridDim.x // tiles):
            part = parts - 1 - step if reverse else step
            end = min((part + 1) * span * wide, elements)
            for row in range(part * span, (part + 1) * span):
                start = row * wide + tile * width
                stop = min(start + limit, end)
                if start + at < stop:
                    load(dy, start + at, stop, aligned, dys, 0)
                    load(x, start + at, stop, aligned, xs, 0)
                    if relu:
                        load(y, start + at, stop, aligned, ys, 0)
                    for k in range(VECTOR):
                        dys[k] = masked(dys[k], ys[k], relu)
                    if passes:
                        store(dresidual, start + at, stop, aligned, dys, 0)
                    for k in range(VECTOR):
                        if exact or fitting[k] != 0:
                            dys[k] = gradient_on(
                                dys[k], xs[k], heads[k], slopes[k], scales[k], shifts[k]
                            )
                        else:
                            mean, scale, slope, offset = line_of(
                                factors, sums, count, channels, columns[k]
                            )
                            dys[k] = wide_gradient(dys[k], xs[k], mean, slope, scale, offset)
                    store(dx, start + at, stop, aligned, dys, 0)

    return columns_gradient
