"""Inference and training: bnfast's backends, the formula in NumPy, and torch.

``pytest benchmarks/ --benchmark-enable`` prints the comparison; an ordinary run checks every result
once. One group of the table is one operation, shape, layout and dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from contenders import cases

pytestmark = pytest.mark.benchmark(max_time=0.25)


@pytest.mark.parametrize("problem", cases("inference"), indirect=True, ids=str)
def test_inference(problem: object, contender: str, timed: Callable[[str], None]) -> None:
    timed(contender)


@pytest.mark.parametrize("problem", cases("training"), indirect=True, ids=str)
def test_training(problem: object, contender: str, timed: Callable[[str], None]) -> None:
    timed(contender)
