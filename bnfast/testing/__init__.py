"""The conformance suite that every backend passes, shipped so that yours can pass it too.

A backend is tested by a class of two lines in any module that pytest collects::

    from bnfast.testing import KernelConformance

    class TestMine(KernelConformance):
        backend = "mine"

Rooms, from the bottom up
    `reference`    the definition, in more digits than float64 has
    `cases`        the shapes and dtypes that are tried, and the inputs drawn for them
    `guard`        one guarded call of a kernel: IN read-only, OUT prefilled, both framed
    `bounds`       the error bounds of `bnfast.spec` as assertions that say where and by how much
    `seeding`      a generator per test, fresh in every run and reproducible from one number
    `contract`, `forward`, `backward`, `robustness`, `storage`, `determinism`    the tests, by theme
    `conformance`  `KernelConformance`, which gathers them

Nothing is imported before `KernelConformance` is asked for; from then on pytest is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnfast.testing.conformance import KernelConformance

__all__ = ["KernelConformance"]


def __getattr__(name: str) -> object:
    """Import the suite at first use, with pytest's explanations of failed asserts."""
    if name != "KernelConformance":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import pytest

    for room in ("contract", "forward", "backward", "robustness", "storage", "determinism"):
        pytest.register_assert_rewrite(f"{__name__}.{room}")
    from bnfast.testing.conformance import KernelConformance

    globals()[name] = KernelConformance
    return KernelConformance
