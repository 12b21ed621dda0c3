"""Are the gradients right: the two sums, dx, the fused call, and both against differences."""

# ruff: noqa: D102  (the name of a test is its description)

from __future__ import annotations

import numpy as np

from bnfast.testing import reference
from bnfast.testing.bounds import (
    assert_gradient,
    assert_moments,
    assert_same_bits,
    assert_sums,
)
from bnfast.testing.cases import (
    ALL_DTYPES,
    DTYPES,
    LARGE_SHAPES,
    RATIOS,
    SHAPES,
    Inputs,
    Shape,
    draw,
    over,
)
from bnfast.testing.guard import Outputs, Run
from bnfast.testing.reference import Wide, positive, rows, wide

RELU = (False, True)
REPEATED_SHAPES: tuple[Shape, ...] = ((24576, 2, 2), (100001, 3))
PARTED_SHAPES: tuple[Shape, ...] = ((11, 3, 61), (671, 3), (9, 2, 8191), (70001, 3))


class BackwardTests:
    """Values of the backward kernels."""

    def check_sums(self, run: Run, inputs: Inputs, *, relu: bool) -> Outputs:
        """Run ``backward_sums`` and check both sums."""
        outputs = run("backward_sums", inputs, relu=relu)
        assert_sums(outputs, reference.backward_sums(*_terms(inputs, relu=relu)))
        return outputs

    def check_input(self, run: Run, inputs: Inputs, *, relu: bool) -> Outputs:
        """Run ``backward_input`` and check dx and dresidual."""
        outputs = run("backward_input", inputs, relu=relu)
        _check_dx(outputs, inputs, relu=relu)
        return outputs

    def check_backward(self, run: Run, inputs: Inputs, *, relu: bool) -> Outputs:
        """Run ``backward``; check its sums, and its dx as that of the sums that it returned."""
        outputs = run("backward", inputs, relu=relu)
        assert_sums(outputs, reference.backward_sums(*_terms(inputs, relu=relu)))
        sums = {name: outputs[name] for name in ("sum_dy", "sum_dy_xhat")}
        _check_dx(outputs, inputs.replace(**sums), relu=relu)
        return outputs

    @over("relu", RELU)
    @over("dtype", ALL_DTYPES)
    @over("shape", SHAPES + LARGE_SHAPES)
    def test_backward_sums(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, relu: bool
    ) -> None:
        self.check_sums(run, draw(rng, shape, dtype), relu=relu)

    @over("relu", RELU)
    @over("dtype", ALL_DTYPES)
    @over("shape", SHAPES + LARGE_SHAPES)
    def test_backward_input(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, relu: bool
    ) -> None:
        self.check_input(run, draw(rng, shape, dtype), relu=relu)

    @over("relu", RELU)
    @over("dtype", ALL_DTYPES)
    @over("shape", SHAPES + LARGE_SHAPES)
    def test_backward(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, relu: bool
    ) -> None:
        self.check_backward(run, draw(rng, shape, dtype), relu=relu)

    @over("dtype", DTYPES)
    @over("shape", REPEATED_SHAPES)
    def test_sums_where_every_sample_is_the_same(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type
    ) -> None:
        # Roundings that repeat do not cancel: a long chain of additions shows.
        inputs = draw(rng, shape, dtype)
        inputs.x[:], inputs.dy[:] = inputs.x[:1], inputs.dy[:1]
        self.check_sums(run, inputs, relu=False)
        x = wide(rows(inputs.x))
        assert_moments(run("moments", inputs), reference.moments(x), x, inputs.x.dtype)

    @over("ratio", RATIOS)
    @over("dtype", DTYPES)
    @over("shape", ((3, 8, 1025), (2051, 8)))
    def test_backward_mean_over_std(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, ratio: float
    ) -> None:
        self.check_backward(run, draw(rng, shape, dtype, ratio=ratio), relu=True)

    @over("relu", RELU)
    @over("dtype", ALL_DTYPES)
    @over("shape", ((3, 5, 61), (183, 5), (9, 2, 8191), (70001, 3)))
    def test_backward_input_in_eval_mode(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, relu: bool
    ) -> None:
        nothing = np.zeros(shape[1])
        inputs = draw(rng, shape, dtype).replace(sum_dy=nothing, sum_dy_xhat=nothing)
        self.check_input(run, inputs, relu=relu)

    @over("operation", ("backward_input", "backward"))
    @over("relu", RELU)
    @over("dtype", ALL_DTYPES)
    @over("shape", ((3, 5, 61), (183, 5), (9, 2, 8191), (70001, 3)))
    def test_dresidual_is_optional(
        self,
        run: Run,
        rng: np.random.Generator,
        shape: Shape,
        dtype: type,
        relu: bool,
        operation: str,
    ) -> None:
        inputs = draw(rng, shape, dtype)
        without = run(operation, inputs, relu=relu, dresidual=False)
        asked = run(operation, inputs, relu=relu)
        assert "dresidual" not in without
        for name, values in without.items():
            assert_same_bits(f"{name} without dresidual", values, asked[name])

    @over("dtype", ALL_DTYPES)
    @over("shape", ((3, 5, 61), (183, 5)))
    def test_count_may_exceed_the_elements_of_x(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type
    ) -> None:
        inputs = draw(rng, shape, dtype)
        for factor in (2, 1000, 2**33):
            larger = inputs.replace(
                count=inputs.count * factor,
                sum_dy=inputs.sum_dy * factor,
                sum_dy_xhat=inputs.sum_dy_xhat * factor,
            )
            self.check_input(run, larger, relu=True)
        self.check_input(run, inputs.replace(count=3 * inputs.count + 1), relu=True)

    @over("dtype", ALL_DTYPES)
    @over("shape", PARTED_SHAPES)
    def test_backward_of_parts_is_that_of_the_whole(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type
    ) -> None:
        inputs = draw(rng, shape, dtype)
        cut = int(rng.integers(1, shape[0]))
        parts = [
            inputs.replace(x=inputs.x[half], dy=inputs.dy[half], y=inputs.y[half])
            for half in (slice(None, cut), slice(cut, None))
        ]
        a, b = (run("backward_sums", part, relu=True) for part in parts)
        merged = {name: a[name] + b[name] for name in a}
        assert_sums(merged, reference.backward_sums(*_terms(inputs, relu=True)))
        # The parts keep the count of the whole, which `draw` set.
        results = [run("backward_input", part.replace(**merged), relu=True) for part in parts]
        whole = {name: np.concatenate([r[name] for r in results]) for name in results[0]}
        _check_dx(whole, inputs.replace(**merged), relu=True)

    @over("relu", RELU)
    @over("shape", ((3, 2, 5), (15, 2)))
    def test_gradients_are_those_of_train_by_finite_differences(
        self, run: Run, rng: np.random.Generator, shape: Shape, relu: bool
    ) -> None:
        step, kink = 1e-5, 1e-2
        while True:
            inputs = draw(rng, shape, np.float64, ratio=1.0, size=1.0)
            inputs = inputs.replace(weight=rng.choice([-1.5, 0.7], 2), bias=rng.uniform(-1, 1, 2))
            forward = run("train", inputs, relu=relu)
            # A step must not carry an element over the kink of ReLU.
            if np.abs(run("train", inputs)["y"]).min() > kink:
                break
        var = forward["m2"] / inputs.count
        saved = inputs.replace(
            y=forward["y"], mean=forward["mean"], invstd=1.0 / np.sqrt(var + inputs.eps)
        )
        outputs = run("backward", saved, relu=relu)

        for argument, gradient in (
            ("x", outputs["dx"]),
            ("residual", outputs["dresidual"]),
            ("weight", outputs["sum_dy_xhat"]),
            ("bias", outputs["sum_dy"]),
        ):
            value = getattr(inputs, argument)
            differences = np.empty_like(value)
            for index in np.ndindex(value.shape):
                losses = []
                for sign in (1.0, -1.0):
                    moved = value.copy()
                    moved[index] += sign * step
                    y = run("train", inputs.replace(**{argument: moved}), relu=relu)["y"]
                    losses.append((y * inputs.dy).sum())
                differences[index] = (losses[0] - losses[1]) / (2 * step)
            np.testing.assert_allclose(
                gradient, differences, rtol=1e-6, atol=1e-7, err_msg=f"gradient of {argument}"
            )


