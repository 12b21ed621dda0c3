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
from bnfast.backends.cuda_kernels.batches import BATCH, BATCHED, PAIR, PAIRED
from bnfast.backends.cuda_kernels.driver import (
    MOST_THREADS,
    VECTOR,
    barrier,
    cuda,
    device,
    divide,
    float64,
    int32,
)
from bnfast.backends.cuda_kernels.elements import get, put
from bnfast.backends.cuda_kernels.reductions import fold
from bnfast.backends.cuda_kernels.signatures import Elements, Kernel, Numbers

NUMBERS = VECTOR * MOST_THREADS
"""One number for each element that the threads of a block own."""


@device
def own_columns(own, at, channels):
    """Note which columns of a tile the elements from ``at`` on belong to, folded."""
    column = remainder(at, channels)
    for k in range(VECTOR):
        own[k] = column
        column = column + 1 if column + 1 < channels else 0


@device
def fold_columns(values, numbers, own, at, limit, folds, channels, thread, threads):
    """Add up what the threads have of each column; leave the sums of a thread's own in ``values``.

    Every thread of the block has to call it.
    """
    for k in range(VECTOR):
        if at + k < limit:
            numbers[at + k] = values[k]
    fold(numbers, folds, channels, thread, threads)
    for k in range(VECTOR):
        values[k] = numbers[own[k]]
    barrier()


