"""The host backends, as parameters of tests; those that cannot run are skipped with the reason."""

from __future__ import annotations

import pytest

import bnfast

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
