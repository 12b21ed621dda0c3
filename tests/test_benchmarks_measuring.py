"""The measuring itself: nobody is timed cold, unchecked, or out of turn."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import cases
import groups
import limit
import measuring
import numpy as np
import pytest
from cases import Case, Problem
from contenders import CONTENDERS

CASE = Case("shapes", "backward", "NCHW", "float32", (2, 3, 8, 8))


class World:
    """A clock that only calls and sleeping move, and a cache that belongs to the last caller."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def call(self, name: str, seconds: float) -> None:
        """Take ``seconds``, or a hundred times as long if somebody else was here before."""
        warm = bool(self.order) and self.order[-1] == name
        self.order.append(name)
        self.now += seconds if warm else 100 * seconds

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    clock = SimpleNamespace(
        perf_counter=lambda: world.now, process_time=lambda: 0.0, sleep=world.sleep
    )
    monkeypatch.setattr(measuring, "time", clock)
    return world


def test_a_turn_leaves_out_what_a_cold_cache_costs(world: World) -> None:
    calls = {
        name: lambda name=name, seconds=seconds: world.call(name, seconds)
        for name, seconds in (("short", 1e-5), ("long", 0.1))
    }
    times = measuring.take_turns(calls, 3)
    assert times["short"] == pytest.approx([1e-5] * 3)
    assert times["long"] == pytest.approx([0.1] * 3)


def test_every_contender_begins_a_round_once(world: World) -> None:
    names = ["a", "b", "c"]
    calls = {name: lambda name=name: world.call(name, 1e-2) for name in names}
    measuring.take_turns(calls, 3)
    turns = [b for a, b in zip(["", *world.order], world.order, strict=False) if a != b]
    assert "".join(turns).endswith("abc" + "bca" + "cab")


def test_a_call_that_repeats_its_work_counts_once(world: World) -> None:
    class Repeats:
        repeat = 4

        def __call__(self) -> None:
            world.call("it", 1e-3)

    assert measuring.take_turns({"it": Repeats()}, 1)["it"] == pytest.approx([0.25e-3])


def test_recorded_times_are_played_back() -> None:
    times, seen = [3e-6, 1e-6, 2.5], []
    clock = measuring.PlayedBack()
    clock.load(times)
    for _ in times:  # as pytest-benchmark does in each round
        start = clock()
        clock.play()
        seen.append(clock() - start)
    assert seen == pytest.approx(times)


@pytest.fixture(params=cases.OPERATIONS)
def problem(request: pytest.FixtureRequest, rng: np.random.Generator) -> Iterator[Problem]:
    return Problem(CASE._replace(operation=request.param), rng)


def test_a_check_sees_a_wrong_element(problem: Problem) -> None:
    exact = problem.solution
    problem.check(exact)
    for i, array in enumerate(exact):
        wrong = [a.copy() for a in exact]
        wrong[i].flat[-1] += 0.01 * (1 if array.ndim == 4 else problem.x[:, 0].size)
        with pytest.raises(AssertionError):
            problem.check(tuple(wrong))
    with pytest.raises(ValueError, match="zip"):
        problem.check((*exact, exact[0]))


def test_a_wrong_contender_fails_alone(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    right = CONTENDERS["numpy"]
    wrong = right._replace(make=lambda problem: lambda: tuple(-a for a in problem.solution))
    monkeypatch.setitem(CONTENDERS, "wrong", wrong)
    group = groups.Group([(CASE, "wrong"), (CASE, "numpy")], rng)
    with pytest.raises(AssertionError):
        group.require(CASE, "wrong")
    group.require(CASE, "numpy")
    group.measure(1)
    times, info = group.result(CASE, "numpy")
    assert len(times) == 1
    assert info["bytes"] == 3 * 4 * 2 * 3 * 8 * 8
    assert info["GB/s"] == pytest.approx(info["bytes"] / times[0] / 1e9, abs=0.01)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_limit_moves_every_byte(problem: Problem, threads: int) -> None:
    large = Problem(problem.case._replace(shape=(8, 16, 16, 16)), np.random.default_rng(0))
    for move in limit.moves(large, threads).values():
        move.check()
        target, *sources, lines, streams, count = move.arguments
        move.arguments = (target, *sources, lines - 1, streams, count)
        with pytest.raises(AssertionError):
            move.check()


def test_without_a_compiler_there_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(RuntimeError, match="no-such-compiler was not found; set CC"):
        limit.library.__wrapped__()
    monkeypatch.setenv("CC", "cc -no-such-option")
    with pytest.raises(RuntimeError, match="compiling the row 'limit' failed: cc"):
        limit.library.__wrapped__()
