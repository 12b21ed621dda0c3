"""Copying between arrays of any strides on one device: gaps, steps, broadcasts, reversed axes."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np

from bnfast.backends.cuda_kernels import driver, elements
from bnfast.backends.cuda_kernels.driver import cuda, int64
from bnfast.backends.cuda_kernels.signatures import Elements, Kernel, Numbers
from bnfast.device import DeviceArray

THREADS, BLOCKS = (8, 3) if driver.SIMULATED else (256, 4096)


@functools.cache
def strided(real) -> Kernel:
    """Return the kernel. ``table`` has three rows: the lengths of the axes, and their steps.

    Rows 1 and 2 are the steps, in elements, of the source and of the target, and each ends with
    where its first element lies. Numbers below 2^53 are exact.
    """

    def strided_copy(
        source: Elements, target: Elements, table: Numbers, axes: int, elements: int
    ) -> None:
        row = axes + 1
        first = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
        for i in range(first, elements, cuda.gridDim.x * cuda.blockDim.x):
            rest, here, there = i, int64(table[2 * row - 1]), int64(table[3 * row - 1])
            for axis in range(axes - 1, -1, -1):
                length = int64(table[axis])
                k = rest % length
                rest = rest // length
                here += k * int64(table[row + axis])
                there += k * int64(table[2 * row + axis])
            target[there] = source[here]

    return strided_copy


def run(source: DeviceArray, target: DeviceArray, stream: Any) -> None:
    """Copy all elements of one array to another of the same shape, which is not empty."""
    start_of_source, flat_source = _flat(source)
    start_of_target, flat_target = _flat(target)
    axes = _merged(source, target)
    lengths, source_steps, target_steps = zip(*axes, strict=True) if axes else ((), (), ())
    table = np.array(
        [*lengths, 0, *source_steps, start_of_source, *target_steps, start_of_target], np.float64
    )
    element = elements.ELEMENT_TYPES[source.dtype.name]
    blocks = min(BLOCKS, -(-source.size // THREADS))
    launch = driver.configure(strided(element), element, blocks, THREADS, stream)
    launch(
        driver.pointer(flat_source),
        driver.pointer(flat_target),
        driver.pointer(cuda.to_device(table, stream=stream)),
        len(axes),
        source.size,
    )


def _merged(source: DeviceArray, target: DeviceArray) -> list[tuple[int, int, int]]:
    """Return length and both steps of the axes, in the order of the target's memory.

    Axes that go on where their neighbour ends are one: for most arrays one or two are left.
    """
    itemsize = source.dtype.itemsize
    steps = zip(source.shape, source.strides, target.strides, strict=True)
    merged: list[tuple[int, int, int]] = []
    for length, here, there in sorted(steps, key=lambda axis: -abs(axis[2])):
        axis = length, here // itemsize, there // itemsize
        if length > 1 and merged and merged[-1][1:] == (length * axis[1], length * axis[2]):
            axis = merged.pop()[0] * length, *axis[1:]
        if length > 1:
            merged.append(axis)
    return merged


def _flat(x: DeviceArray) -> tuple[int, DeviceArray]:
    """Return all memory between the ends of an array, and where in it the first element lies."""
    itemsize = x.dtype.itemsize
    reaches = [(length - 1) * stride for length, stride in zip(x.shape, x.strides, strict=True)]
    below = -sum(reach for reach in reaches if reach < 0)
    above = sum(reach for reach in reaches if reach > 0)
    size = (below + above) // itemsize + 1
    flat = replace(x, shape=(size,), strides=(itemsize,), address=x.address - below)
    return below // itemsize, flat
