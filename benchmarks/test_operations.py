"""Inference, training and backward: bnfast's backends, the limit, and everyone else who is there.

One group of the table is one operation, layout, dtype and shape. ``-k`` selects by any part of a
name, as in ``-k "shapes and inference and NCHW and float32 and (cython or limit)"``; a row is
compared with those that are selected with it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cases import Case
from measuring import CLOCK

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def test_inference(case: Case, contender: str, timed: Callable[[Case, str], None]) -> None:
    timed(case, contender)


def test_training(case: Case, contender: str, timed: Callable[[Case, str], None]) -> None:
    timed(case, contender)


def test_backward(case: Case, contender: str, timed: Callable[[Case, str], None]) -> None:
    timed(case, contender)
