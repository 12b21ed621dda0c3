"""The sizes of this machine's caches, in bytes, as Linux tells them; a guess where nothing does.

What they decide is a matter of speed alone: how many channels are worked on at once, and when
results are too large to be left in a cache.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Caches(NamedTuple):
    """What one core has to itself, and the largest cache there is."""

    core: int
    last: int


DEFAULT = Caches(core=1 << 20, last=32 << 20)


@cache
def sizes(root: str = "/sys/devices/system/cpu") -> Caches:
    """Return the sizes of the second-level cache and of the last level.

    They are those of the first CPU that this process may use. ``sysconf`` is not asked: under some
    hypervisors it multiplies the last level by the number of cores of the host.
    """
    cpu = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    levels: dict[int, int] = {}
    for index in Path(root, f"cpu{cpu}", "cache").glob("index*"):
        try:
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
            if kind != "Instruction":
                levels[int(level)] = int(size[:-1]) * _UNITS[size[-1]]
        except (OSError, ValueError, KeyError, IndexError):
            continue
    if 2 not in levels:
        return DEFAULT
    return Caches(core=levels[2], last=max(levels.values()))
