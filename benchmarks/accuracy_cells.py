"""What `accuracy.py` measures at once, and what it finds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bnfast.testing.reference import FORMATS

RATIOS = tuple(10.0**power for power in range(8))
RATIOS_16BIT = (1.0, 10.0, 100.0)
"""Above that a 16-bit dtype holds hardly two distinct numbers of a channel."""

COUNTS = (2, 10, 100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000)

FEW_RATIOS = (1.0, 1e3, 1e6, 1e7)
"""For a million elements per channel and more."""

TYPICAL = 10_000
"""The n whose percentiles are shown."""


class Cell(NamedTuple):
    """What is measured at once."""

    operation: str
    dtype: str
    count: int
    ratio: float


class Row(NamedTuple):
    """The errors of one subject in one cell and layout, in ulps.

    ``bound`` is the largest as a share of the contract's; ``sums`` that of dweight and dbias.
    """

    subject: str
    layout: str
    cell: Cell
    mean: float
    median: float
    p99: float
    p999: float
    largest: float
    bound: float
    sums: float


def cells(
    operations: tuple[str, ...], dtypes: tuple[str, ...], counts: tuple[int, ...]
) -> Iterator[Cell]:
    """Yield what is measured."""
    for operation in operations:
        for dtype in dtypes:
            for count in counts:
                ratios = RATIOS_16BIT if dtype in FORMATS else RATIOS
                for ratio in ratios:
                    if count < 1_000_000 or ratio in FEW_RATIOS:
                        yield Cell(operation, dtype, count, ratio)
