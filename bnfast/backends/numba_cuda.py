"""Numba CUDA kernels: the place that the table of backends keeps for them.

There are none in this version. `unavailable` says so, and nothing asks a backend that cannot run
for more.
"""

from __future__ import annotations


def unavailable() -> str | None:
    """Return the reason why this backend cannot run."""
    return "this version of bnfast has no CUDA kernels yet; a later one will bring them"
