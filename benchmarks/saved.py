"""Reading what ``pytest benchmarks/ --benchmark-json=FILE`` has saved.

`Run` holds every group, and takes ratios the one way that a drifting machine allows: round by
round, then the median. A quotient of two medians would compare two different moments.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from cases import Case

LIMIT = "limit"
BACKENDS = ("cython", "numba", "cuda", "numpy")

Rounds = dict[str, list[float]]
"""The seconds of each contender of a group, one figure for each round."""


class Run:
    """The groups of one or more saved files; where two have the same one, the later file counts."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.groups: dict[Case, Rounds] = {}
        self.info: dict[tuple[Case, str], dict[str, Any]] = {}
        self.machine: dict[str, Any] = {}
        self.date = ""
        for path in paths:
            self._read(path)

    def _read(self, path: Path) -> None:
        saved = json.loads(path.read_text(encoding="utf-8"))
        self.machine, self.date = saved["machine_info"], saved["datetime"][:10]
        groups: dict[Case, Rounds] = {}
        for row in saved["benchmarks"]:
            info = row["extra_info"]
            if "contender" not in info:  # the benchmarks of the import and of the choice
                continue
            case = Case(**{name: info[name] for name in Case._fields} | {"shape": shape_of(info)})
            groups.setdefault(case, {})[info["contender"]] = row["stats"]["data"]
            self.info[case, info["contender"]] = info
        self.groups |= groups

    def seconds(self, case: Case, contender: str) -> float | None:
        """Return the median time of a contender; None if it has no row."""
        rounds = self.groups.get(case, {}).get(contender)
        return None if rounds is None else median(rounds)

    def device_seconds(self, case: Case, contender: str) -> float | None:
        """Return the time of a contender in kernels and copies; None where it was not taken."""
        taken = self.info.get((case, contender), {}).get("device_us")
        return None if taken is None else float(taken) / 1e6

    def ratio(self, case: Case, of: str, to: str, to_case: Case | None = None) -> float | None:
        """Return the time of one contender divided by that of another; None if one has no row.

        ``to_case`` is another case that was timed in the same turns.
        """
        one = self.groups.get(case, {}).get(of)
        other = self.groups.get(to_case or case, {}).get(to)
        if one is None or other is None:
            return None
        return median(a / b for a, b in zip(one, other, strict=True))

    def fastest_peer(self, case: Case, contender: str) -> tuple[float, str] | None:
        """Return the time of the fastest peer divided by the contender's, and the peer's name.

        A contender that allocates its result is compared with peers that do as well.
        """
        ratios = [
            (ratio, peer)
            for peer in self.groups.get(case, {})
            if is_peer(peer) and (writes_out(contender) or not writes_out(peer))
            if (ratio := self.ratio(case, peer, contender)) is not None
        ]
        return min(ratios, default=None)


def shape_of(info: dict[str, Any]) -> tuple[int, ...]:
    """Return the shape, which JSON has made a list."""
    return tuple(info["shape"])


def writes_out(contender: str) -> bool:
    """Return whether a contender is given an array to write to, or keeps one."""
    return contender.endswith("out=")


def is_peer(contender: str) -> bool:
    """Return whether a contender is neither one of bnfast's backends nor the limit."""
    return contender.removesuffix(" out=") not in (*BACKENDS, LIMIT)
