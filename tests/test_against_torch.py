"""bnfast and torch side by side: random layers, each driven through a random sequence of calls.

torch runs in float64, whatever the dtypes of the bnfast layer, on the same numbers. Outputs,
running statistics and gradients are compared within the rounding of bnfast's dtypes: the bounds are
those of `bnfast.spec`, plus what torch's own float64 sums can be off by, plus what the running
statistics have gathered from earlier roundings (`Pair.drift`). A call succeeds in both or fails in
both, but for `DIFFERENCES`, which are by design.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from backends_here import AVAILABLE, over_backends, y_ulps
from strided import backwards, permuted, stepped

import bnfast
import bnfast.functional as F
from bnfast import spec

torch = pytest.importorskip("torch", minversion="2.13")

LAYERS, BATCHES, CALLS = 3_000, 6, 9
UNIT = 2.0**-53
VECTORS = ("weight", "bias", "running_mean", "running_var")
KINDS = {
    2: ("BatchNorm1d", (2, 3)),
    4: ("BatchNorm2d", (4,)),
    5: ("BatchNorm3d", (5,)),
}


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """The arrays are small: a team of threads takes a hundred times as long, on a busy machine."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


def half_ulp(dtype):
    return float(np.finfo(dtype).eps) / 2


def error_of(call):
    """Return (result, None), or (None, what was raised)."""
    try:
        return call(), None
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        return None, error


def lay(rng, values):
    """Return the values in some memory layout."""
    if rng.random() < 0.5:
        values = permuted(tuple(rng.permutation(values.ndim)))(values)
    if rng.random() < 0.2:
        values = backwards((int(rng.integers(values.ndim)),))(values)
    if rng.random() < 0.2:
        values = stepped(int(rng.integers(values.ndim)))(values)
    return values


