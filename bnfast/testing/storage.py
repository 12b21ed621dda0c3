"""Is 16-bit storage right: is every number read, every result rounded as it should be, and once.

The inputs are chosen so that float32 holds each result exactly before it is rounded. What must come
out is then one number, to the bit.
"""

# ruff: noqa: D102  (the name of a test is its description)

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfast import spec
from bnfast.spec import Floats
from bnfast.testing import reference
from bnfast.testing.backward import exact_gradient
from bnfast.testing.bounds import assert_same_bits
from bnfast.testing.cases import EPILOGUES, STORAGE, Inputs, Shape, draw, over
from bnfast.testing.forward import exact_output, with_epilogue
from bnfast.testing.guard import Run, arguments_of
from bnfast.testing.reference import FORMATS, rows

MANY_CHANNELS: tuple[Shape, ...] = ((4, 1024, 17), (68, 1024))
"""With few channels, whose numbers repeat, one unlucky number would be a large share of them."""

NANS: dict[int, tuple[int, ...]] = {
    8: (0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 0x7FFFF00000000000),
    2: (0x7FFF, 0xFFFF, 0x7FC1),
}
"""Bits of unusual NaN, by the bytes they take: all are set, or so many that half a unit of bfloat16
more would be zero, or the last one."""


class StorageTests:
    """Values that are stored in 16 bits."""

    @over("dtype", STORAGE)
    @over("shape", ((1, 1, 2**16), (2**13, 1, 8), (2**16, 1), (2**8, 2**8)))
    def test_every_number_passes(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type
    ) -> None:
        x: Floats = np.arange(2**16, dtype=np.uint16).view(dtype).reshape(shape)
        y = run("normalize", _scaled(rng, x, np.ones(shape[1])))["y"]
        with np.errstate(invalid="ignore"):  # adding 0 makes -0 a 0, and NaN is NaN
            assert_same_bits("y of x * 1 + 0", y + dtype(0), x + dtype(0))

    @over("operation", ("normalize", "train", "backward_input"))
    @over("dtype", STORAGE)
    @over("shape", ((3, 5, 67), (4, 5, 7), (61, 37)))
    def test_any_nan_is_a_nan(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, operation: str
    ) -> None:
        inputs = draw(rng, shape, dtype)
        place, backward = tuple(map(int, rng.integers(shape))), operation == "backward_input"
        for argument in sorted(set(arguments_of(operation)[0]) - {"eps", "count", "y"}):
            values = getattr(inputs, argument)
            where = place if values.ndim > 1 else place[1]

            def holes(bits: NDArray[Any], name: str = argument, where: Any = where) -> list[Any]:
                poisoned = getattr(inputs, name).copy()
                poisoned[where] = bits.view(poisoned.dtype)[0]
                outputs = run(operation, inputs.replace(**{name: poisoned}))
                return [np.isnan(output) for output in outputs.values()]

            expected = holes(np.array([np.nan], values.dtype).view(f"u{values.itemsize}"))
            shows = any(hole.any() for hole in expected)
            assert shows or argument not in ("weight", "dy" if backward else "x"), argument
            for nan in NANS[values.itemsize]:
                for hole, usual in zip(
                    holes(np.array([nan], f"u{values.itemsize}")), expected, strict=True
                ):
                    assert np.array_equal(hole, usual), f"NaN {nan:#x} in {argument} is a number"

    @over("dtype", STORAGE)
    @over("form", ("channels-first", "channels-last"))
    def test_rounds_to_nearest_even(
        self, run: Run, rng: np.random.Generator, form: str, dtype: type
    ) -> None:
        last = form == "channels-last"
        bits = np.arange(2**16, dtype=np.uint16)
        numbers: Floats = bits[bits % 2**15 < np.array(np.inf, dtype).view(np.uint16)].view(dtype)
        digits, lowest, highest = FORMATS[numbers.dtype.name]
        # Ties, results just beside them, subnormals, and infinity.
        factors = np.array([1.5, 1 + 2.0**-digits, 1.25 * 2.0**-digits, 1.5 * 2.0 ** (lowest + 3)])
        factors = np.concatenate([factors, -factors, [2.0, 1.75 * 2.0 ** (highest // 2)]])
        size = numbers.size, factors.size
        x = np.broadcast_to(
            numbers[:, None] if last else numbers, size if last else (1, *size[::-1])
        )
        y = run("normalize", _scaled(rng, np.ascontiguousarray(x), factors))["y"]
        exact = rows(x).astype(np.float64) * factors[:, None]
        _assert_rounded(rows(y), exact)

    @over("dtype", STORAGE)
    @over("relu", (False, True))
    @over("shape", ((3, 5, 1031), (2, 3, 49), (9, 16, 8), (515, 5), (515, 64)))
    def test_residual_is_added_before_the_only_rounding(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, relu: bool
    ) -> None:
        def multiples(unit: float, most: int) -> Floats:
            return (rng.integers(-most, most, shape) * unit).astype(dtype)

        digits = FORMATS[np.dtype(dtype).name].digits
        most = 2 ** (digits - 1)
        inputs = _scaled(rng, multiples(2.0**-digits, most), np.full(shape[1], 1.5))
        residual = multiples(2.0 ** -(digits + 2), most)
        inputs = inputs.replace(residual=residual, bias=np.full(shape[1], 2.0 ** -(digits + 3)))
        y = run("normalize", inputs, relu=relu)["y"]
        exact = inputs.x.astype(np.float64) * 1.5 + residual.astype(np.float64) + inputs.bias[0]
        _assert_rounded(y, np.maximum(exact, 0.0) if relu else exact)

    @over("epilogue", EPILOGUES)
    @over("operation", ("normalize", "train"))
    @over("dtype", STORAGE)
    @over("shape", MANY_CHANNELS)
    def test_nearly_all_results_are_rounded_right(
        self,
        run: Run,
        rng: np.random.Generator,
        shape: Shape,
        dtype: type,
        operation: str,
        epilogue: str,
    ) -> None:
        inputs = with_epilogue(epilogue, draw(rng, shape, dtype))
        outputs = run(operation, inputs, relu="relu" in epilogue)
        if operation == "train":
            exact = reference.moments(reference.wide(rows(inputs.x)))
            var = (exact.m2 / inputs.count).astype(np.float64)
            inputs = inputs.replace(mean=exact.mean.astype(np.float64), var=var)
        _assert_nearly_all_rounded(outputs["y"], exact_output(inputs, relu="relu" in epilogue))

    @over("relu", (False, True))
    @over("dtype", STORAGE)
    @over("shape", MANY_CHANNELS)
    def test_nearly_all_gradients_are_rounded_right(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, relu: bool
    ) -> None:
        inputs = draw(rng, shape, dtype)
        outputs = run("backward_input", inputs, relu=relu)
        _assert_nearly_all_rounded(outputs["dx"], exact_gradient(inputs, relu=relu))


def _scaled(rng: np.random.Generator, x: Floats, factors: NDArray[np.float64]) -> Inputs:
    """Return inputs for y = x * factors."""
    zero = np.zeros(x.shape[1])
    return draw(rng, x.shape, x.dtype.type, eps=0.0).replace(
        x=x, residual=None, mean=zero, var=zero + 1.0, weight=factors, bias=zero
    )


def _assert_rounded(y: Floats, exact: NDArray[np.float64]) -> None:
    """Raise unless every element is the exact one, correctly rounded."""
    values, expected = _as_stored(y, exact)
    wrong = values != expected
    if wrong.any():
        first = tuple(map(int, np.argwhere(wrong)[0]))
        raise AssertionError(
            f"y: {wrong.sum()} of {wrong.size} results are not the exact one rounded to nearest "
            f"even; the first, at {first}, is {values[first]!r} for {exact[first]!r} instead of "
            f"{expected[first]!r}"
        )


def _assert_nearly_all_rounded(result: Floats, exact: reference.Wide) -> None:
    values, expected = _as_stored(rows(result), exact.astype(np.float64))
    right = np.count_nonzero(values == expected) / values.size
    assert right >= spec.ROUNDED_RIGHT_16BIT, f"only {right:.5f} are rounded right"


def _as_stored(y: Floats, exact: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return both in float64, the second rounded as the first should be, infinity a number."""
    storage = FORMATS[y.dtype.name]
    return storage.limited(y.astype(np.float64)), storage.rounded(exact)