def moments(real) -> Kernel:
    """Return the kernel that measures each part, as `rows.moments` does.

    A thread sums deviations from its first element of each column.
    """

    def columns_moments(
        x: Elements, known: Numbers, rows: int, channels: int,
        folds: int, width: int, tiles: int, span: int, parts: int, aligned: bool,
    ) -> None:  # fmt: skip
        numbers = cuda.shared.array(NUMBERS, float64)
        values = cuda.local.array(BATCHED, real)
        has = cuda.local.array(BATCH, int32)
        own = cuda.local.array(VECTOR, int32)
        guesses = cuda.local.array(VECTOR, float64)
        means = cuda.local.array(VECTOR, float64)
        offs = cuda.local.array(VECTOR, float64)
        squares = cuda.local.array(VECTOR, float64)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        wide, elements, plane = folds * channels, rows * channels, parts * channels
        block = divide(cuda.blockIdx.x, tiles)
        tile = cuda.blockIdx.x - block * tiles
        at, limit = VECTOR * thread, min(width, wide - tile * width)
        own_columns(own, at, channels)
        part = block
        while part < parts:
            begin = part * span * wide + tile * width
            end = min((part + 1) * span * wide, elements)
            for k in range(VECTOR):
                offs[k], squares[k] = 0.0, 0.0
                inside = at + k < limit and begin + at + k < end
                guesses[k] = float64(get(x, begin + at + k)) if inside else 0.0
            start = begin
            while start < end:
                for b in range(BATCH):
                    i = start + b * wide + at
                    stop = min(start + b * wide + limit, end)
                    has[b] = max(min(stop - i, VECTOR), 0)
                    if has[b] > 0:
                        load(x, i, stop, aligned, values, b * VECTOR)
                for j in range(BATCHED):
                    if j % VECTOR < has[j // VECTOR]:
                        d = float64(values[j]) - guesses[j % VECTOR]
                        offs[j % VECTOR] += d
                        squares[j % VECTOR] += d * d
                start += BATCH * wide
            full = divide(end - part * span * wide, wide)
            for k in range(VECTOR):
                count = full + (begin + full * wide + at + k < end)
                count = count if at + k < limit else 0
                offs[k] /= max(count, 1)
                squares[k] = max(squares[k] - count * offs[k] * offs[k], 0.0)
                means[k] = count * (guesses[k] + offs[k])
            fold_columns(means, numbers, own, at, limit, folds, channels, thread, threads)
            n = min((part + 1) * span * folds, rows) - part * span * folds
            for k in range(VECTOR):
                count = full + (begin + full * wide + at + k < end)
                means[k] /= n
                off = (guesses[k] - means[k]) + offs[k]
                offs[k] = count * off if count > 0 else 0.0
                squares[k] += count * off * off if count > 0 else 0.0
            fold_columns(offs, numbers, own, at, limit, folds, channels, thread, threads)
            fold_columns(squares, numbers, own, at, limit, folds, channels, thread, threads)
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
            part += divide(cuda.gridDim.x, tiles)

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
        own = cuda.local.array(VECTOR, int32)
        means = cuda.local.array(VECTOR, float64)
        gs = cuda.local.array(VECTOR, float64)
        offs = cuda.local.array(VECTOR, float64)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        wide, elements, plane = folds * channels, rows * channels, parts * channels
        block = divide(cuda.blockIdx.x, tiles)
        tile = cuda.blockIdx.x - block * tiles
        at, limit = VECTOR * thread, min(width, wide - tile * width)
        own_columns(own, at, channels)
        for k in range(VECTOR):
            means[k] = factors[tile * width + own[k]] if at + k < limit else 0.0
        part = block
        while part < parts:
            begin = part * span * wide + tile * width
            end = min((part + 1) * span * wide, elements)
            for k in range(VECTOR):
                gs[k], offs[k] = 0.0, 0.0
            start = begin
            while start < end:
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
                start += wide
            fold_columns(gs, numbers, own, at, limit, folds, channels, thread, threads)
            fold_columns(offs, numbers, own, at, limit, folds, channels, thread, threads)
            for k in range(VECTOR):
                if at + k < min(limit, channels):
                    c = tile * width + at + k
                    invstd = factors[channels + c] if parts == 1 else 1.0
                    known[part * channels + c] = gs[k]
                    known[plane + part * channels + c] = offs[k] * invstd
            part += divide(cuda.gridDim.x, tiles)

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
        xs = cuda.local.array(PAIRED, real)
        added = cuda.local.array(PAIRED, real)
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
        step = block
        while step < parts:
            part = parts - 1 - step if reverse else step
            begin = part * span * wide + tile * width
            end = min((part + 1) * span * wide, elements)
            start = begin
            while fit and start < end:
                for b in range(PAIR):
                    i, stop = start + b * wide, min(start + b * wide + limit, end)
                    load(x, i + at, stop, aligned, xs, b * VECTOR)
                    if add:
                        load(residual, i + at, stop, aligned, added, b * VECTOR)
                for j in range(PAIRED):
                    k = j % VECTOR
                    xs[j] = output(xs[j], added[j], heads[k], scales[k], shifts[k], add, relu)
                for b in range(PAIR):
                    i, stop = start + b * wide, min(start + b * wide + limit, end)
                    store(y, i + at, stop, aligned, xs, b * VECTOR)
                start += PAIR * wide
            while not fit and start < end:
                j, stop = start + at, min(start + at + VECTOR, start + limit, end)
                while j < stop:
                    c = remainder(j, channels)
                    other = get(residual, j) if add else get(x, j)
                    value = output_of(
                        get(x, j), other, moments, affine, divisor, eps, channels, c, add, relu
                    )
                    put(y, j, value)
                    j += 1
                start += wide
            step += divide(cuda.gridDim.x, tiles)

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
        step = block
        while step < parts:
            part = parts - 1 - step if reverse else step
            begin = part * span * wide + tile * width
            end = min((part + 1) * span * wide, elements)
            start = begin
            while fit and start < end:
                i, stop = start + at, min(start + limit, end)
                load(dy, i, stop, aligned, gs, 0)
                load(x, i, stop, aligned, xs, 0)
                if relu:
                    load(y, i, stop, aligned, ys, 0)
                for k in range(VECTOR):
                    gs[k] = masked(gs[k], ys[k], relu)
                    xs[k] = gradient_on(gs[k], xs[k], heads[k], slopes[k], scales[k], shifts[k])
                if passes:
                    store(dresidual, i, stop, aligned, gs, 0)
                store(dx, i, stop, aligned, xs, 0)
                start += wide
            while not fit and start < end:
                j, stop = start + at, min(start + at + VECTOR, start + limit, end)
                while j < stop:
                    c = remainder(j, channels)
                    g = get(dy, j)
                    g = masked(g, get(y, j) if relu else g, relu)
                    if passes:
                        put(dresidual, j, g)
                    dx_j = gradient_of(g, get(x, j), factors, sums, count, channels, c)
                    put(dx, j, dx_j)
                    j += 1
                start += wide
            step += divide(cuda.gridDim.x, tiles)

    return columns_gradient