class Pair:
    """A bnfast layer and its torch twin, with the same random arguments.

    ``drift`` bounds, for each vector of running statistics, how far the two may be apart.
    """

    def __init__(self, rng, backend):
        self.rng = rng
        name, self.ndims = KINDS[rng.choice(list(KINDS))]
        self.channels = int(rng.choice([0, 1, 2, 3, 8, 17], p=[0.02, 0.2, 0.2, 0.28, 0.2, 0.1]))
        self.dtype = rng.choice([np.float32, np.float64], p=[0.7, 0.3])
        arguments = {
            "eps": float(rng.choice([1e-5, 1e-3, 0.5, 0.0], p=[0.6, 0.2, 0.15, 0.05])),
            "momentum": rng.choice([0.1, None, 0.0, 1.0, 0.7, -0.5, 1.7]),
            "affine": bool(rng.random() < 0.7),
            "track_running_stats": bool(rng.random() < 0.8),
            "bias": bool(rng.random() < 0.8),
        }
        self.layer = getattr(bnfast, name)(
            self.channels,
            **arguments,
            dtype=self.dtype,
            activation=rng.choice([None, "relu"]),
            backend=backend,
        )
        self.twin = getattr(torch.nn, name)(self.channels, **arguments, dtype=torch.float64)
        self.compared = self.unbounded = 0
        self.steps = []
        self.forget()
        self.zero_grad()

    # ---- calls ----------------------------------------------------------------------------------

    def step(self):
        """Do one random thing to both."""
        actions = {
            self.forward: 12,
            self.toggle_mode: 3,
            self.toggle_tracking: 1,
            self.assign: 2,
            self.reload: 1,
            self.reset: 1,
            self.zero_grad: 1,
            self.change_momentum: 1,
        }
        weights = np.array(list(actions.values()), float)
        action = self.rng.choice(list(actions), p=weights / weights.sum())
        self.steps.append(action.__name__)
        action()
        self.compare_state()

    def toggle_mode(self):
        mode = bool(self.rng.random() < 0.6)
        assert self.layer.train(mode) is self.layer
        self.twin.train(mode)

    def toggle_tracking(self):
        flag = not self.layer.track_running_stats
        self.layer.track_running_stats = self.twin.track_running_stats = flag

    def change_momentum(self):
        self.layer.momentum = self.twin.momentum = self.rng.choice([None, 0.3])

    def assign(self):
        """Write random numbers to every vector, in place or by assignment."""
        for name in VECTORS:
            if getattr(self.layer, name) is not None:
                self.set_both(name, self.random_vector(name))

    def reload(self):
        """Load one's state into the other."""
        if self.rng.random() < 0.5:
            state = {name: value.numpy() for name, value in self.twin.state_dict().items()}
            self.layer.load_state_dict(state)
        # Either way torch takes the numbers of the layer: loading rounded them to its dtype.
        self.write_twin(self.layer.state_dict())
        self.forget()

    def reset(self):
        method = self.rng.choice(["reset_running_stats", "reset_parameters"])
        if self.layer.track_running_stats and self.layer.running_mean is None:
            assert not DIFFERENCES["reset"].torch_accepts
            self.layer.reset_running_stats()
            return
        getattr(self.layer, method)()
        getattr(self.twin, method)()
        if self.layer.track_running_stats:
            self.forget()

    def zero_grad(self):
        self.layer.zero_grad()
        self.twin.zero_grad()
        self.grad_bound = {"weight": 0.0, "bias": 0.0}

    def forward(self):
        """Call both on the same input; go on to the gradients if both accept it."""
        rng, layer = self.rng, self.layer
        x, dtype = self.random_input()
        residual = None
        if rng.random() < 0.3:
            residual = lay(rng, rng.normal(0, 3, x.shape).astype(dtype))
        out = lay(rng, np.empty(x.shape, dtype)) if rng.random() < 0.2 else None
        before = layer.state_dict()
        twin_before = {name: value.clone() for name, value in self.twin.state_dict().items()}
        used_mean, used_var = layer.running_mean, layer.running_var
        uses_batch = layer.training or used_mean is None

        wide = torch.tensor(np.array(x, np.float64, order="C"), requires_grad=True)
        y, error = error_of(lambda: layer(x, residual=residual, out=out))
        twin_y, twin_error = error_of(lambda: self.twin(wide))
        difference = self.difference(x)
        self.steps.append(f"{'train' if layer.training else 'eval'} {x.shape} {dtype.__name__}")
        if difference is not None:
            expected = DIFFERENCES[difference]
            assert (error is None) == expected.bnfast_accepts, (difference, error)
            assert (twin_error is None) == expected.torch_accepts, (difference, twin_error)
        else:
            assert (error is None) == (twin_error is None), (error, twin_error)
        if error is not None or twin_error is not None:
            assert error is None or isinstance(error, (ValueError, TypeError, RuntimeError))
            if error is not None:
                self.assert_unchanged(before)
            else:
                layer.load_state_dict(before)
            # torch counts a call that it then refuses.
            self.write_twin(twin_before)
            return

        assert y.dtype == dtype
        assert y.shape == x.shape
        assert out is None or y is out
        statistics = self.statistics(wide.detach().numpy(), uses_batch, used_mean, used_var)
        self.compare_output(y, twin_y, residual, statistics)
        if layer.training:
            self.move_drift(statistics)
        if rng.random() < 0.6:
            self.compare_gradients(x, y, wide, twin_y, residual is not None, statistics)

    def difference(self, x):
        """Return the name of the difference by design that a call on ``x`` meets, or None."""
        if x.ndim not in self.ndims:
            return None
        batch_statistics = self.layer.training or self.layer.running_mean is None
        affine = self.layer.weight is not None or self.layer.bias is not None
        if x.shape[1] != self.channels:
            if self.channels == 0 and affine and x.size == 0:
                return None
            if batch_statistics and self.layer.eps == 0.0:
                return None
            one = np.prod(x.shape[:1] + x.shape[2:]) == 1
            knows = any(
                getattr(self.layer, name) is not None
                for name in (VECTORS if self.passes_buffers() else VECTORS[:2])
            )
            if (one and batch_statistics) or (knows and x.size):
                return None
            return "channels"
        if self.channels == 0:
            accepted = np.prod(x.shape[:1] + x.shape[2:]) != 1 and self.layer.eps > 0.0
            if (accepted or not batch_statistics) and affine:
                return "no channels"
        return None

    def passes_buffers(self):
        return not self.layer.training or self.layer.track_running_stats

    # ---- numbers --------------------------------------------------------------------------------

    def random_vector(self, name):
        sign = self.rng.choice([-1.0, 1.0], self.channels)
        size = 10.0 ** self.rng.uniform(-2, 2, self.channels)
        return (size if name == "running_var" else size * sign).astype(self.dtype)

    def random_input(self):
        """Return an input that is in nine of ten cases a proper one, and its dtype."""
        rng = self.rng
        ndim = int(rng.choice(self.ndims))
        channels, kind = self.channels, rng.random()
        if kind < 0.03:
            channels += 1
        elif kind < 0.06:
            ndim = 9 - ndim
        batch = int(rng.choice([0, 1, 2, 3, 7], p=[0.05, 0.25, 0.25, 0.25, 0.2]))
        spatial = rng.integers(1, {2: 2, 3: 70, 4: 9, 5: 5}.get(ndim, 2), max(ndim - 2, 0))
        if spatial.size:
            if rng.random() < 0.1:
                spatial[:] = 1
            elif rng.random() < 0.05:
                spatial[rng.integers(spatial.size)] = 0
        shape = (batch, channels, *(int(n) for n in spatial))
        along = (slice(None), *[None] * (len(shape) - 2))
        std = 10.0 ** rng.uniform(-2, 2, channels)
        mean = std * 10.0 ** rng.uniform(0, 3, channels) * rng.choice([-1, 1], channels)
        dtype = rng.choice([np.float32, np.float64], p=[0.7, 0.3])
        x = (rng.normal(size=shape) * std[along] + mean[along]).astype(dtype)
        if channels and rng.random() < 0.05:
            x[:, 0] = np.mean(x[:, 0]) if x[:, 0].size else 0
        return lay(rng, x), dtype

    def set_both(self, name, value):
        if self.rng.random() < 0.5:
            setattr(self.layer, name, value)
        else:
            getattr(self.layer, name)[...] = value
        with torch.no_grad():
            getattr(self.twin, name).copy_(torch.tensor(value))
        if name in self.drift:
            self.drift[name][:] = 0.0

    def write_twin(self, state):
        """Write numbers to torch's tensors. Its load_state_dict may ask for a counter it lacks."""
        with torch.no_grad():
            for name, tensor in self.twin.state_dict(keep_vars=True).items():
                tensor.copy_(torch.as_tensor(state[name]))

    def forget(self):
        self.drift = {name: np.zeros(self.channels) for name in VECTORS[2:]}

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

    # ---- comparisons ----------------------------------------------------------------------------

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


