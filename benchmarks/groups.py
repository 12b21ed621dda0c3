"""One group of the comparison: its rows are made, checked, timed in turns, and then looked up."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
from cases import Case, Problem
from contenders import CONTENDERS
from measuring import Call, take_turns


class Group:
    """The rows of a case; a row that fails to be made or checked does not stop the others."""

    def __init__(self, case: Case, names: Sequence[str], rng: np.random.Generator) -> None:
        self.problem = Problem(case, rng)
        self.rows: dict[str, dict[str, Call]] = {}
        self.failures: dict[str, Exception] = {}
        self.times: dict[tuple[str, str], list[float]] = {}
        for name in names:
            try:
                self.rows[name] = self._checked(name)
            except Exception as error:  # raised again by the test of the row
                self.failures[name] = error

    def _checked(self, name: str) -> dict[str, Call]:
        made = CONTENDERS[name].make(self.problem)
        if isinstance(made, dict):
            for move in made.values():
                move.check()
            return made
        self.problem.check(made())
        return {"": made}

    def measure(self, rounds: int) -> None:
        """Time all rows."""
        calls = {
            (name, variant): call
            for name, variants in self.rows.items()
            for variant, call in variants.items()
        }
        self.times = take_turns(calls, rounds)

    def require(self, name: str) -> None:
        """Raise what making or checking the row has raised, if anything."""
        if name in self.failures:
            raise self.failures[name]

    def result(self, name: str) -> tuple[list[float], dict[str, Any]]:
        """Return the seconds per call in each round, and what else there is to say about the row.

        Of several variants (those of the limit) the fastest counts.
        """
        medians = {variant: median(self.times[name, variant]) for variant in self.rows[name]}
        fastest = min(medians, key=medians.__getitem__)
        case, contender = self.problem.case, CONTENDERS[name]
        info = {
            **case._asdict(),
            "contender": name,
            "bytes": case.bytes,
            "GB/s": round(case.bytes / medians[fastest] / 1e9, 2),
            **contender.circumstances(),
        }
        if len(medians) > 1:
            info["variants"] = {variant: round(1e6 * t, 3) for variant, t in medians.items()}
        return self.times[name, fastest], info
