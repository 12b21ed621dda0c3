"""Random inputs that are fresh in every run, and the same again for the same seed.

One seed serves a whole run. Each test gets a generator of its own, made from the seed and the
test's name, so neither the order of the tests nor a selection among them changes its inputs.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pytest

_drawn: list[int] = []


def fresh_seed() -> int:
    """Return the seed of this run, drawn once per process."""
    if not _drawn:
        _drawn.append(secrets.randbits(32))
    return _drawn[0]


def generator(request: pytest.FixtureRequest, seed: int | None = None) -> np.random.Generator:
    """Return the generator of the requesting test, and print its seed for the failure report.

    Parameters
    ----------
    request
        pytest's own fixture of that name.
    seed
        The seed to use; None stands for ``--seed`` where the run has such an option, else for
        a fresh one.
    """
    if seed is None:
        seed = request.config.getoption("seed", default=None)
    if seed is None:
        seed = fresh_seed()
    name = request.node.nodeid.partition("::")[2]
    print(f"random inputs of {name}: seed {seed}")  # noqa: T201  pytest shows it on failure
    return np.random.default_rng([seed, *hashlib.sha256(name.encode()).digest()])
