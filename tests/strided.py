"""Arrays that lie in memory in every way NumPy knows, each holding the values it is given.

A layout is a function from a 4-D array to one with the same values that lies otherwise. Where it
leaves gaps, they hold `GAP`.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Layout: TypeAlias = Callable[[Array], Array]

GAP = 12345


def permuted(axes: tuple[int, ...]) -> Layout:
    """Return the layout whose axes, from the outermost in memory, are ``axes``."""
    return lambda values: values.transpose(axes).copy("C").transpose(np.argsort(axes))


def backwards(axes: tuple[int, ...]) -> Layout:
    """Return the layout with negative strides along ``axes``."""

    def lay(values: Array) -> Array:
        turn = tuple(slice(None, None, -1 if axis in axes else 1) for axis in range(values.ndim))
        return values[turn].copy("C")[turn]

    return lay


def stepped(axis: int) -> Layout:
    """Return the layout that takes every third place along ``axis``."""

    def lay(values: Array) -> Array:
        shape = [3 * n + 1 if i == axis else n for i, n in enumerate(values.shape)]
        places = tuple(
            slice(1, 3 * n, 3) if i == axis else slice(None) for i, n in enumerate(values.shape)
        )
        return _placed(values, shape, places)

    return lay


def cut_out(values: Array) -> Array:
    """Return a block from inside a larger array."""
    shape = [n + 3 for n in values.shape]
    return _placed(values, shape, tuple(slice(1, n + 1) for n in values.shape))


def split_channels(values: Array) -> Array:
    """Return the second half of the channels of a larger array, as a skip connection makes it."""
    shape = list(values.shape)
    shape[1] *= 2
    return _placed(values, shape, (slice(None), slice(values.shape[1], None)))


def shifted(values: Array) -> Array:
    """Return a dense array that starts one byte off its alignment."""
    raw = np.full(values.nbytes + 16, GAP % 256, np.uint8)
    start = 1 + -raw.ctypes.data % 8
    array = raw[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    array[...] = values
    return array


def field(*, aligned: bool) -> Layout:
    """Return the layout of a field of records that start with one byte of something else."""

    def lay(values: Array) -> Array:
        record = np.dtype([("other", np.uint8), ("value", values.dtype)], align=aligned)
        array = np.zeros(values.shape, record)["value"]
        array[...] = values
        return array

    return lay


def swapped(values: Array) -> Array:
    """Return the values in the other byte order."""
    return values.astype(values.dtype.newbyteorder("S"))


def read_only(values: Array) -> Array:
    """Return a read-only copy."""
    array = values.copy()
    array.flags.writeable = False
    return array


def mapped(values: Array) -> Array:
    """Return an array whose memory is a file, at an offset that is no multiple of a page."""
    with tempfile.TemporaryFile() as file:
        file.write(b"\0" * 24 + values.tobytes())
        file.flush()
        # A mapping of nothing is an error.
        length = max(values.size, 1)
        file.truncate(24 + length * values.itemsize)
        array = np.memmap(file, values.dtype, "c", 24, (length,))
    return array[: values.size].reshape(values.shape)


def read_only_mapped(values: Array) -> Array:
    """Return the same, read-only."""
    array = mapped(values)
    array.flags.writeable = False
    return array


def _placed(values: Array, shape: list[int], places: tuple[slice, ...]) -> Array:
    array = np.full(shape, GAP, values.dtype)[places]
    array[...] = values
    return array


DENSE: dict[str, Layout] = {
    "axes" + "".join(map(str, axes)): permuted(axes) for axes in itertools.permutations(range(4))
}
"""Without gaps: the kernels read and write these where they lie."""

WRITABLE: dict[str, Layout] = {
    **DENSE,
    **{f"backwards{axis}": backwards((axis,)) for axis in range(4)},
    "backwards": backwards((0, 1, 2, 3)),
    **{f"stepped{axis}": stepped(axis) for axis in range(4)},
    "cut_out": cut_out,
    "split_channels": split_channels,
    "shifted": shifted,
    "packed_field": field(aligned=False),
    "aligned_field": field(aligned=True),
    "mapped": mapped,
}
"""What ``out`` may be."""

LAYOUTS: dict[str, Layout] = {
    **WRITABLE,
    "swapped": swapped,
    "read_only": read_only,
    "read_only_mapped": read_only_mapped,
}
"""What any input may be."""


def memory_of(array: Array) -> Array:
    """Return the array that owns the memory of a view."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
