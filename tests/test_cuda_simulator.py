"""The CUDA kernels pass the suite on small arrays, in Numba's simulator, which needs no GPU."""

from __future__ import annotations

import pytest
import quick_simulator

from bnfast.testing import KernelConformance


class Simulated(KernelConformance):
    """Kernels launched as a simulator can bear."""

    backend = "cuda"
    most_elements = 1100

    @pytest.fixture(autouse=True)
    def quick(self):
        with quick_simulator.quick():
            yield


class TestCudaSimulator(Simulated):
    """All of it."""
