"""The same bits whatever must not matter: threads, the place in memory, sharing, repetition."""

# ruff: noqa: D102  (the name of a test is its description)

from __future__ import annotations

import numpy as np

from bnfast.testing.bounds import assert_same_outputs
from bnfast.testing.cases import ALL_DTYPES, LARGE_SHAPES, OPERATIONS, Inputs, Shape, draw, over
from bnfast.testing.guard import Run

THREADED_SHAPES: tuple[Shape, ...] = ((7, 1, 13), (3, 6, 196), (2, 3, 1025), *LARGE_SHAPES)
ALIASES = (
    ("normalize", "x"),
    ("normalize", "residual"),
    ("train", "x"),
    ("train", "residual"),
    ("backward_input", "dy"),
    ("backward", "dy"),
)


class DeterminismTests:
    """Bits that must not depend on how a call is made."""

    @over("operation", OPERATIONS)
    @over("dtype", ALL_DTYPES)
    @over("shape", THREADED_SHAPES)
    def test_same_bits_for_any_number_of_threads(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, operation: str
    ) -> None:
        inputs = draw(rng, shape, dtype)
        one = run(operation, inputs, relu=True, num_threads=1)
        for num_threads in (1, 2, 3, 7):
            other = run(operation, inputs, relu=True, num_threads=num_threads)
            assert_same_outputs(f"1 thread against {num_threads}", one, other)

    @over("operation", OPERATIONS)
    @over("dtype", ALL_DTYPES)
    @over("shape", ((3, 5, 67), (2, 3, 1025), (203, 5), (97, 17), (9, 2, 8191), (70001, 3)))
    def test_same_bits_wherever_arrays_lie(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, operation: str
    ) -> None:
        inputs = draw(rng, shape, dtype)
        one = run(operation, inputs, relu=True)
        for offset in (1, 2, 3, 5, 13):
            other = run(operation, inputs, relu=True, offset=offset)
            assert_same_outputs(f"arrays moved by {offset} elements", one, other)

    @over("operation,alias", ALIASES)
    @over("relu", (False, True))
    @over("dtype", ALL_DTYPES)
    @over("shape", ((5, 3, 1), (3, 6, 196), (2, 3, 1025), (1025, 16), *LARGE_SHAPES))
    def test_same_bits_in_place(
        self,
        run: Run,
        rng: np.random.Generator,
        shape: Shape,
        dtype: type,
        relu: bool,
        operation: str,
        alias: str,
    ) -> None:
        inputs = draw(rng, shape, dtype)
        apart = run(operation, inputs, relu=relu)
        assert_same_outputs(
            f"{operation} in place of {alias}",
            run(operation, inputs, relu=relu, alias=alias),
            apart,
        )
        if alias == "x":
            alone: Inputs = inputs.replace(residual=None)
            assert_same_outputs(
                f"{operation} in place of x, without a residual",
                run(operation, alone, relu=relu, alias=alias),
                run(operation, alone, relu=relu),
            )
