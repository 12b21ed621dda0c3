"""Kernels for channels-first arrays (N, C, S): a channel is N runs of S adjacent elements.

Elementwise kernels walk the whole array, a chunk at a time, and keep what the runs in a chunk are
transformed by in shared memory::

    array       aaaaaaabbbbbbbcccccccaaaaaaabbbbbbbccccccc
    chunk                |<----------->|
    table                 b c a

Sums take one part of a channel at a time (`geometry.plan`). A run may begin anywhere, so the
vectors at its ends reach beyond it; what is not of the run does not count.
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
    quotient,
    remainder,
    run_of,
    store,
    tail_of,
)
from bnfast.backends.cuda_kernels.batches import (
    BATCH,
    BATCHED,
    PAIR,
    PAIRED,
    deviations,
    mean_of,
)
from bnfast.backends.cuda_kernels.driver import (
    VECTOR,
    barrier,
    cuda,
    device,
    divide,
    float32,
    float64,
    int32,
)
from bnfast.backends.cuda_kernels.elements import get, put
from bnfast.backends.cuda_kernels.geometry import TABLE
from bnfast.backends.cuda_kernels.reductions import NUMBERS, total, totals
from bnfast.backends.cuda_kernels.signatures import Elements, Kernel, Numbers

AFFINE_TABLE, LINE_TABLE = 4 * TABLE, 5 * TABLE
"""What is known of each run: head, scale, shift, or head, scale, slope, shift; and if they fit."""


@device
def place_of(task, pieces, channels):
    """Return q, piece and channel of a part: parts are numbered in the order of memory."""
    rest = divide(task, pieces)
    q = divide(rest, channels)
    return q, task - rest * pieces, rest - q * channels


def moments(real) -> Kernel:
    """Return the kernel that measures each part: count, a first mean, what it is off by, and m2.

    A thread sums deviations from the mean of its first batch, and their squares. The block then
    takes a first mean of all, and sums the threads' distances to it: small numbers, so that no
    digit is lost to a large mean, or to an outlier that was met first.
    """

    def rows_moments(
        x: Elements, known: Numbers, samples: int, channels: int, size: int,
        runs: int, length: int, pieces: int, parts: int, groups: int, aligned: bool,
    ) -> None:  # fmt: skip
        numbers = cuda.shared.array(NUMBERS, float64)
        values = cuda.local.array(BATCHED, real)
        lows = cuda.local.array(BATCH, int32)
        highs = cuda.local.array(BATCH, int32)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        plane, elements = parts * channels, samples * channels * size
        inverse = float32(1.0 / groups)
        task = cuda.blockIdx.x
        while task < plane:
            q, piece, c = place_of(task, pieces, channels)
            first_run = q * runs
            some = min(runs, samples - first_run)
            begin, end = piece * length, min(piece * length + length, size)
            count, guess, off, squares = 0, 0.0, 0.0, 0.0
            first = thread
            while first < some * groups:
                fresh = 0
                for b in range(BATCH):
                    slot = first + b * threads
                    lows[b], highs[b] = 0, 0
                    if slot < some * groups:
                        run = quotient(slot, inverse)
                        start = ((first_run + run) * channels + c) * size
                        i = (divide(start + begin, VECTOR) + slot - run * groups) * VECTOR
                        lows[b] = max(start + begin - i, 0)
                        highs[b] = max(min(start + end - i, VECTOR), lows[b])
                        load(x, i, elements, aligned, values, b * VECTOR)
                        fresh += highs[b] - lows[b]
                if count == 0:
                    guess = mean_of(values, lows, highs, fresh)
                count += fresh
                off, squares = deviations(values, lows, highs, fresh, guess, off, squares)
                first += threads * BATCH
            low = off / max(count, 1)
            n = some * (end - begin)
            mean = total(count * (guess + low), numbers, thread, threads) / n
            off = (guess - mean) + low if count > 0 else 0.0
            squares = max(squares - count * low * low, 0.0) + count * off * off
            off, squares = totals(count * off, squares, numbers, thread, threads)
            if thread == 0 and parts == 1:
                known[c] = mean + off / n
                known[channels + c] = squares - off * (off / n)
            elif thread == 0:
                at = c * parts + q * pieces + piece
                known[at] = n
                known[plane + at] = mean
                known[2 * plane + at] = off / n
                known[3 * plane + at] = squares - off * (off / n)
            task += cuda.gridDim.x

    return rows_moments


def sums(real) -> Kernel:
    """Return the kernel that sums, over each part, g and g times the distance to the mean."""

    def rows_sums(
        dy: Elements, x: Elements, y: Elements, factors: Numbers, known: Numbers,
        samples: int, channels: int, size: int, runs: int, length: int, pieces: int, parts: int,
        groups: int, relu: bool, aligned: bool,
    ) -> None:  # fmt: skip
        numbers = cuda.shared.array(NUMBERS, float64)
        dys = cuda.local.array(VECTOR, real)
        xs = cuda.local.array(VECTOR, real)
        ys = cuda.local.array(VECTOR, real)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        plane, elements = parts * channels, samples * channels * size
        inverse = float32(1.0 / groups)
        task = cuda.blockIdx.x
        while task < plane:
            q, piece, c = place_of(task, pieces, channels)
            first_run = q * runs
            some = min(runs, samples - first_run)
            begin, end = piece * length, min(piece * length + length, size)
            mean, sum_g, sum_off = factors[c], 0.0, 0.0
            slot = thread
            while slot < some * groups:
                run = quotient(slot, inverse)
                start = ((first_run + run) * channels + c) * size
                i = (divide(start + begin, VECTOR) + slot - run * groups) * VECTOR
                load(dy, i, elements, aligned, dys, 0)
                load(x, i, elements, aligned, xs, 0)
                if relu:
                    load(y, i, elements, aligned, ys, 0)
                for k in range(VECTOR):
                    if start + begin <= i + k < start + end:
                        g = float64(masked(dys[k], ys[k], relu))
                        sum_g += g
                        sum_off += g * (float64(xs[k]) - mean)
                slot += threads
            sum_g, sum_off = totals(sum_g, sum_off, numbers, thread, threads)
            if thread == 0:
                at = c * parts + q * pieces + piece
                known[at] = sum_g
                known[plane + at] = sum_off * factors[channels + c] if parts == 1 else sum_off
            task += cuda.gridDim.x

    return rows_sums


def normalize(real) -> Kernel:
    """Return the kernel of ``normalize``, and of the second half of ``train``."""
    exact = real is float64

    def rows_normalize(
        x: Elements, residual: Elements, y: Elements, moments: Numbers, affine: Numbers,
        eps: float, divisor: float, elements: int, channels: int, size: int, chunk: int,
        add: bool, relu: bool, aligned: bool, reverse: bool,
    ) -> None:  # fmt: skip
        table = cuda.shared.array(AFFINE_TABLE, real)
        xs = cuda.local.array(PAIRED, real)
        added = cuda.local.array(PAIRED, real)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        chunks = divide(elements + chunk - 1, chunk)
        inverse = float32(1.0 / size)
        step = cuda.blockIdx.x
        while step < chunks:
            at = (chunks - 1 - step if reverse else step) * chunk
            end = min(at + chunk, elements)
            first = divide(at, size)
            left = (first + 1) * size - at
            run = thread
            while run < run_of(end - 1 - at, left, inverse) + 1:
                c = remainder(first + run, channels)
                mean, scale, bias = affine_of(moments, affine, divisor, eps, channels, c)
                table[run] = mean
                table[TABLE + run] = scale
                table[2 * TABLE + run] = moved(bias, tail_of(mean, table[run]), scale)
                table[3 * TABLE + run] = affine_fits(mean, scale, bias)
                run += threads
            barrier()
            i = at + VECTOR * thread
            while i < end:
                for b in range(PAIR):
                    load(x, i + b * VECTOR * threads, end, aligned, xs, b * VECTOR)
                    if add:
                        load(residual, i + b * VECTOR * threads, end, aligned, added, b * VECTOR)
                misfit = 0
                for j in range(PAIRED):
                    here = i + j // VECTOR * VECTOR * threads + j % VECTOR - at
                    run = min(run_of(here, left, inverse), TABLE - 1)
                    xs[j] = output(
                        xs[j], added[j], table[run], table[TABLE + run], table[2 * TABLE + run],
                        add, relu,
                    )  # fmt: skip
                    if not exact and table[3 * TABLE + run] == 0:
                        misfit |= 1 << j // VECTOR
                for b in range(PAIR):
                    if misfit & 1 << b == 0:
                        store(y, i + b * VECTOR * threads, end, aligned, xs, b * VECTOR)
                b = 0
                while misfit != 0 and b < PAIR:
                    j = i + b * VECTOR * threads
                    stop = min(j + VECTOR, end) if misfit & 1 << b else j
                    while j < stop:
                        c = remainder(divide(j, size), channels)
                        other = get(residual, j) if add else get(x, j)
                        value = output_of(
                            get(x, j), other, moments, affine, divisor, eps, channels, c, add, relu
                        )
                        put(y, j, value)
                        j += 1
                    b += 1
                i += PAIR * VECTOR * threads
            barrier()
            step += cuda.gridDim.x

    return rows_normalize


def gradient(real) -> Kernel:
    """Return the kernel of ``backward_input``, and of the second half of ``backward``."""
    exact = real is float64

    def rows_gradient(
        dy: Elements, x: Elements, y: Elements, dx: Elements, dresidual: Elements,
        factors: Numbers, sums: Numbers, count: float,
        elements: int, channels: int, size: int, chunk: int,
        relu: bool, passes: bool, aligned: bool, reverse: bool,
    ) -> None:  # fmt: skip
        table = cuda.shared.array(LINE_TABLE, real)
        gs = cuda.local.array(VECTOR, real)
        xs = cuda.local.array(VECTOR, real)
        ys = cuda.local.array(VECTOR, real)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        chunks = divide(elements + chunk - 1, chunk)
        inverse = float32(1.0 / size)
        step = cuda.blockIdx.x
        while step < chunks:
            at = (chunks - 1 - step if reverse else step) * chunk
            end = min(at + chunk, elements)
            first = divide(at, size)
            left = (first + 1) * size - at
            run = thread
            while run < run_of(end - 1 - at, left, inverse) + 1:
                c = remainder(first + run, channels)
                mean, scale, slope, offset = line_of(factors, sums, count, channels, c)
                table[run] = mean
                table[TABLE + run] = scale
                table[2 * TABLE + run] = slope
                table[3 * TABLE + run] = moved(offset, tail_of(mean, table[run]), slope)
                table[4 * TABLE + run] = line_fits(mean, scale, slope, offset)
                run += threads
            barrier()
            i = at + VECTOR * thread
            while i < end:
                load(dy, i, end, aligned, gs, 0)
                load(x, i, end, aligned, xs, 0)
                if relu:
                    load(y, i, end, aligned, ys, 0)
                fit = True
                for k in range(VECTOR):
                    run = run_of(i + k - at, left, inverse)
                    fit = fit and (exact or table[4 * TABLE + run] != 0)
                    gs[k] = masked(gs[k], ys[k], relu)
                    xs[k] = gradient_on(
                        gs[k], xs[k], table[run], table[2 * TABLE + run], table[TABLE + run],
                        table[3 * TABLE + run],
                    )  # fmt: skip
                if passes:
                    store(dresidual, i, end, aligned, gs, 0)
                if fit:
                    store(dx, i, end, aligned, xs, 0)
                else:
                    for j in range(i, min(i + VECTOR, end)):
                        c = remainder(divide(j, size), channels)
                        g = get(dy, j)
                        g = masked(g, get(y, j) if relu else g, relu)
                        dx_j = gradient_of(g, get(x, j), factors, sums, count, channels, c)
                        put(dx, j, dx_j)
                i += VECTOR * threads
            barrier()
            step += cuda.gridDim.x

    return rows_gradient
