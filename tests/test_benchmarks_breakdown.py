"""The breakdown of a small call runs, and names what it times."""

from __future__ import annotations

import call_breakdown
import pytest


def test_every_call_and_step_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    call_breakdown.main(rounds=2, calls=10)
    printed = capsys.readouterr().out.splitlines()
    timed = call_breakdown.whole_calls() | call_breakdown.steps()
    assert [line[:42].rstrip() for line in printed[1:]] == [n for n in timed if n != "nothing"]
    assert all(line[42:].strip().lstrip("-").isdecimal() for line in printed[1:])
