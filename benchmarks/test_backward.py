"""The gradient of a training forward, from its saved statistics; see ``test_forward.py``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from contenders import cases

pytestmark = pytest.mark.benchmark(max_time=0.25)


@pytest.mark.parametrize("problem", cases("backward"), indirect=True, ids=str)
def test_backward(problem: object, contender: str, timed: Callable[[str], None]) -> None:
    timed(contender)
