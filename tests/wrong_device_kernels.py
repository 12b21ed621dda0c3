"""CUDA kernels that are wrong on purpose, each with a test of the suite that must catch it.

Each replaces one thing that the kernels are written with, while they run in the simulator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from bnfast.backends.cuda_kernels import arithmetic, columns, geometry, launch, reductions, rows


class Wrong(NamedTuple):
    """Where the right thing is, what stands in for it, and the tests that must fail."""

    module: Any
    name: str
    stand_in: Callable[[Any], Any]
    caught_by: tuple[str, ...]


def _without_last_block(right: Any) -> Any:
    """Return a `geometry.plan` that forgets the last chunk of every elementwise pass."""

    def plan(shape: tuple[int, ...], limits: geometry.Launch) -> geometry.Plan:
        found = right(shape, limits)
        if not found.channels_first:
            return found
        elements, channels, size, chunk = found.pass_geometry
        kept = (elements - 1) // chunk * chunk or elements
        return found._replace(pass_geometry=(kept, channels, size, chunk))

    return plan


def _without_last_part(right: Any) -> Any:
    """Return a `geometry.plan` whose channels-last sums forget their last part."""

    def plan(shape: tuple[int, ...], limits: geometry.Launch) -> geometry.Plan:
        found = right(shape, limits)
        if found.channels_first or found.parts == 1:
            return found
        *sizes, parts = found.sum_geometry
        channels, _, apart, step = found.merge_geometry
        return found._replace(
            parts=parts - 1,
            sum_geometry=(*sizes, parts - 1),
            merge_geometry=(channels, parts - 1, apart, step),
        )

    return plan


def _without_tail(right: Any) -> Any:
    """Return a `store` that leaves out a vector that is not whole."""

    def store(x: Any, i: int, end: int, aligned: bool, values: Any, at: int) -> None:
        if i + 4 <= end:
            right(x, i, end, aligned, values, at)

    return store


def _truncating(right: Any) -> Any:
    """Return a `store_vector` that cuts off the digits that 16 bits have no room for."""

    def store_vector(pointer: Any, i: int, values: Any, at: int) -> None:
        lost = {"float16": 13, "bfloat16": 16}.get(pointer.elements.dtype.name, 0)
        kept = values.view(f"u{values.itemsize}") >> lost << lost
        right(pointer, i, kept.view(values.dtype), at)

    return store_vector


def _without_eps(right: Any) -> Any:
    return lambda moments, affine, divisor, eps, channels, c: right(
        moments, affine, divisor, 0.0, channels, c
    )


def _past_the_end(right: Any) -> Any:
    """Return a `load` that always loads whole vectors."""
    return lambda x, i, end, aligned, values, at: arithmetic.load_vector(x, i, values, at)


def _nothing(right: Any) -> Any:
    return lambda *arguments: None


def _any_order(right: Any) -> Any:
    """Return a `fold` that takes the float32 of what it adds up."""

    def fold(numbers: Any, count: int, width: int, thread: int, threads: int) -> None:
        for i in range(thread, count * width, threads):
            numbers[i] = float(arithmetic.float32(numbers[i]))
        right(numbers, count, width, thread, threads)

    return fold


WRONG: dict[str, Wrong] = {
    "barrier_missing_in_the_sums": Wrong(
        reductions, "barrier", _nothing, ("test_moments", "test_backward_sums")
    ),
    "barrier_missing_after_the_table": Wrong(rows, "barrier", _nothing, ("test_normalize",)),
    "barrier_missing_between_columns": Wrong(columns, "barrier", _nothing, ("test_moments",)),
    "last_block_lost": Wrong(
        launch.geometry, "plan", _without_last_block, ("test_normalize", "test_backward_input")
    ),
    "last_part_lost": Wrong(
        launch.geometry, "plan", _without_last_part, ("test_moments", "test_backward_sums")
    ),
    "tail_of_rows_lost": Wrong(rows, "store", _without_tail, ("test_normalize",)),
    "tail_of_columns_lost": Wrong(columns, "store", _without_tail, ("test_normalize",)),
    "16_bits_truncated": Wrong(
        arithmetic,
        "store_vector",
        _truncating,
        ("test_residual_is_added_before_the_only_rounding",),
    ),
    "eps_missing_in_rows": Wrong(rows, "affine_of", _without_eps, ("test_eps",)),
    "eps_missing_in_columns": Wrong(columns, "affine_of", _without_eps, ("test_eps",)),
    "reads_past_the_end": Wrong(rows, "load", _past_the_end, ("test_normalize",)),
    "float32_in_a_reduction": Wrong(reductions, "fold", _any_order, ("test_moments",)),
    "residual_ignored": Wrong(
        arithmetic,
        "finish",
        lambda right: lambda value, residual, add, relu: right(value, residual, False, relu),
        ("test_normalize",),
    ),
    "mask_ignored": Wrong(
        rows, "masked", lambda right: lambda dy, y, relu: dy, ("test_backward_sums",)
    ),
}