class Difference(NamedTuple):
    """A call that one of the two accepts and the other does not, and why that is wanted."""

    reason: str
    bnfast_accepts: bool
    torch_accepts: bool
    on_bnfast: Callable[[], object]
    on_torch: Callable[[], object]


ONES = np.ones((2, 3, 4, 4), np.float32)
BARE = {"affine": False, "track_running_stats": False}


def gradient_of_other_dtype_in_torch():
    y = torch.nn.BatchNorm2d(3)(torch.tensor(ONES))
    y.backward(torch.ones(y.shape, dtype=torch.float64))


def gradient_of_other_dtype_in_bnfast():
    layer = bnfast.BatchNorm2d(3)
    layer.backward(layer(ONES).astype(np.float64))


def late_tracking(layer):
    layer.track_running_stats = True
    layer.reset_running_stats()


DIFFERENCES = {
    "dtypes": Difference(
        "any dtype of x goes with any dtype of parameters and running statistics",
        True,
        False,
        lambda: bnfast.BatchNorm2d(3, dtype=np.float32)(ONES.astype(np.float64)),
        lambda: torch.nn.BatchNorm2d(3)(torch.tensor(ONES, dtype=torch.float64)),
    ),
    "channels": Difference(
        "the channels of x are always counted, also where no vector could fail to fit",
        False,
        True,
        lambda: bnfast.BatchNorm2d(4, **BARE)(ONES),
        lambda: torch.nn.BatchNorm2d(4, **BARE)(torch.tensor(ONES)),
    ),
    "channels of an empty batch": Difference(
        "the channels of x are always counted, also where nothing is computed",
        False,
        True,
        lambda: bnfast.BatchNorm2d(4)(ONES[:0]),
        lambda: torch.nn.BatchNorm2d(4)(torch.tensor(ONES[:0])),
    ),
    "no channels": Difference(
        "a layer without channels passes empty arrays, as a batch without samples does",
        True,
        False,
        lambda: bnfast.BatchNorm2d(0)(ONES[:, :0]),
        lambda: torch.nn.BatchNorm2d(0)(torch.tensor(ONES[:, :0])),
    ),
    "reset": Difference(
        "a layer that was told too late to track has no running statistics to reset",
        True,
        False,
        lambda: late_tracking(bnfast.BatchNorm2d(3, **BARE)),
        lambda: late_tracking(torch.nn.BatchNorm2d(3, **BARE)),
    ),
    "dtype of dy": Difference(
        "a gradient of another dtype than x is a slip that would cost a silent copy",
        False,
        True,
        gradient_of_other_dtype_in_bnfast,
        gradient_of_other_dtype_in_torch,
    ),
    "eps at construction": Difference(
        "an eps that no call would accept is refused where it is written",
        False,
        True,
        lambda: bnfast.BatchNorm2d(3, eps=-1.0),
        lambda: torch.nn.BatchNorm2d(3, eps=-1.0),
    ),
    "eps that is not finite": Difference(
        "it makes every output NaN, or equal to the bias",
        False,
        True,
        lambda: F.batch_norm(ONES, None, None, training=True, eps=np.inf),
        lambda: torch.nn.functional.batch_norm(
            torch.tensor(ONES), None, None, training=True, eps=np.inf
        ),
    ),
    "shape of vectors": Difference(
        "vectors have shape (C,), not any shape with C elements",
        False,
        True,
        lambda: F.batch_norm(ONES, np.ones(3), np.ones(3), np.ones((1, 3))),
        lambda: torch.nn.functional.batch_norm(
            torch.tensor(ONES), torch.ones(3), torch.ones(3), torch.ones(1, 3)
        ),
    ),
    "one axis": Difference(
        "an array of one axis has no channels, empty or not",
        False,
        True,
        lambda: F.batch_norm(np.ones(0, np.float32), np.ones(0), np.ones(0)),
        lambda: torch.nn.functional.batch_norm(torch.ones(0), torch.ones(0), torch.ones(0)),
    ),
    "mode": Difference(
        "train() takes what counts as true",
        True,
        False,
        lambda: bnfast.BatchNorm2d(3).train(1),
        lambda: torch.nn.BatchNorm2d(3).train(1),
    ),
}
"""Every difference by design in what is accepted; the random sequences meet some of them."""


