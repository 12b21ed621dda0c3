"""Are moments, normalize and train right: within the bounds, and alike where they must be."""

# ruff: noqa: D102  (the name of a test is its description)

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfast.testing import reference
from bnfast.testing.bounds import (
    assert_moments,
    assert_output,
    assert_same_bits,
    assert_same_outputs,
)
from bnfast.testing.cases import (
    ALL_DTYPES,
    DTYPES,
    EPILOGUES,
    LARGE_SHAPES,
    OUTLIERS,
    RATIOS,
    SHAPES,
    STORAGE,
    Inputs,
    Outliers,
    Shape,
    draw,
    draw_outliers,
    over,
)
from bnfast.testing.guard import Outputs, Run
from bnfast.testing.reference import rows, wide

CONSTANT_SHAPES: tuple[Shape, ...] = ((3, 5, 49), (1, 5, 1), (9, 5, 8191), (147, 5), (70001, 5))
RATIO_SHAPES: tuple[Shape, ...] = ((3, 4, 61), (183, 4), (3, 8, 1025), (2051, 8))


class ForwardTests:
    """Values of the forward kernels."""

    fma: bool

    def check_normalize(self, run: Run, inputs: Inputs, *, relu: bool) -> Outputs:
        """Run ``normalize`` and check y."""
        outputs = run("normalize", inputs, relu=relu)
        self._check_output(outputs, inputs, wide(inputs.mean), wide(inputs.var), relu=relu)
        return outputs

    def check_train(self, run: Run, inputs: Inputs, *, relu: bool) -> Outputs:
        """Run ``train`` and check y and the moments."""
        outputs = run("train", inputs, relu=relu)
        x = wide(rows(inputs.x))
        exact = reference.moments(x)
        assert_moments(outputs, exact, x, inputs.x.dtype)
        self._check_output(outputs, inputs, exact.mean, exact.m2 / x.shape[1], relu=relu)
        return outputs

    def _check_output(
        self,
        outputs: Outputs,
        inputs: Inputs,
        mean: reference.Wide,
        var: reference.Wide,
        *,
        relu: bool,
    ) -> None:
        xhat = reference.standardize(wide(rows(inputs.x)), mean, var, inputs.eps)
        residual = None if inputs.residual is None else wide(rows(inputs.residual))
        weight, bias = wide(inputs.weight), wide(inputs.bias)
        exact = reference.affine(xhat, weight, bias, residual, relu=relu)
        deviations = mean / np.sqrt(var + wide(inputs.eps))
        assert_output(outputs["y"], exact, xhat, inputs, deviations, fma=self.fma)

    @over("dtype", ALL_DTYPES)
    @over("shape", SHAPES + LARGE_SHAPES)
    def test_moments(self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type) -> None:
        inputs = draw(rng, shape, dtype)
        x = wide(rows(inputs.x))
        assert_moments(run("moments", inputs), reference.moments(x), x, inputs.x.dtype)

    @over("dtype", DTYPES)
    @over("outliers", OUTLIERS)
    def test_moments_where_outliers_come_first(
        self, run: Run, rng: np.random.Generator, outliers: Outliers, dtype: type
    ) -> None:
        inputs = draw_outliers(rng, outliers, dtype)
        x = wide(rows(inputs.x))
        assert_moments(run("moments", inputs), reference.moments(x), x, inputs.x.dtype)

    @over("epilogue", EPILOGUES)
    @over("dtype", ALL_DTYPES)
    @over("shape", SHAPES)
    def test_normalize(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, epilogue: str
    ) -> None:
        inputs = with_epilogue(epilogue, draw(rng, shape, dtype))
        self.check_normalize(run, inputs, relu="relu" in epilogue)

    @over("epilogue", EPILOGUES)
    @over("dtype", ALL_DTYPES)
    @over("shape", SHAPES)
    def test_train(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, epilogue: str
    ) -> None:
        inputs = with_epilogue(epilogue, draw(rng, shape, dtype))
        self.check_train(run, inputs, relu="relu" in epilogue)

    @over("dtype", ALL_DTYPES)
    @over("shape", LARGE_SHAPES)
    def test_normalize_large(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type
    ) -> None:
        self.check_normalize(run, draw(rng, shape, dtype), relu=True)

    @over("dtype", ALL_DTYPES)
    @over("shape", LARGE_SHAPES)
    def test_train_large(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type
    ) -> None:
        self.check_train(run, draw(rng, shape, dtype), relu=True)

    @over("ratio", RATIOS)
    @over("dtype", DTYPES)
    @over("shape", RATIO_SHAPES)
    def test_mean_over_std(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, ratio: float
    ) -> None:
        inputs = draw(rng, shape, dtype, ratio=ratio).replace(residual=None)
        self.check_normalize(run, inputs, relu=False)
        self.check_train(run, inputs, relu=False)

    @over("epilogue", EPILOGUES)
    @over("dtype", ALL_DTYPES)
    @over("shape", SHAPES + LARGE_SHAPES)
    def test_train_has_the_bits_of_moments_then_normalize(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, epilogue: str
    ) -> None:
        relu = "relu" in epilogue
        inputs = with_epilogue(epilogue, draw(rng, shape, dtype))
        fused = run("train", inputs, relu=relu)
        separate = run("moments", inputs)
        then = inputs.replace(mean=separate["mean"], var=separate["m2"] / inputs.count)
        separate |= run("normalize", then, relu=relu)
        assert_same_outputs("train against moments and normalize", fused, separate)

    @over("operation", ("normalize", "train"))
    @over("dtype", ALL_DTYPES)
    @over("shape", SHAPES + LARGE_SHAPES)
    def test_residual_and_relu_have_the_bits_of_separate_steps(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, operation: str
    ) -> None:
        inputs = draw(rng, shape, dtype)
        affine = run(operation, inputs.replace(residual=None))["y"]
        # 16-bit storage is rounded after the residual alone.
        added = run(operation, inputs)["y"] if dtype in STORAGE else affine + inputs.residual
        # Adding 0 makes -0 a 0: the contract does not say which of them ReLU returns.
        for what, one, other in (
            ("residual", run(operation, inputs)["y"], added),
            ("relu", run(operation, inputs.replace(residual=None), relu=True)["y"], _relu(affine)),
            ("residual and relu", run(operation, inputs, relu=True)["y"], _relu(added)),
        ):
            assert_same_bits(f"fused {what}", one + dtype(0), other + dtype(0))

    @over("dtype", ALL_DTYPES)
    @over("shape", CONSTANT_SHAPES)
    def test_constant_channel(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type
    ) -> None:
        inputs = _with_stored_bias(draw(rng, shape, dtype)).replace(residual=None)
        extremes = (3e4, 1e-7) if dtype in STORAGE else (1e30, 1e-40)
        level: NDArray[Any] = np.array([100.0, -0.1, *extremes, 0.0]).astype(dtype)
        column = level[:, None] if len(shape) == 3 else level
        inputs = inputs.replace(x=np.array(np.broadcast_to(column, shape)))
        outputs = self.check_train(run, inputs, relu=False)
        if dtype is not np.float64:
            # A sum of fewer than 2^29 equal numbers of 24 bits is exact in float64, so
            # this one must be too.
            assert np.array_equal(outputs["mean"], level)
            assert np.array_equal(outputs["m2"], np.zeros(len(level)))
            bias: NDArray[Any] = inputs.bias.astype(dtype)[:, None]
            assert np.array_equal(rows(outputs["y"]), np.broadcast_to(bias, (5, inputs.count)))

    @over("operation", ("normalize", "train"))
    @over("dtype", ALL_DTYPES)
    @over("shape", ((3, 5, 61), (183, 5)))
    def test_zero_weight_gives_the_bias(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, operation: str
    ) -> None:
        inputs = _with_stored_bias(draw(rng, shape, dtype))
        inputs = inputs.replace(residual=None, weight=np.zeros(5))
        y = rows(run(operation, inputs)["y"])
        bias: NDArray[Any] = inputs.bias.astype(dtype)[:, None]
        assert np.array_equal(y, np.broadcast_to(bias, y.shape))

    @over("eps", (0.0, 1e-300, 1e-12, 0.0625, 1e10))
    @over("dtype", DTYPES)
    @over("shape", ((3, 5, 61), (183, 5)))
    def test_eps(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type, eps: float
    ) -> None:
        inputs = draw(rng, shape, dtype, eps=eps)
        self.check_normalize(run, inputs, relu=False)
        self.check_train(run, inputs, relu=False)

    @over("dtype", ALL_DTYPES)
    @over("shape", ((11, 3, 61), (671, 3), (9, 2, 8191), (70001, 3)))
    def test_moments_of_parts_merge_into_those_of_the_whole(
        self, run: Run, rng: np.random.Generator, shape: Shape, dtype: type
    ) -> None:
        inputs = draw(rng, shape, dtype, ratio=1.0)
        cut = int(rng.integers(1, shape[0]))
        (n, a), (k, b) = (
            (part.size // shape[1], run("moments", inputs.replace(x=part)))
            for part in (inputs.x[:cut], inputs.x[cut:])
        )
        # Chan, Golub and LeVeque (1983), with nothing rounded but what the kernel returned.
        delta = wide(b["mean"]) - wide(a["mean"])
        mean = wide(a["mean"]) + delta * k / (n + k)
        m2 = wide(a["m2"]) + wide(b["m2"]) + delta * delta * n * k / (n + k)
        merged = {"mean": mean.astype(np.float64), "m2": m2.astype(np.float64)}
        x = wide(rows(inputs.x))
        assert_moments(merged, reference.moments(x), x, inputs.x.dtype)

    @over("dtype", ALL_DTYPES)
    @over("plane", (1, 7, 49, 196, 1025))
    def test_sample_is_independent_of_its_batch(
        self, run: Run, rng: np.random.Generator, plane: int, dtype: type
    ) -> None:
        batch, channels = 7, 5
        inputs = draw(rng, (batch, channels, plane), dtype)
        assert inputs.residual is not None
        y = run("normalize", inputs, relu=True)["y"]
        last = _channels_last(inputs)
        y_last = run("normalize", last, relu=True)["y"]
        as_first = np.moveaxis(y_last.reshape(batch, plane, channels), 2, 1)
        assert_same_bits("channels-last against channels-first", as_first, y)
        for i in range(batch):
            alone = inputs.replace(x=inputs.x[i : i + 1], residual=inputs.residual[i : i + 1])
            assert_same_bits(
                "a sample alone against in its batch",
                run("normalize", alone, relu=True)["y"][0],
                y[i],
            )
            alone = _channels_last(alone)
            assert_same_bits(
                "a channels-last sample alone against in its batch",
                run("normalize", alone, relu=True)["y"],
                y_last[i * plane : (i + 1) * plane],
            )


def exact_output(inputs: Inputs, *, relu: bool) -> reference.Wide:
    """Return y, exactly."""
    x, mean, var = wide(rows(inputs.x)), wide(inputs.mean), wide(inputs.var)
    residual = None if inputs.residual is None else wide(rows(inputs.residual))
    xhat = reference.standardize(x, mean, var, inputs.eps)
    return reference.affine(xhat, wide(inputs.weight), wide(inputs.bias), residual, relu=relu)


def with_epilogue(epilogue: str, inputs: Inputs) -> Inputs:
    """Return ``inputs``, without the residual if that does not follow."""
    return inputs if "residual" in epilogue else inputs.replace(residual=None)


def _with_stored_bias(inputs: Inputs) -> Inputs:
    """Return ``inputs`` with a bias that their dtype holds, and so would float32 on the way."""
    return inputs.replace(bias=inputs.bias.astype(inputs.x.dtype).astype(np.float64))


def _relu(y: NDArray[Any]) -> NDArray[Any]:
    return np.where(y < 0, y.dtype.type(0), y)


def _channels_last(inputs: Inputs) -> Inputs:
    """Return the same samples in the other array form."""
    assert inputs.residual is not None
    x, residual = (
        np.ascontiguousarray(np.moveaxis(a, 1, 2)).reshape(-1, a.shape[1])
        for a in (inputs.x, inputs.residual)
    )
    return inputs.replace(x=x, residual=residual)
