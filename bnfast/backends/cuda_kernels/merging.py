"""Kernels that make a channel's result from those of its parts, one block for each channel.

What is known of each part lies in planes of one number per part and channel. Part e of channel c
is number ``e * apart + c * step`` of its plane.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from bnfast.backends.cuda_kernels.driver import cuda, float64
from bnfast.backends.cuda_kernels.reductions import NUMBERS, totals
from bnfast.backends.cuda_kernels.signatures import Kernel, Numbers


def moments(real) -> Kernel:
    """Return the kernel that merges count, first mean, what it is off by, and m2: planes 0 to 3."""

    def merge_moments(
        known: Numbers, result: Numbers, channels: int, parts: int, apart: int, step: int
    ) -> None:
        numbers = cuda.shared.array(NUMBERS, float64)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        plane = parts * channels
        c = cuda.blockIdx.x
        while c < channels:
            count, first = 0.0, 0.0
            e = thread
            while e < parts:
                at = e * apart + c * step
                count += known[at]
                first += known[at] * (known[plane + at] + known[2 * plane + at])
                e += threads
            count, first = totals(count, first, numbers, thread, threads)
            mean = first / count
            off, squares = 0.0, 0.0
            e = thread
            while e < parts:
                at = e * apart + c * step
                distance = (known[plane + at] - mean) + known[2 * plane + at]
                off += known[at] * distance
                squares += known[3 * plane + at] + known[at] * distance * distance
                e += threads
            off, squares = totals(off, squares, numbers, thread, threads)
            if thread == 0:
                result[c] = mean + off / count
                result[channels + c] = squares - off * (off / count)
            c += cuda.gridDim.x

    return merge_moments


def sums(real) -> Kernel:
    """Return the kernel that adds up the sums of dy, and of dy times the distance to the mean."""

    def merge_sums(
        known: Numbers, invstd: Numbers, result: Numbers,
        channels: int, parts: int, apart: int, step: int,
    ) -> None:  # fmt: skip
        numbers = cuda.shared.array(NUMBERS, float64)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        plane = parts * channels
        c = cuda.blockIdx.x
        while c < channels:
            dy, dy_off = 0.0, 0.0
            e = thread
            while e < parts:
                at = e * apart + c * step
                dy += known[at]
                dy_off += known[plane + at]
                e += threads
            dy, dy_off = totals(dy, dy_off, numbers, thread, threads)
            if thread == 0:
                result[c] = dy
                result[channels + c] = dy_off * invstd[c]
            c += cuda.gridDim.x

    return merge_sums