@pytest.mark.parametrize("name", DIFFERENCES)
def test_differences_by_design(name):
    difference = DIFFERENCES[name]
    for call, accepts in (
        (difference.on_bnfast, difference.bnfast_accepts),
        (difference.on_torch, difference.torch_accepts),
    ):
        _, error = error_of(call)
        assert (error is None) == accepts, error
    assert difference.bnfast_accepts != difference.torch_accepts


def test_a_refused_call_is_counted_by_torch_alone():
    layer, twin = bnfast.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    one = ONES[:1, :, :1, :1]
    assert isinstance(error_of(lambda: layer(one))[1], ValueError)
    assert isinstance(error_of(lambda: twin(torch.tensor(one)))[1], ValueError)
    assert (layer.num_batches_tracked, int(twin.num_batches_tracked)) == (0, 1)


def test_backward_belongs_to_the_last_training_forward(rng):
    """torch differentiates the output that it is given; a bnfast layer the last one it trained."""
    x, other = rng.normal(size=(2, 4, 3)), rng.normal(size=(4, 3))
    layer, twin = bnfast.BatchNorm1d(3, dtype=np.float64), torch.nn.BatchNorm1d(3).double()
    dy = rng.normal(size=(4, 3))
    wide = torch.tensor(x[1], requires_grad=True)
    for batch in x:
        layer(batch)
    layer.eval()(other)
    for batch in (torch.tensor(x[0]), wide):
        y = twin(batch)
    twin.eval()(torch.tensor(other))
    y.backward(torch.tensor(dy))
    np.testing.assert_allclose(layer.backward(dy), wide.grad.numpy(), rtol=1e-9, atol=1e-12)


@over_backends
@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_layers(rng, batch, backend, record_property):
    layers = -(-LAYERS // (BATCHES * len(AVAILABLE)))
    compared = unbounded = 0
    for number in range(layers):
        pair = Pair(rng, backend)
        try:
            for _ in range(CALLS):
                pair.step()
        except Exception as error:
            error.add_note(f"layer {number}: {pair.layer!r}, after: {'; '.join(pair.steps)}")
            raise
        compared += pair.compared
        unbounded += pair.unbounded
    record_property("layers", layers)
    record_property("values", compared)
    # Next to a running variance of -eps no digit of the result is certain.
    assert unbounded < compared / 500
