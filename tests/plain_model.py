"""Batch norm in plain float64, as a layer: what a fuzzed layer is compared with after every step.

It keeps what the layer should keep and computes by the formula, whole arrays at a time. Where the
layer rounds, the comparison allows for that, and the model then takes over the layer's numbers, so
that differences do not add up.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfast import spec
from bnfast.testing.reference import FORMATS

Array = NDArray[Any]


@dataclasses.dataclass
class Model:
    """The numbers and settings of a layer; vectors are float64, or None."""

    weight: Array | None
    bias: Array | None
    running_mean: Array | None
    running_var: Array | None
    counter: int | None
    dtype: Any
    eps: float
    momentum: float | None
    tracks: bool
    relu: bool
    training: bool = True
    saved: dict[str, Any] | None = None
    grad_weight: Array | None = None
    grad_bias: Array | None = None

    def forward(self, x: Array, residual: Array | None, y: Array) -> None:
        """Check ``y``, the layer's result for ``x``, and do what the call does to the layer."""
        wide = x.astype(np.float64)
        count = x.size // x.shape[1]
        batch = self.training or self.running_mean is None
        if batch:
            mean = by_channel(wide) / count
            mean += by_channel(wide - along(mean, x)) / count  # exact where all are equal
            var = by_channel(np.square(wide - along(mean, x))) / count
        else:
            mean, var = self.running_mean, self.running_var
        weight = np.ones(x.shape[1]) if self.weight is None else self.weight
        bias = np.zeros(x.shape[1]) if self.bias is None else self.bias
        with np.errstate(invalid="ignore"):  # a momentum below 0 makes variances below 0, hence NaN
            std = np.sqrt(var + self.eps)
        xhat = (wide - along(mean, x)) / along(std, x)
        exact = xhat * along(weight, x) + along(bias, x)
        added = 0.0 if residual is None else residual.astype(np.float64)
        exact = exact + added
        if self.relu:
            exact = np.maximum(exact, 0)
        scale = spec.output_scale(xhat, along(weight, x), along(bias, x), added, exact)
        growth = 1 + np.abs(along(mean / std, x))
        close("y", y, exact, 4 * unit(scale, y.dtype) + 1e-14 * growth * scale)
        if self.training and self.tracks:
            self.counter = None if self.counter is None else self.counter + 1
            self._move(mean, var * (count / (count - 1)))
        if self.training:
            self.saved = {
                "x": x.copy(),
                "y": y.copy(),
                "mean": mean,
                "var": var,
                "weight": weight,
                "eps": self.eps,
                "residual": residual is not None,
            }

    def _move(self, mean: Array, var: Array) -> None:
        factor = self.momentum
        if factor is None:
            factor = 0.0 if self.counter is None else 1 / self.counter
        if self.running_mean is not None:
            self.running_mean = (1 - factor) * self.running_mean + factor * mean
            self.running_var = (1 - factor) * self.running_var + factor * var

    def backward(self, dy: Array, dx: Array, layer: Any) -> None:
        """Check ``dx``, the layer's gradient, and take over what it added to its gradients."""
        saved = self.saved
        x, invstd = saved["x"].astype(np.float64), 1 / np.sqrt(saved["var"] + saved["eps"])
        g = dy.astype(np.float64)
        if self.relu:
            g = np.where(saved["y"].astype(np.float64) > 0, g, 0)
        xhat = (x - along(saved["mean"], x)) * along(invstd, x)
        count = x.size // x.shape[1]
        sums = by_channel(g), by_channel(g * xhat)
        factor = along(saved["weight"] * invstd, x)
        exact = factor * (g - (along(sums[0], x) + xhat * along(sums[1], x)) / count)
        scale = spec.gradient_scale(
            g,
            xhat,
            along(invstd, x),
            along(saved["weight"], x),
            along(sums[0], x) / count,
            along(sums[1], x) / count,
        )
        growth = 1 + np.abs(along(saved["mean"] * invstd, x))
        close("dx", dx, exact, 5 * unit(scale, dx.dtype) + 1e-13 * growth * scale)
        if saved["residual"]:
            close("grad_residual", layer.grad_residual, g, np.zeros(g.shape))
        else:
            assert layer.grad_residual is None
        magnitude = by_channel(np.abs(g))
        magnitudes = magnitude, by_channel(np.abs(g * xhat)) + magnitude
        self.grad_bias = self._added("bias", self.grad_bias, sums[0], magnitudes[0], layer)
        self.grad_weight = self._added("weight", self.grad_weight, sums[1], magnitudes[1], layer)

    def _added(
        self, name: str, total: Array | None, gradient: Array, magnitude: Array, layer: Any
    ) -> Array | None:
        actual = getattr(layer, f"grad_{name}")
        if getattr(self, name) is None:
            assert actual is None
            return None
        exact = gradient if total is None else total + gradient
        large = np.abs(exact) + (0.0 if total is None else np.abs(total))
        slack = 2 * unit(large, self.dtype) + 1e-11 * magnitude
        close(f"grad_{name}", actual, exact, slack)
        return actual.astype(np.float64)

    def take(self, layer: Any) -> None:
        """Check that the layer's numbers are the model's, but for rounding, and take them over."""
        for name in ("weight", "bias", "running_mean", "running_var"):
            own, actual = getattr(self, name), getattr(layer, name)
            assert (own is None) == (actual is None), name
            if own is not None:
                assert actual.dtype == self.dtype
                large = np.maximum(np.abs(own), 1.0 if name == "running_mean" else 0.0)
                close(name, actual, own, 2 * unit(large, self.dtype) + 1e-11 * large)
                setattr(self, name, actual.astype(np.float64))
        assert layer.num_batches_tracked == self.counter
        assert layer.training == self.training
        for name in ("grad_weight", "grad_bias"):
            own, actual = getattr(self, name), getattr(layer, name)
            assert (own is None) == (actual is None), name
            assert own is None or np.array_equal(own, actual), name


def along(vector: Array, x: Array) -> Array:
    """Return a vector of channels in a shape that broadcasts against ``x``."""
    return vector.reshape(1, -1, *[1] * (x.ndim - 2))


def unit(values: Array, dtype: Any) -> Array:
    """Return the distance between numbers of a dtype at ``values``."""
    dtype = np.dtype(dtype)
    if dtype.name in FORMATS:
        return FORMATS[dtype.name].spacing(values)
    return np.spacing(np.abs(values).astype(dtype)).astype(np.float64)


def by_channel(x: Array) -> Array:
    """Return the sum over each channel.

    Its elements are laid side by side, so that NumPy adds them up in pairs: one after the other,
    50,000 equal ones would be 1e-12 off.
    """
    return np.ascontiguousarray(np.moveaxis(x, 1, 0)).reshape(x.shape[1], -1).sum(axis=1)


def close(what: str, actual: Array, exact: Array, slack: Array) -> None:
    """Raise unless ``actual`` is within ``slack`` of ``exact`` everywhere."""
    assert actual.shape == exact.shape, what
    error = np.abs(actual.astype(np.float64) - exact)
    outside = ~((error <= slack) | (np.isnan(actual) & np.isnan(exact)))
    if outside.any():
        at = tuple(map(int, np.argwhere(outside)[0]))
        raise AssertionError(
            f"{what}: {outside.sum()} of {outside.size} are off; at {at} {actual[at]!r} instead of "
            f"{exact[at]!r}, which may be off by {np.broadcast_to(slack, exact.shape)[at]:.3g}"
        )
