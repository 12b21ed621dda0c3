"""The suite fails on every CUDA kernel of `wrong_device_kernels`, in the simulator."""

from __future__ import annotations

import pytest
import wrong_device_kernels
from numba import config
from quick_simulator import quick
from test_conformance_bites import conformance  # noqa: F401  (a fixture)

pytestmark = pytest.mark.skipif(
    not config.ENABLE_CUDASIM, reason="what is replaced is compiled on a GPU"
)

MOST_ELEMENTS = 1000


@pytest.mark.parametrize("name", wrong_device_kernels.WRONG)
def test_wrong_device_kernel_is_caught(name, conformance, monkeypatch) -> None:  # noqa: F811
    wrong = wrong_device_kernels.WRONG[name]
    monkeypatch.setattr(wrong.module, wrong.name, wrong.stand_in(getattr(wrong.module, wrong.name)))
    with quick():
        outcome = conformance(
            f"cuda_{name}", "'cuda'", wrong.caught_by, most_elements=MOST_ELEMENTS
        )
    missed = set(wrong.caught_by) - outcome.failures.keys()
    assert not missed, f"passed with {name.replace('_', ' ')}: {sorted(missed)}"


def test_right_device_kernels_pass_the_same_way(conformance) -> None:  # noqa: F811
    wanted = sorted({test for row in wrong_device_kernels.WRONG.values() for test in row.caught_by})
    with quick():
        outcome = conformance(
            "cuda_right", "'cuda'", wanted, enough=12, most_elements=MOST_ELEMENTS
        )
    assert not outcome.failures, outcome.failures
    assert set(outcome.passed) == set(wanted)
