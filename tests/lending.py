"""Memory borrowed straight from `bnfast.memory`, for its tests."""

from __future__ import annotations

import numpy as np

from bnfast import memory

MIB = 2**20


def lend(size=MIB):
    return memory.empty((size,), np.dtype(np.uint8))


def address(array):
    return array.__array_interface__["data"][0]
