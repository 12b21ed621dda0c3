"""Kernels that make a channel's result from those of its parts, one block for each channel.

What is known of each part lies in planes of one number per part and channel. Part e of channel c
is number ``e * apart + c * step`` of its plane.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from bnfast.backends.cuda_kernels.driver import MOST_THREADS, cuda, float64
from bnfast.backends.cuda_kernels.reductions import total
from bnfast.backends.cuda_kernels.signatures import Elements, Kernel, Numbers


def moments(real) -> Kernel:
    """Return the kernel that merges count, mean and m2: planes 0, 1 and 2."""

    def merge_moments(
        x: Elements, known: Numbers, result: Numbers, size: int,
        channels: int, parts: int, apart: int, step: int,
    ) -> None:  # fmt: skip
        numbers = cuda.shared.array(MOST_THREADS, float64)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        plane = parts * channels
        for c in range(cuda.blockIdx.x, channels, cuda.gridDim.x):
            count, first = 0.0, 0.0
            for e in range(thread, parts, threads):
                at = e * apart + c * step
                count += known[at]
                first += known[at] * known[plane + at]
            count = total(count, numbers, thread, threads)
            mean = total(first, numbers, thread, threads) / count
            squares = 0.0
            for e in range(thread, parts, threads):
                at = e * apart + c * step
                off = known[plane + at] - mean
                squares += known[2 * plane + at] + known[at] * off * off
            squares = total(squares, numbers, thread, threads)
            if thread == 0:
                result[c] = float64(x[c * size]) + mean
                result[channels + c] = squares

    return merge_moments


def sums(real) -> Kernel:
    """Return the kernel that adds up the sums of dy, and of dy times the distance to the mean."""

    def merge_sums(
        known: Numbers, invstd: Numbers, result: Numbers,
        channels: int, parts: int, apart: int, step: int,
    ) -> None:  # fmt: skip
        numbers = cuda.shared.array(MOST_THREADS, float64)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        plane = parts * channels
        for c in range(cuda.blockIdx.x, channels, cuda.gridDim.x):
            dy, dy_off = 0.0, 0.0
            for e in range(thread, parts, threads):
                at = e * apart + c * step
                dy += known[at]
                dy_off += known[plane + at]
            dy = total(dy, numbers, thread, threads)
            dy_off = total(dy_off, numbers, thread, threads)
            if thread == 0:
                result[c] = dy
                result[channels + c] = dy_off * invstd[c]

    return merge_sums
