"""A random bnfast layer and its torch twin, driven through random sequences of the same calls.

A call succeeds in both or fails in both, but for the `torch_differences`.
"""

from __future__ import annotations

import numpy as np
import pytest
from torch_comparison import Comparison, lay
from torch_differences import DIFFERENCES, error_of

import bnfast

torch = pytest.importorskip("torch", minversion="2.13")

VECTORS = ("weight", "bias", "running_mean", "running_var")
KINDS = {
    2: ("BatchNorm1d", (2, 3)),
    4: ("BatchNorm2d", (4,)),
    5: ("BatchNorm3d", (5,)),
}


class Pair(Comparison):
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
