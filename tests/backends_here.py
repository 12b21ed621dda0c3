"""The host backends, as parameters of tests; those that cannot run are skipped with the reason."""

from __future__ import annotations

import pytest

import bnfast
from bnfast import registry, spec

NAMES = ("cython", "numba", "numpy")
AVAILABLE = [name for name in NAMES if bnfast.list_backends()[name].available]

over_backends = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                name not in AVAILABLE, reason=str(bnfast.list_backends()[name].reason)
            ),
        )
        for name in NAMES
    ],
)


def y_ulps(backend: str) -> float:
    """Return the bound on a float32 output that holds for the instructions in use here."""
    fma = registry.load(backend).instruction_set() != "baseline"
    return spec.Y_ULPS_FLOAT32 if fma else spec.Y_ULPS_FLOAT32_WITHOUT_FMA