def _terms(inputs: Inputs, *, relu: bool) -> tuple[Wide, Wide]:
    """Return g and xhat, exactly."""
    g = reference.mask(wide(rows(inputs.dy)), rows(inputs.y) if relu else None)
    xhat = (wide(rows(inputs.x)) - wide(inputs.mean)[:, None]) * wide(inputs.invstd)[:, None]
    return g, xhat


def exact_gradient(inputs: Inputs, *, relu: bool) -> Wide:
    """Return dx for the sums of ``inputs``, exactly."""
    g, xhat = _terms(inputs, relu=relu)
    invstd, weight = wide(inputs.invstd), wide(inputs.weight)
    sums = wide(inputs.sum_dy), wide(inputs.sum_dy_xhat)
    return reference.backward_input(g, xhat, invstd, weight, *sums, inputs.count)


def _check_dx(outputs: Outputs, inputs: Inputs, *, relu: bool) -> None:
    exact = exact_gradient(inputs, relu=relu)
    assert_gradient(outputs["dx"], exact, *_terms(inputs, relu=relu), inputs)
    dtype = inputs.dy.dtype.type
    masked = np.where(positive(inputs.y), inputs.dy, dtype(0)) if relu else inputs.dy
    # Adding 0 makes -0 a 0: a masked element may be either.
    assert_same_bits("dresidual", outputs["dresidual"] + dtype(0), masked + dtype(0))
