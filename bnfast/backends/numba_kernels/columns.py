"""Kernels for channels-last arrays (M, C), whose reductions are in `blocks`."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np
from numba import prange

from bnfast.backends.numba_kernels.addresses import (
    get,
    itemsize_of,
    present,
)
from bnfast.backends.numba_kernels.arithmetic import (
    fill_backward,
    fill_forward,
    share,
)
from bnfast.backends.numba_kernels.blocks import (
    add_columns,
    ahead_of,
    measure_share,
    merge_columns,
    parts_of,
    sum_share,
    wide_rows,
)
from bnfast.backends.numba_kernels.compiling import Array, Shape, Vector
from bnfast.backends.numba_kernels.lanes import LANES
from bnfast.backends.numba_kernels.walks import (
    BEYOND,
    cycle_width,
    gradient_by_cycle,
    lines_ahead,
    normalize_by_cycle,
    past_cache,
    repeat,
    table_for,
)

MANY = 512
"""Channels from which on the threads share the work on channels, too."""


def forward(
    x: Array,
    given_mean: Vector,
    given_var: Vector,
    weight: Vector,
    bias: Vector,
    eps: float,
    residual: Array,
    y: Array,
    mean: Vector,
    m2: Vector,
    relu: bool,
    shape: Shape,
    core: int,
    last: int,
    threads: int,
) -> None:
    """Compute mean and m2 where these are present; y where that is, by them or what is given."""
    outer, channels = get(shape, 0), get(shape, 1)
    elements = outer * channels
    large = elements * itemsize_of(x) * (3 if present(residual) else 2) > last
    n = 1.0
    if present(mean):
        width, rows = wide_rows(outer, channels)
        parts = parts_of(rows, width)[1]
        state = np.empty((parts, 4, -(-width // LANES) * LANES))
        ahead = ahead_of(width, large)
        for thread in prange(threads):
            measure_share(x, rows, width, ahead, state, thread, threads)
        if channels < MANY:
            merge_columns(x, rows, width, channels, elements, state, 0, channels, mean, m2)
        else:
            groups = -(-channels // LANES)
            for thread in prange(threads):
                begin = share(groups, thread, threads) * LANES
                end = min(share(groups, thread + 1, threads) * LANES, channels)
                merge_columns(x, rows, width, channels, elements, state, begin, end, mean, m2)
        given_mean, given_var, n = mean, m2, float(outer)
    if not present(y):
        return
    past, ahead = past_cache(y, x, residual, large), lines_ahead(x, large)
    table = table_for(y, cycle_width(channels), past)
    wide = np.empty((5, cycle_width(channels) + BEYOND))
    safe = fill_forward(table, wide, given_mean, given_var, n, weight, bias, eps, 0, channels)
    repeat(table, channels)
    if not safe:
        repeat(wide, channels)
    for thread in prange(threads):
        begin, end = share(elements, thread, threads), share(elements, thread + 1, threads)
        normalize_by_cycle(x, residual, y, begin, end, table, wide, safe, relu, past, ahead)


def backward(
    dy: Array,
    x: Array,
    y: Array,
    mean: Vector,
    invstd: Vector,
    weight: Vector,
    sum_dy: Vector,
    sum_dy_xhat: Vector,
    measure: bool,
    n: float,
    dx: Array,
    dresidual: Array,
    shape: Shape,
    core: int,
    last: int,
    threads: int,
) -> None:
    """Take the sums, if ``measure``; make dx by the sums over n, and dresidual, where present."""
    outer, channels = get(shape, 0), get(shape, 1)
    elements = outer * channels
    large = elements * itemsize_of(x) * (4 if present(y) else 3) > last
    if measure:
        width, rows = wide_rows(outer, channels)
        parts = parts_of(rows, width)[1]
        padded = -(-width // LANES) * LANES
        center = np.zeros(padded)
        for c in range(width):
            center[c] = get(mean, c % channels)
        state = np.empty((parts, 4, padded))
        ahead = ahead_of(width, large)
        for thread in prange(threads):
            sum_share(dy, x, y, rows, width, ahead, center, state, thread, threads)
        if channels < MANY:
            add_columns(
                dy, x, y, rows, width, channels, elements, state, mean, invstd, 0, channels, sum_dy,
                sum_dy_xhat,
            )  # fmt: skip
        else:
            groups = -(-channels // LANES)
            for thread in prange(threads):
                begin = share(groups, thread, threads) * LANES
                end = min(share(groups, thread + 1, threads) * LANES, channels)
                add_columns(
                    dy, x, y, rows, width, channels, elements, state, mean, invstd, begin, end,
                    sum_dy, sum_dy_xhat,
                )  # fmt: skip
    if not present(dx):
        return
    past, ahead = past_cache(dx, dy, x, large), lines_ahead(x, large)
    table = table_for(dx, cycle_width(channels), past)
    wide = np.empty((5, cycle_width(channels) + BEYOND))
    safe = fill_backward(table, wide, mean, invstd, weight, sum_dy, sum_dy_xhat, n, 0, channels)
    repeat(table, channels)
    if not safe:
        repeat(wide, channels)
    for thread in prange(threads):
        begin, end = share(elements, thread, threads), share(elements, thread + 1, threads)
        gradient_by_cycle(dy, x, y, dx, dresidual, begin, end, table, wide, safe, past, ahead)
