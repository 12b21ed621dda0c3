"""Rows that are timed together: they are made, checked, timed in turns, and then looked up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import gpu
import numpy as np
from cases import Case, Problem
from measuring import Call, take_turns

Row = tuple[Case, str]
"""A case and the name of a contender."""


class Group:
    """Rows that take turns; one that fails to be made or checked does not stop the others."""

    def __init__(self, rows: Sequence[Row], rng: np.random.Generator) -> None:
        self.turns = rows[0][0].turns
        problems = {case: Problem(case, rng) for case in dict.fromkeys(case for case, _ in rows)}
        self.calls: dict[Row, dict[str, Call]] = {}
        self.failures: dict[Row, Exception] = {}
        self.times: dict[tuple[Row, str], list[float]] = {}
        for case, name in rows:
            try:
                self.calls[case, name] = _checked(name, problems[case])
            except Exception as error:  # raised again by the test of the row
                self.failures[case, name] = error

    def measure(self, rounds: int) -> None:
        """Time all rows."""
        calls = {
            (row, variant): call
            for row, variants in self.calls.items()
            for variant, call in variants.items()
        }
        self.times = take_turns(calls, rounds)

    def require(self, case: Case, name: str) -> None:
        """Raise what making or checking the row has raised, if anything."""
        if (case, name) in self.failures:
            raise self.failures[case, name]

    def result(self, case: Case, name: str) -> tuple[list[float], dict[str, Any]]:
        """Return the seconds per call in each round, and what else there is to say about the row.

        Of several variants (those of the limit) the fastest counts.
        """
        row = case, name
        medians = {variant: median(self.times[row, variant]) for variant in self.calls[row]}
        fastest = min(medians, key=medians.__getitem__)
        info = {
            **case._asdict(),
            "contender": name,
            "bytes": case.bytes,
            "GB/s": round(case.bytes / medians[fastest] / 1e9, 2),
            **gpu.table(case)[name].circumstances(),
            **gpu.circumstances(case, self.calls[row][fastest]),
        }
        if len(medians) > 1:
            info["variants"] = {variant: round(1e6 * t, 3) for variant, t in medians.items()}
        return self.times[row, fastest], info


def _checked(name: str, problem: Problem) -> dict[str, Call]:
    """Return the calls of a contender, by the name of the variant, after a look at each result."""
    made = gpu.table(problem.case)[name].make(problem)
    if isinstance(made, Mapping):
        for move in made.values():
            move.check()
        return dict(made)
    problem.check(made())
    return {"": made}
