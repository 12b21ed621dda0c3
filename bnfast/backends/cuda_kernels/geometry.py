"""How arrays are cut into parts and chunks, and how many blocks share them.

Sums are taken part by part, and the parts are merged in ascending order. Parts depend on the shape
and on the number of threads in a block alone: they decide the bits of a result, and how many blocks
share them does not. Elementwise passes are cut as it suits the number of blocks.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from bnfast.backends.cuda_kernels.driver import VECTOR

MOST_PARTS = 1024
"""Parts of a channel that are wanted at most: their results have to be merged."""

LONGEST = 4
"""How many times larger than it has to be a part may become for that."""

TABLE = 512
"""Runs that a chunk of a channels-first array may touch: what is known of each is kept."""

SWEEPS = 4
"""Vectors of a thread in a chunk of a channels-first array, at most."""

SPAN = 32
"""Vectors of a thread in a part of an elementwise pass over a channels-last array, at most."""


class Launch(NamedTuple):
    """What a device is given at a time."""

    threads: int
    """Threads of a block."""
    blocks: int
    """Blocks of a grid, at most."""
    part: int
    """Elements of a part of a channels-first sum, at least."""
    rows: int
    """Vectors of each thread in a part of a channels-last sum, at least."""


class Plan(NamedTuple):
    """How the kernels of a form are launched on an array of one shape."""

    channels_first: bool
    sum_blocks: int
    sum_geometry: tuple[int, ...]
    """What the kernels that sum are told of the shape and of its parts."""
    parts: int
    """Parts of each channel."""
    merge_geometry: tuple[int, ...]
    """What the kernels that merge are told: channels, parts, and where part e of channel c lies,
    which is at ``e * apart + c * step``."""
    pass_blocks: int
    pass_geometry: tuple[int, ...]
    """What the elementwise kernels are told."""
    vectors: bool
    """Whether vectors start where the kernels want them, if the array itself does."""


@functools.lru_cache(1024)
def plan(shape: tuple[int, ...], launch: Launch) -> Plan:
    """Plan the work on an array of one of the two forms, which is not empty."""
    if len(shape) == 3:
        return _plan_rows(*shape, launch=launch)
    rows, channels = shape
    return _plan_columns(rows, channels, launch)


def _plan_rows(samples: int, channels: int, size: int, launch: Launch) -> Plan:
    """Cut each channel into parts of so many runs, or, where runs are long, of a piece of one.

    Part e is piece ``e % pieces`` of the runs from ``e // pieces * runs`` on.
    """
    fair = samples * size // MOST_PARTS
    wanted = max(launch.part, min(fair, LONGEST * launch.part))
    runs, length, pieces = max(1, wanted // size), size, 1
    if size >= wanted:
        length = -(-size // (size // wanted * VECTOR)) * VECTOR
        pieces = -(-size // length)
    parts = -(-samples // runs) * pieces
    # A run that starts within a vector can reach into one more.
    groups = -(-length // VECTOR) if size % VECTOR == 0 else (length + VECTOR - 2) // VECTOR + 1
    elements = samples * channels * size
    sweep = launch.threads * VECTOR
    sweeps = max(1, min(SWEEPS, elements // (sweep * launch.blocks)))
    chunk = min(sweeps * sweep, (TABLE - 2) * size // VECTOR * VECTOR)
    return Plan(
        channels_first=True,
        sum_blocks=min(launch.blocks, parts * channels),
        sum_geometry=(samples, channels, size, runs, length, pieces, parts, groups),
        parts=parts,
        merge_geometry=(channels, parts, 1, parts),
        pass_blocks=min(launch.blocks, -(-elements // chunk)),
        pass_geometry=(elements, channels, size, chunk),
        vectors=True,
    )


def _plan_columns(rows: int, channels: int, launch: Launch) -> Plan:
    """Fold rows into a wide row, of which each thread has a vector; cut it where it is too wide.

    A part is ``span`` wide rows of a tile::

        thread      0000111122223333
        wide row    abcabcabcabc....     three channels, folded four times
    """
    room = VECTOR * launch.threads
    fold = min(max(1, room // channels), rows)
    whole = VECTOR // math.gcd(VECTOR, channels)
    if fold > whole:
        fold -= fold % whole  # so that every wide row starts at a vector
    tiles = -(-channels // room)
    width = fold * channels if tiles == 1 else room
    wide_rows = -(-rows // fold)
    span = max(launch.rows, min(-(-wide_rows // MOST_PARTS), 2 * launch.rows))
    parts = -(-wide_rows // span)
    pass_span = max(1, min(SPAN, wide_rows * tiles // launch.blocks))
    pass_parts = -(-wide_rows // pass_span)

    def blocks(count: int) -> int:
        """Return how many blocks share so many parts of each tile: as many for every tile."""
        return tiles * max(1, min(launch.blocks // tiles, count))

    return Plan(
        channels_first=False,
        sum_blocks=blocks(parts),
        sum_geometry=(rows, channels, fold, width, tiles, span, parts),
        parts=parts,
        merge_geometry=(channels, parts, channels, 1),
        pass_blocks=blocks(pass_parts),
        pass_geometry=(rows, channels, fold, width, tiles, pass_span, pass_parts),
        vectors=fold * channels % VECTOR == 0,
    )
