"""The CUDA kernels pass the suite: on a GPU where asked to, else in Numba's simulator.

The simulator runs the same kernels in Python, so it gets small arrays and small blocks.
"""

from __future__ import annotations

import pytest
from numba import config

from bnfast.testing import KernelConformance

SIMULATED = bool(config.ENABLE_CUDASIM)
on_simulator = pytest.mark.skipif(not SIMULATED, reason="the kernels run on a GPU here")

if SIMULATED:
    from quick_simulator import quick
else:
    from contextlib import nullcontext as quick


@pytest.fixture(autouse=True)
def quick_simulator():
    with quick():
        yield


class TestCuda(KernelConformance):
    backend = "cuda"
    most_elements = 1100 if SIMULATED else None
