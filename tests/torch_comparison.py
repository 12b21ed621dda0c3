"""A bnfast layer against its torch twin: what both computed, and how far they may be apart.

The bounds are those of `bnfast.spec`, plus what torch's own float64 sums can be off by, plus what
the running statistics have gathered from earlier roundings (``drift``).
"""

from __future__ import annotations

import numpy as np
import pytest
from backends_here import y_ulps
from strided import backwards, permuted, stepped

import bnfast.functional as F
from bnfast import spec

torch = pytest.importorskip("torch", minversion="2.13")

UNIT = 2.0**-53


def half_ulp(dtype):
    return float(np.finfo(dtype).eps) / 2


def lay(rng, values):
    """Return the values in some memory layout."""
    if rng.random() < 0.5:
        values = permuted(tuple(rng.permutation(values.ndim)))(values)
    if rng.random() < 0.2:
        values = backwards((int(rng.integers(values.ndim)),))(values)
    if rng.random() < 0.2:
        values = stepped(int(rng.integers(values.ndim)))(values)
    return values


class Comparison:
    """The comparisons of a layer and its twin, both of which a `torch_twin.Pair` makes and calls.

    ``drift`` bounds, for each vector of running statistics, how far the two may be apart;
    ``grad_bound`` does so for the gradients of the parameters. ``compared`` and ``unbounded``
    count values, the latter those whose bound is not finite.
    """

    def statistics(self, x, uses_batch, running_mean, running_var):
        """Return what xhat was made with, in float64, and its bounds."""
        rows = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1) if x.size else np.zeros((x.shape[1], 0))
        count = rows.shape[1]
        unit = (count + spec.SUM_UNITS) * UNIT
        if uses_batch and count:
            mean, var = rows.mean(axis=1), rows.var(axis=1)
            magnitude = np.abs(rows).mean(axis=1)
            mean_bound = unit * magnitude
            # An updating algorithm, such as torch's, loses digits with mean/std.
            var_bound = unit * (var + np.sqrt(var) * magnitude) + (unit * magnitude) ** 2
        elif uses_batch:
            mean, var = np.zeros(len(rows)), np.ones(len(rows))
            mean_bound = var_bound = np.zeros(len(rows))
        else:
            mean = self.twin.running_mean.numpy().copy()
            var = self.twin.running_var.numpy().copy()
            mean_bound, var_bound = self.drift["running_mean"], self.drift["running_var"]
        with np.errstate(all="ignore"):
            total = var + self.layer.eps
            invstd = 1.0 / np.sqrt(total)
            low, high = (1.0 / np.sqrt(total + sign * var_bound) for sign in (1, -1))
            invstd_bound = np.maximum(np.abs(low - invstd), np.abs(high - invstd))
            # 1/sqrt(total) is computed in two rounded steps by either.
            invstd_bound = invstd_bound + 4 * UNIT * invstd
            xhat = (rows - mean[:, None]) * invstd[:, None]
            xhat_bound = (
                (mean_bound * (invstd + invstd_bound))[:, None]
                + np.abs(rows - mean[:, None]) * invstd_bound[:, None]
                + 4 * UNIT * (1 + np.abs(mean * invstd))[:, None] * np.maximum(1, np.abs(xhat))
            )
        return {
            "rows": rows,
            "mean": mean,
            "var": var,
            "invstd": invstd,
            "xhat": xhat,
            "xhat_bound": xhat_bound,
            "mean_bound": mean_bound,
            "var_bound": var_bound,
            "uses_batch": uses_batch,
        }

    def parameter(self, name, default):
        vector = getattr(self.layer, name)
        return np.full(self.channels, default) if vector is None else vector.astype(np.float64)

    def assert_within(self, what, actual, exact, bound):
        """Both NaN is agreement. Where the bound is not finite, nothing can be said: counted."""
        with np.errstate(invalid="ignore"):
            error = np.abs(actual.astype(np.float64) - exact)
            same = (error <= bound) | (np.isnan(actual) & np.isnan(exact)) | (actual == exact)
        open_ended = ~np.isfinite(bound) & ~same
        self.compared += same.size
        self.unbounded += int(open_ended.sum())
        wrong = ~(same | open_ended)
        if wrong.any():
            at = tuple(np.argwhere(wrong)[0])
            raise AssertionError(
                f"{what}: {wrong.sum()} of {wrong.size} differ; at {at} {actual[at]!r} instead of "
                f"{exact[at]!r}, bound {np.broadcast_to(bound, wrong.shape)[at]!r}"
            )

    def assert_unchanged(self, before):
        after = self.layer.state_dict()
        assert after.keys() == before.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(after[name], value, name)

    def compare_state(self):
        state = self.layer.state_dict()
        twin_state = self.twin.state_dict()
        assert list(state) == list(twin_state)
        for name, value in state.items():
            exact = twin_state[name].numpy()
            if name in self.drift:
                self.assert_within(name, value, exact, self.drift[name])
            else:
                np.testing.assert_array_equal(value, exact, name)

    def move_drift(self, statistics):
        """Add what one update of the running statistics can be off by."""
        layer, count = self.layer, statistics["rows"].shape[1]
        if not layer.track_running_stats or layer.running_mean is None or count == 0:
            return
        momentum = layer.momentum
        factor = 1.0 / layer.num_batches_tracked if momentum is None else momentum
        bessel = count / (count - 1)
        for name, batch, batch_bound in (
            ("running_mean", statistics["mean"], statistics["mean_bound"]),
            ("running_var", bessel * statistics["var"], bessel * statistics["var_bound"]),
        ):
            new = getattr(self.twin, name).numpy()
            # Where (1 - factor) * old and factor * batch cancel, their own roundings remain.
            old_part = np.abs(new - factor * batch)
            drift = np.abs(1.0 - factor) * self.drift[name] + np.abs(factor) * batch_bound
            drift = drift + 8 * UNIT * (old_part + np.abs(factor * batch) + np.abs(new))
            self.drift[name] = drift * (1 + 1e-6) + half_ulp(self.dtype) * (np.abs(new) + drift)

    def output_bound(self, dtype, scale, growth):
        if dtype == np.float32:
            return y_ulps(self.layer.backend) * np.spacing(scale.astype(np.float32)).astype(
                np.float64
            )
        return spec.Y_UNITS_FLOAT64 * UNIT * growth[:, None] * scale

    def compare_output(self, y, twin_y, residual, statistics):
        affine = in_rows(twin_y.detach().numpy())
        added = 0.0 if residual is None else in_rows(residual).astype(np.float64)
        exact = affine + added
        if self.layer.activation == "relu":
            exact = np.where(exact < 0, 0.0, exact)
        weight, bias = self.parameter("weight", 1.0), self.parameter("bias", 0.0)
        xhat = statistics["xhat"]
        with np.errstate(all="ignore"):
            scale = spec.output_scale(xhat, weight[:, None], bias[:, None], added, exact)
            # Before a residual is added, the affine result is rounded.
            scale = np.maximum(scale, np.abs(affine))
            growth = 1.0 + np.abs(statistics["mean"] * statistics["invstd"])
            bound = self.output_bound(y.dtype, scale, growth)
            bound = bound + np.abs(weight)[:, None] * statistics["xhat_bound"] + 4 * UNIT * scale
        self.assert_within("y", in_rows(y), exact, bound)

    def compare_gradients(self, x, y, wide, twin_y, residual, statistics):
        """Compare with autograd: `backward` after a training call, else the function."""
        layer, rng = self.layer, self.rng
        dy = lay(rng, rng.normal(0.3, 1, x.shape).astype(x.dtype))
        g = np.where(y > 0, dy, x.dtype.type(0)) if layer.activation == "relu" else dy
        twin_before = {
            name: None if p.grad is None else p.grad.clone()
            for name, p in self.twin.named_parameters()
        }
        twin_y.backward(torch.tensor(np.array(g, np.float64, order="C")))
        dx_exact = in_rows(wide.grad.numpy())
        weight, invstd = self.parameter("weight", 1.0), statistics["invstd"]
        if layer.training:
            dx = layer.backward(dy)
            if residual:
                np.testing.assert_array_equal(layer.grad_residual, g)
            else:
                assert layer.grad_residual is None
        else:
            options = {"activation": layer.activation, "y": y, "backend": layer.backend}
            gradients = F.batch_norm_backward(
                dy,
                x,
                layer.weight,
                statistics["mean"],
                invstd,
                training=statistics["uses_batch"],
                residual=True,
                **options,
            )
            np.testing.assert_array_equal(gradients.dresidual, g)
            dx = gradients.dx
        assert dx.dtype == x.dtype
        assert dx.shape == x.shape
        self.steps.append("gradients")

        with np.errstate(all="ignore"):
            g, xhat = in_rows(g).astype(np.float64), statistics["xhat"]
            count = max(g.shape[1], 1)
            product = g * xhat
            mean_dy, mean_dy_xhat = g.sum(axis=1) / count, product.sum(axis=1) / count
            if not statistics["uses_batch"]:
                mean_dy, mean_dy_xhat = np.zeros((2, self.channels))
            scale = spec.gradient_scale(
                g,
                xhat,
                invstd[:, None],
                weight[:, None],
                mean_dy[:, None],
                mean_dy_xhat[:, None],
            )
            # Relative to max(1, |xhat|), how far xhat and sums over it can be off.
            size = np.maximum(1.0, np.abs(xhat))
            off = (statistics["xhat_bound"] / size).max(axis=1, initial=0.0)
            off = off + (count + spec.SUM_UNITS) * UNIT
            gathered = (np.abs(g) * size).sum(axis=1)
            spread = np.abs(g) + 4 * size * (gathered / count)[:, None]
            if x.dtype == np.float32:
                bound = spec.DX_ULPS_FLOAT32 * np.spacing(scale.astype(np.float32))
            else:
                growth = 1.0 + np.abs(statistics["mean"] * invstd)[:, None]
                bound = spec.DX_UNITS_FLOAT64 * UNIT * growth * scale
            bound = bound + np.abs(weight * invstd * off)[:, None] * spread
        self.assert_within("dx", in_rows(dx), dx_exact, bound)

        sums_bound = {"weight": 4 * off * gathered, "bias": 2 * off * np.abs(g).sum(axis=1)}
        if not layer.training:
            for name, gradient in (("weight", gradients.dweight), ("bias", gradients.dbias)):
                parameter = getattr(self.twin, name)
                if parameter is not None:
                    old = twin_before[name]
                    fresh = parameter.grad if old is None else parameter.grad - old
                    bound = sums_bound[name] + UNIT * np.abs(parameter.grad.numpy())
                    self.assert_within(f"d{name}", gradient, fresh.numpy(), bound)
                    parameter.grad = old
            return
        for name in ("weight", "bias"):
            parameter, own = getattr(self.twin, name), getattr(layer, f"grad_{name}")
            assert (parameter is None) == (own is None)
            if parameter is None:
                continue
            exact = parameter.grad.numpy()
            bound = self.grad_bound[name] + sums_bound[name]
            self.grad_bound[name] = bound + half_ulp(self.dtype) * (np.abs(exact) + bound)
            assert own.dtype == self.dtype
            self.assert_within(f"grad_{name}", own, exact, self.grad_bound[name])


def in_rows(array):
    """Return an array with the channels in front, as (C, n)."""
    array = np.asarray(array)
    channels = array.shape[1]
    per_channel = array.size // channels if channels else 0
    return np.moveaxis(array, 1, 0).reshape(channels, per_channel)
