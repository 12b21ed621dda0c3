"""What a kernel must survive: NaN and inf, extreme magnitudes, nothing at all, any old memory."""

# ruff: noqa: D102  (the name of a test is its description)

from __future__ import annotations

import numpy as np

from bnfast.spec import Floats
from bnfast.testing.backward import BackwardTests
from bnfast.testing.bounds import assert_same_bits, assert_same_outputs
from bnfast.testing.cases import (
    ALL_DTYPES,
    DTYPES,
    EMPTY_SHAPES,
    LARGE_SHAPES,
    OPERATIONS,
    SHAPES,
    Inputs,
    Shape,
    draw,
    over,
)
from bnfast.testing.forward import ForwardTests
from bnfast.testing.guard import Outputs, Run, arguments_of
from bnfast.testing.reference import limits, positive, rows

POISONS = (float("nan"), float("inf"), float("-inf"))
POISONED_SHAPES: tuple[Shape, ...] = ((3, 5, 67), (203, 5), (61, 37), (9, 3, 8191), (70001, 3))


class RobustnessTests(ForwardTests, BackwardTests):
    """Extreme data and dirty memory."""

    @over("operation", OPERATIONS)
    @over("dtype", ALL_DTYPES)
    @over("shape", SHAPES + LARGE_SHAPES)
    def test_out_is_wholly_overwritten(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, operation: str
    ) -> None:
        inputs = draw(rng, shape, dtype)
        one, other = (run(operation, inputs, relu=True, prefill=p) for p in (np.nan, 7.0))
        assert_same_outputs("OUT prefilled with NaN against 7", one, other)
        assert not any(np.isnan(values).any() for values in one.values())

    @over("operation", OPERATIONS)
    @over("dtype", ALL_DTYPES)
    @over("shape", ((3, 5, 67), (203, 5), (9, 2, 8191), (70001, 3)))
    def test_inputs_are_left_alone(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, operation: str
    ) -> None:
        # The guard compares every input of every call; this test gives the finding a name.
        inputs = draw(rng, shape, dtype)
        for relu in (False, True):
            run(operation, inputs, relu=relu)

    @over("operation", OPERATIONS)
    @over("dtype", ALL_DTYPES)
    @over("shape", POISONED_SHAPES)
    def test_nan_and_inf_stay_in_their_channel(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, operation: str
    ) -> None:
        inputs = draw(rng, shape, dtype)
        clean = _by_channel(run(operation, inputs, relu=True))
        channel = int(rng.integers(shape[1]))
        others = np.arange(shape[1]) != channel
        names = set(arguments_of(operation)[0]) - {"eps", "count"}
        for poison in POISONS if inputs.x.size < 10**5 else POISONS[:1]:
            for argument in sorted(names):
                values = getattr(inputs, argument).copy()
                if values.ndim == 1:
                    values[channel] = poison
                else:
                    row = np.moveaxis(values, 1, 0)[channel]
                    row.flat[rng.choice([0, row.size - 1, int(rng.integers(row.size))])] = poison
                poisoned = run(operation, inputs.replace(**{argument: values}), relu=True)
                for name, result in _by_channel(poisoned).items():
                    assert_same_bits(
                        f"{name} of the other channels, with {poison} in {argument}",
                        result[others],
                        clean[name][others],
                    )

    @over("poison", POISONS)
    @over("dtype", ALL_DTYPES)
    @over("shape", POISONED_SHAPES)
    def test_nan_and_inf_poison_the_whole_of_their_channel_in_training(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, poison: float
    ) -> None:
        inputs = draw(rng, shape, dtype).replace(weight=np.ones(shape[1]))
        x, channel = inputs.x.copy(), int(rng.integers(shape[1]))
        row = np.moveaxis(x, 1, 0)[channel]
        row.flat[int(rng.integers(row.size))] = poison
        outputs = run("train", inputs.replace(x=x), relu=True)
        assert not np.isfinite(outputs["mean"][channel])
        assert not np.isfinite(outputs["m2"][channel])
        assert np.isnan(rows(outputs["y"])[channel]).all()
        sums = run("backward_sums", inputs.replace(dy=x), relu=False)
        assert not np.isfinite(sums["sum_dy"][channel])
        assert not np.isfinite(sums["sum_dy_xhat"][channel])

    @over("dtype", ALL_DTYPES)
    @over("shape", ((3, 5, 67), (203, 5)))
    def test_relu_passes_nan(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type
    ) -> None:
        inputs = draw(rng, shape, dtype)
        clean = run("normalize", inputs, relu=True)["y"]
        holes = rng.random(shape) < 0.2
        for argument in ("x", "residual"):
            values = np.where(holes, dtype(np.nan), getattr(inputs, argument))
            y = run("normalize", inputs.replace(**{argument: values}), relu=True)["y"]
            assert np.array_equal(np.isnan(y), holes), f"NaN in {argument} must come out as NaN"
            assert_same_bits(f"y beside the NaN in {argument}", y[~holes], clean[~holes])

    @over("dtype", ALL_DTYPES)
    @over("shape", ((3, 5, 67), (203, 5)))
    def test_relu_of_infinities(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type
    ) -> None:
        inputs = draw(rng, shape, dtype)
        below, above = rng.random(shape) < 0.1, rng.random(shape) < 0.1
        residual = np.where(below, dtype(-np.inf), np.where(above, dtype(np.inf), inputs.residual))
        y = run("normalize", inputs.replace(residual=residual), relu=True)["y"]
        assert (y[below] == 0).all(), "the ReLU of -inf is 0"
        assert np.isposinf(y[above & ~below].astype(np.float64)).all()

    @over("operation", ("normalize", "train"))
    @over("dtype", ALL_DTYPES)
    @over("shape", ((3, 5, 67), (203, 5)))
    def test_relu_of_minus_zero_is_zero(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, operation: str
    ) -> None:
        inputs = draw(rng, shape, dtype)
        minus = np.full(shape[1], -0.0)
        nothing: Floats = np.full(shape, -0.0, dtype)
        inputs = inputs.replace(residual=nothing, weight=minus, bias=minus)
        y = run(operation, inputs, relu=True)["y"]
        assert_same_bits("y", y, np.zeros(shape, dtype))

    @over("dtype", ALL_DTYPES)
    @over("shape", ((3, 5, 67), (203, 5)))
    def test_gradient_is_masked_where_y_is_not_positive(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type
    ) -> None:
        inputs = draw(rng, shape, dtype)
        kinds: Floats = np.array([np.nan, -0.0, 0.0, -1.0, 1e-45, 1.0], dtype)
        y = kinds[rng.integers(len(kinds), size=shape)]
        open_to = np.where(positive(y), dtype(1), dtype(0))
        # What is masked does not count, be it inf.
        dy = np.where(positive(y), inputs.dy, dtype(np.inf))
        self.check_backward(run, inputs.replace(y=y, dy=inputs.dy), relu=True)
        barred = self.check_backward(run, inputs.replace(y=y, dy=dy), relu=True)
        same = run("backward", inputs.replace(y=open_to, dy=inputs.dy), relu=True)
        assert_same_outputs("mask by y against mask by the sign of y", barred, same)

    @over("size", (1e-40, 1e-30, 1e-10, 1e10, 1e30, 1e38))
    @over("dtype", DTYPES)
    @over("shape", ((3, 8, 67), (203, 8)))
    def test_magnitude_of_x(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, size: float
    ) -> None:
        inputs = draw(rng, shape, dtype, size=size, ratio=0.1).replace(residual=None)
        self.check_normalize(run, inputs, relu=False)
        self.check_train(run, inputs, relu=False)
        self.check_backward(run, inputs, relu=False)

    @over("size", (1e-40, 1e-30, 1e-10))
    @over("dtype", DTYPES)
    @over("shape", ((3, 8, 67), (203, 8)))
    def test_tiny_x_without_eps(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, size: float
    ) -> None:
        inputs = draw(rng, shape, dtype, size=size, ratio=0.1, eps=0.0).replace(residual=None)
        self.check_normalize(run, inputs, relu=False)
        self.check_train(run, inputs, relu=False)

    @over("size", (1.0, 1e3))
    @over("dtype", DTYPES)
    @over("shape", ((3, 8, 67), (203, 8)))
    def test_subnormal_weight(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, size: float
    ) -> None:
        inputs = draw(rng, shape, dtype, size=size, ratio=1.0).replace(residual=None)
        inputs = inputs.replace(weight=rng.choice([-1e-40, 1e-40], 8), bias=np.zeros(8))
        y = self.check_normalize(run, inputs, relu=False)["y"]
        assert np.count_nonzero(y) > 0.9 * y.size, "subnormal results were flushed to 0"
        self.check_train(run, inputs, relu=False)

    @over("operation", OPERATIONS)
    @over("dtype", ALL_DTYPES)
    @over("shape", EMPTY_SHAPES)
    def test_empty(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, operation: str
    ) -> None:
        for relu in (False, True):
            for name, values in run(operation, draw(rng, shape, dtype), relu=relu).items():
                assert not values.any(), f"{name} of no elements must be 0"

    @over("operation", OPERATIONS)
    @over("dtype", ALL_DTYPES)
    def test_data_raises_nothing(
        self, run: Run, rng: np.random.Generator, dtype: type, operation: str
    ) -> None:
        inputs = draw(rng, (3, 4, 67), dtype, eps=0.0)
        x = inputs.x.copy()
        x[:, 0] = [[np.nan], [np.inf], [-np.inf]]
        x[:, 1], x[:, 2] = limits(x.dtype)
        x[:, 3] = 0
        extreme = np.array([0.0, 1e-300, 1e300, np.inf])
        inputs = inputs.replace(x=x, var=extreme, invstd=extreme[::-1].copy())
        for shaped in (inputs, inputs.replace(**_one_plane(inputs))):
            with np.errstate(all="raise"):
                run(operation, shaped, relu=True)

    @over("operation", OPERATIONS)
    @over("shape", ((5, 3), (4, 64, 3136)))
    def test_subnormals_still_work_after_a_call(
        self, run: Run, rng: np.random.Generator, shape: Shape, operation: str
    ) -> None:
        run(operation, draw(rng, shape, np.float32), relu=True)
        # A kernel that sets the processor to flush subnormals changes the caller's arithmetic.
        assert np.float32(1e-38) / np.float32(16) > 0
        assert np.float64(1e-307) / np.float64(16) > 0


def _by_channel(outputs: Outputs) -> Outputs:
    """Return outputs with the channels in front."""
    return {name: values if values.ndim == 1 else rows(values) for name, values in outputs.items()}


def _one_plane(inputs: Inputs) -> Outputs:
    """Return the arrays of one channels-first sample as channels-last ones."""
    arrays = {name: getattr(inputs, name) for name in ("x", "residual", "dy", "y")}
    return {name: np.ascontiguousarray(rows(values).T) for name, values in arrays.items()}
