"""Any array -> one of the two forms that kernels know, planned on metadata alone.

Sort the axes of an array by stride. The channel axis then has some axes outside it and some inside
it, and batch norm does not care how many: the outer ones count as N, the inner ones as S::

    memory order of x          outer   C   inner      kernel form
    N C H W   (contiguous)     N       C   H*W        channels-first (N, C, S)
    N H W C   (channels-last)  N*H*W   C   1          channels-last  (M, C)
    W H C N   (Fortran)        W*H     C   N          channels-first (W*H, C, N)

So every dense array is a view of a kernel form, in whatever order its axes lie. Gaps, steps,
broadcasts and reversed axes need one copy, into the same order of axes. The output is allocated in
that order too: its layout follows the input's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Plan:
    """How an array maps onto a kernel form.

    Attributes
    ----------
    shape : tuple of int
        Shape of the array, channels on axis 1.
    dtype : numpy.dtype
        Its dtype in native byte order.
    axes : tuple of int or None
        The axes in memory order, outermost first; None if they are in order already.
    inverse : tuple of int or None
        The permutation that undoes ``axes``.
    kernel_shape : tuple of int
        ``(N, C, S)`` or ``(M, C)``.
    count : int
        Elements per channel.
    dense : bool
        Whether the array has neither gaps nor repeats, so that its form is a view.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    axes: tuple[int, ...] | None
    inverse: tuple[int, ...] | None
    kernel_shape: tuple[int, ...]
    count: int
    dense: bool

    @property
    def memory_shape(self) -> tuple[int, ...]:
        """The lengths of the axes in memory order."""
        return self.shape if self.axes is None else tuple(self.shape[axis] for axis in self.axes)


@lru_cache(maxsize=1024)
def plan(shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype[np.generic]) -> Plan:
    """Plan the kernel form of an array with channels on axis 1.

    Parameters
    ----------
    shape, strides : tuple of int
        The array's shape, and its strides in bytes.
    dtype : numpy.dtype
        Its dtype, in any byte order.

    Examples
    --------
    >>> x = np.empty((2, 3, 4, 5), np.float32)
    >>> plan(x.shape, x.strides, x.dtype).kernel_shape
    (2, 3, 20)
    >>> x = np.empty((2, 4, 5, 3), np.float32).transpose(0, 3, 1, 2)
    >>> plan(x.shape, x.strides, x.dtype).kernel_shape
    (40, 3)
    """
    axes = _memory_order(shape, strides)
    channels = shape[1]
    at = axes.index(1)
    outer = prod(shape[axis] for axis in axes[:at])
    inner = prod(shape[axis] for axis in axes[at + 1 :])
    if channels == 1:
        kernel_shape: tuple[int, ...] = (1, 1, outer * inner)
    elif inner == 1:
        kernel_shape = (outer, channels)
    else:
        kernel_shape = (outer, channels, inner)
    identity = tuple(range(len(shape)))
    permuted = axes != identity
    return Plan(
        shape=shape,
        dtype=dtype if dtype.isnative else dtype.newbyteorder("="),
        axes=axes if permuted else None,
        inverse=tuple(axes.index(axis) for axis in identity) if permuted else None,
        kernel_shape=kernel_shape,
        count=outer * inner,
        dense=is_dense(axes, shape, strides, dtype.itemsize),
    )


def lies_as(array: Any, other: Plan) -> bool:
    """Return whether ``array`` has the memory order of ``other``, writable, aligned, no gaps."""
    ordered = array if other.axes is None else array.transpose(other.axes)
    return bool(ordered.flags.carray)


def _memory_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes from the outermost in memory to the innermost.

    An axis of length 1 has no place in memory (its stride is arbitrary), and neither has any axis
    of an empty array. They stay where they stand if the rest is in order; else they go outermost.
    """
    identity = tuple(range(len(shape)))
    if 0 in shape:
        return identity
    long = [axis for axis in identity if shape[axis] > 1]
    ordered = sorted(long, key=lambda axis: -abs(strides[axis]))
    if ordered == long:
        return identity
    return tuple([axis for axis in identity if shape[axis] == 1] + ordered)


def is_dense(
    axes: tuple[int, ...], shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int
) -> bool:
    """Return whether, from the innermost axis out, each stride is the extent of what is inside."""
    extent = itemsize
    for axis in reversed(axes):
        if shape[axis] > 1:
            if strides[axis] != extent:
                return False
            extent *= shape[axis]
    return True
