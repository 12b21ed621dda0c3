"""Kernels for channels-last arrays (M, C): a channel is a column.

A thread keeps to its columns: a vector of each wide row of a tile (`geometry.plan`), so that what
it knows of them stays in registers. The blocks share the tiles evenly.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from bnfast.backends.cuda_kernels.arithmetic import (
    affine_fits,
    affine_of,
    gradient_of,
    gradient_on,
    line_fits,
    line_of,
    load,
    masked,
    moved,
    output,
    output_of,
    remainder,
    store,
    tail_of,
)
from bnfast.backends.cuda_kernels.batches import BATCH, BATCHED
from bnfast.backends.cuda_kernels.driver import (
    MOST_THREADS,
    VECTOR,
    barrier,
    cuda,
    device,
    divide,
    float64,
    int64,
)
from bnfast.backends.cuda_kernels.reductions import fold
from bnfast.backends.cuda_kernels.signatures import Elements, Kernel, Numbers

NUMBERS = VECTOR * MOST_THREADS
"""One number for each element that the threads of a block own."""


@device
def rows_of(first, stop, wide):
    """Return how many of the elements ``first``, ``first + wide``, ... are before ``stop``."""
    return divide(stop - first - 1, wide) + 1 if first < stop else 0


@device
def fold_columns(values, numbers, at, limit, folds, channels, thread, threads):
    """Add up what the threads have of each column; leave the sums of a thread's own in ``values``.

    Every thread of the block has to call it.
    """
    for k in range(VECTOR):
        if at + k < limit:
            numbers[at + k] = values[k]
    fold(numbers, folds, channels, thread, threads)
    for k in range(VECTOR):
        if at + k < limit:
            values[k] = numbers[remainder(at + k, channels)]
    barrier()


def moments(real) -> Kernel:
    """Return the kernel that measures each part, as `rows.moments` does."""

    def columns_moments(
        x: Elements, known: Numbers, rows: int, channels: int,
        folds: int, width: int, tiles: int, span: int, parts: int, aligned: bool,
    ) -> None:  # fmt: skip
        numbers = cuda.shared.array(NUMBERS, float64)
        values = cuda.local.array(BATCHED, real)
        has = cuda.local.array(BATCH, int64)
        guesses = cuda.local.array(VECTOR, float64)
        means = cuda.local.array(VECTOR, float64)
        offs = cuda.local.array(VECTOR, float64)
        squares = cuda.local.array(VECTOR, float64)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        wide, elements, plane = folds * channels, rows * channels, parts * channels
        block = divide(cuda.blockIdx.x, tiles)
        tile = cuda.blockIdx.x - block * tiles
        at, limit = VECTOR * thread, min(width, wide - tile * width)
        for part in range(block, parts, divide(cuda.gridDim.x, tiles)):
            begin = part * span * wide + tile * width
            end = min((part + 1) * span * wide, elements)
            for k in range(VECTOR):
                guesses[k], means[k], offs[k], squares[k] = 0.0, 0.0, 0.0, 0.0
            for start in range(begin, end, BATCH * wide):
                fresh = 0
                for b in range(BATCH):
                    i = start + b * wide + at
                    stop = min(start + b * wide + limit, end)
                    has[b] = max(min(stop - i, VECTOR), 0)
                    fresh += has[b]
                    if has[b] > 0:
                        load(x, i, stop, aligned, values, b * VECTOR)
                if start == begin:
                    for k in range(VECTOR):
                        for b in range(BATCH):
                            if k < has[b]:
                                guesses[k] += float64(values[b * VECTOR + k])
                        guesses[k] /= max(min(rows_of(begin + at + k, end, wide), BATCH), 1)
                for k in range(VECTOR):
                    for b in range(BATCH):
                        if fresh == BATCHED or k < has[b]:
                            d = float64(values[b * VECTOR + k]) - guesses[k]
                            offs[k] += d
                            squares[k] += d * d
            for k in range(VECTOR):
                count = rows_of(begin + at + k, end, wide)
                offs[k] /= max(count, 1)
                squares[k] = max(squares[k] - count * offs[k] * offs[k], 0.0)
                means[k] = count * (guesses[k] + offs[k])
            fold_columns(means, numbers, at, limit, folds, channels, thread, threads)
            n = min((part + 1) * span * folds, rows) - part * span * folds
            for k in range(VECTOR):
                count = rows_of(begin + at + k, end, wide)
                means[k] /= n
                off = (guesses[k] - means[k]) + offs[k]
                offs[k] = count * off if count > 0 else 0.0
                squares[k] += count * off * off if count > 0 else 0.0
            fold_columns(offs, numbers, at, limit, folds, channels, thread, threads)
            fold_columns(squares, numbers, at, limit, folds, channels, thread, threads)
            for k in range(VECTOR):
                if at + k < min(limit, channels):
                    c = tile * width + at + k
                    low = offs[k] / n
                    if parts == 1:
                        known[c] = means[k] + low
                        known[channels + c] = squares[k] - offs[k] * low
                    else:
                        known[part * channels + c] = n
                        known[plane + part * channels + c] = means[k]
                        known[2 * plane + part * channels + c] = low
                        known[3 * plane + part * channels + c] = squares[k] - offs[k] * low

    return columns_moments


def sums(real) -> Kernel:
    """Return the kernel that sums, over each part, g and g times the distance to the mean."""

    def columns_sums(
        dy: Elements, x: Elements, y: Elements, factors: Numbers, known: Numbers,
        rows: int, channels: int, folds: int, width: int, tiles: int, span: int, parts: int,
        relu: bool, aligned: bool,
    ) -> None:  # fmt: skip
        numbers = cuda.shared.array(NUMBERS, float64)
        dys = cuda.local.array(VECTOR, real)
        xs = cuda.local.array(VECTOR, real)
        ys = cuda.local.array(VECTOR, real)
        means = cuda.local.array(VECTOR, float64)
        gs = cuda.local.array(VECTOR, float64)
        offs = cuda.local.array(VECTOR, float64)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        wide, elements, plane = folds * channels, rows * channels, parts * channels
        block = divide(cuda.blockIdx.x, tiles)
        tile = cuda.blockIdx.x - block * tiles
        at, limit = VECTOR * thread, min(width, wide - tile * width)
        for k in range(VECTOR):
            means[k] = factors[remainder(tile * width + at + k, channels)]
        for part in range(block, parts, divide(cuda.gridDim.x, tiles)):
            begin = part * span * wide + tile * width
            end = min((part + 1) * span * wide, elements)
            for k in range(VECTOR):
                gs[k], offs[k] = 0.0, 0.0
            for start in range(begin, end, wide):
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
            fold_columns(gs, numbers, at, limit, folds, channels, thread, threads)
            fold_columns(offs, numbers, at, limit, folds, channels, thread, threads)
            for k in range(VECTOR):
                if at + k < min(limit, channels):
                    c = tile * width + at + k
                    invstd = factors[channels + c] if parts == 1 else 1.0
                    known[part * channels + c] = gs[k]
                    known[plane + part * channels + c] = offs[k] * invstd

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
        heads = cuda.local.array(VECTOR, real)
        scales = cuda.local.array(VECTOR, real)
        shifts = cuda.local.array(VECTOR, real)
        wide, elements = folds * channels, rows * channels
        block = divide(cuda.blockIdx.x, tiles)
        tile = cuda.blockIdx.x - block * tiles
        at, limit = VECTOR * cuda.threadIdx.x, min(width, wide - tile * width)
        fit = True
        for k in range(VECTOR):
            c = remainder(tile * width + at + k, channels)
            mean, scale, bias = affine_of(moments, affine, divisor, eps, channels, c)
            heads[k] = mean
            scales[k] = scale
            shifts[k] = moved(bias, tail_of(mean, heads[k]), scale)
            fit = fit and (exact or affine_fits(mean, scale, bias))
        for step in range(block, parts, divide(cuda.gridDim.x, tiles)):
            part = parts - 1 - step if reverse else step
            begin = part * span * wide + tile * width
            end = min((part + 1) * span * wide, elements)
            for start in range(begin, end, wide):
                stop = min(start + limit, end)
                if fit and start + at < stop:
                    load(x, start + at, stop, aligned, xs, 0)
                    if add:
                        load(residual, start + at, stop, aligned, added, 0)
                    for k in range(VECTOR):
                        xs[k] = output(xs[k], added[k], heads[k], scales[k], shifts[k], add, relu)
                    store(y, start + at, stop, aligned, xs, 0)
                else:
                    for j in range(start + at, min(start + at + VECTOR, stop)):
                        other = residual[j] if add else x[j]
                        c = remainder(j, channels)
                        y[j] = output_of(
                            x[j], other, moments, affine, divisor, eps, channels, c, add, relu
                        )

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
        gs = cuda.local.array(VECTOR, real)
        xs = cuda.local.array(VECTOR, real)
        ys = cuda.local.array(VECTOR, real)
        heads = cuda.local.array(VECTOR, real)
        scales = cuda.local.array(VECTOR, real)
        slopes = cuda.local.array(VECTOR, real)
        shifts = cuda.local.array(VECTOR, real)
        wide, elements = folds * channels, rows * channels
        block = divide(cuda.blockIdx.x, tiles)
        tile = cuda.blockIdx.x - block * tiles
        at, limit = VECTOR * cuda.threadIdx.x, min(width, wide - tile * width)
        fit = True
        for k in range(VECTOR):
            c = remainder(tile * width + at + k, channels)
            mean, scale, slope, offset = line_of(factors, sums, count, channels, c)
            heads[k] = mean
            scales[k] = scale
            slopes[k] = slope
            shifts[k] = moved(offset, tail_of(mean, heads[k]), slope)
            fit = fit and (exact or line_fits(mean, scale, slope, offset))
        for step in range(block, parts, divide(cuda.gridDim.x, tiles)):
            part = parts - 1 - step if reverse else step
            begin = part * span * wide + tile * width
            end = min((part + 1) * span * wide, elements)
            for start in range(begin, end, wide):
                stop = min(start + limit, end)
                if fit and start + at < stop:
                    load(dy, start + at, stop, aligned, gs, 0)
                    load(x, start + at, stop, aligned, xs, 0)
                    if relu:
                        load(y, start + at, stop, aligned, ys, 0)
                    for k in range(VECTOR):
                        gs[k] = masked(gs[k], ys[k], relu)
                        xs[k] = gradient_on(
                            gs[k], xs[k], heads[k], slopes[k], scales[k], shifts[k]
                        )
                    if passes:
                        store(dresidual, start + at, stop, aligned, gs, 0)
                    store(dx, start + at, stop, aligned, xs, 0)
                else:
                    for j in range(start + at, min(start + at + VECTOR, stop)):
                        c = remainder(j, channels)
                        g = masked(dy[j], y[j] if relu else dy[j], relu)
                        if passes:
                            dresidual[j] = g
                        dx[j] = gradient_of(g, x[j], factors, sums, count, channels, c)

    return columns_gradient
