"""Fuzzing sequences of calls: a layer lives any life, and agrees with plain float64 at every step.

It trains, infers, goes backward, is edited, saved and loaded, copied, frozen and reset, on any
backend and with any number of threads, and refuses bad calls. In every run a fixed number of lives
is tried; ``--fuzz-seconds N`` goes on for N seconds. ``--seed N`` draws the same again.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading

import ml_dtypes
import numpy as np
import pytest
from backends_here import AVAILABLE
from fuzzing import CACHES, assume_caches, lies, options, rounds
from hypothesis import seed
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from plain_model import Model

import bnfast
from bnfast import memory
from bnfast.testing.bounds import assert_same_bits

LIVES = 40
CLASSES = {
    2: bnfast.BatchNorm1d,
    3: bnfast.BatchNorm1d,
    4: bnfast.BatchNorm2d,
    5: bnfast.BatchNorm3d,
}
DTYPES = (np.float32, np.float32, np.float64, np.float16, ml_dtypes.bfloat16)
LENGTHS = st.sampled_from((1, 2, 3, 4, 5, 7, 8, 16, 17, 33))
SEEDS = st.integers(0, 2**32 - 1)
names = st.sampled_from((None, *AVAILABLE))


class Life(RuleBasedStateMachine):
    """One layer and its model."""

    layer: bnfast.BatchNorm2d

    @initialize(
        channels=st.sampled_from((1, 2, 3, 8, 17, 64, 65)),
        ndim=st.integers(2, 5),
        affine=st.booleans(),
        bias=st.booleans(),
        tracks=st.booleans(),
        momentum=st.sampled_from((0.1, None, 0.5, 1.0)),
        eps=st.sampled_from((1e-5, 1e-3)),
        activation=st.sampled_from((None, "relu")),
        dtype=st.sampled_from((np.float32, np.float64)),
    )
    def begin(self, channels, ndim, affine, bias, tracks, momentum, eps, activation, dtype):
        self.ndim, self.channels = ndim, channels
        self.arguments = {
            "eps": eps,
            "momentum": momentum,
            "affine": affine,
            "track_running_stats": tracks,
            "bias": bias,
            "dtype": dtype,
            "activation": activation,
        }
        self.layer = CLASSES[ndim](channels, **self.arguments)
        one, nothing = np.ones(channels), np.zeros(channels)
        self.model = Model(
            one if affine else None,
            nothing if affine and bias else None,
            nothing if tracks else None,
            one if tracks else None,
            0 if tracks else None,
            np.dtype(dtype),
            eps,
            momentum,
            tracks,
            activation is not None,
        )

    def array(self, data, number, dtype, lengths, out=False):
        """Return an array of this layer's inputs that lies anyhow."""
        rng = np.random.default_rng(number)
        shape = (lengths[0], self.channels, *lengths[1:])
        values = rng.normal(rng.normal(0, 3, (1, self.channels, *[1] * (self.ndim - 2))), 1, shape)
        return data.draw(lies(self.ndim, dtype, out=out)).lay(values.astype(dtype))

    @rule(
        data=st.data(),
        number=SEEDS,
        dtype=st.sampled_from(DTYPES),
        into=st.sampled_from(("new", "x", "residual", "other")),
        with_residual=st.booleans(),
        large=st.integers(0, 12),
        elsewhere=st.booleans(),
    )
    def call(self, data, number, dtype, into, with_residual, large, elsewhere):
        lengths = [data.draw(LENGTHS) for _ in range(self.ndim - 1)]
        while np.prod(lengths) * self.channels > 20000:
            lengths[lengths.index(max(lengths))] = 2
        if large == 12:
            lengths[0] *= 1 + 98304 // int(np.prod(lengths) * self.channels)
        x = self.array(data, number, dtype, lengths)
        residual = self.array(data, number + 1, dtype, lengths) if with_residual else None
        out = {"x": x, "residual": residual}.get(into)
        if into == "other":
            out = self.array(data, number + 2, dtype, lengths, out=True)
        if out is not None and not (out.flags.writeable and out.dtype.isnative):
            out = None
        kept_x, kept_residual = x.copy(), None if residual is None else residual.copy()
        results = []

        def run():
            results.append(self.layer(x, residual, out))

        if np.prod(lengths) == 1 and (self.model.training or self.model.running_mean is None):
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                run()
            return
        if elsewhere:
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        else:
            run()
        (y,) = results
        assert out is None or y is out
        if out is not x:
            assert_same_bits("x", x, kept_x)
        self.model.forward(kept_x, kept_residual, y)
        if self.model.training and out is x:
            self.model.saved = None

    @rule(data=st.data(), number=SEEDS)
    def backward(self, data, number):
        saved = self.model.saved
        if saved is None:
            with pytest.raises(RuntimeError, match=r"^no gradient: "):
                self.layer.backward(np.zeros((2, self.channels, 2, 2), np.float32))
            return
        shape = saved["x"].shape
        dy = self.array(data, number, saved["y"].dtype, (shape[0], *shape[2:]))
        self.model.backward(dy, self.layer.backward(dy), self.layer)

    @rule(mode=st.booleans())
    def train(self, mode):
        assert self.layer.train(mode) is self.layer
        self.model.training = mode

    @rule()
    def save_and_load(self):
        file = io.BytesIO()
        np.savez(file, **self.layer.state_dict())
        file.seek(0)
        other = CLASSES[self.ndim](self.channels, **self.arguments)
        with np.load(file, allow_pickle=False) as state:
            assert other.load_state_dict(state) == ([], [])
        self.replace(other, grads=False)
        self.model.eps, self.model.momentum = other.eps, other.momentum
        self.model.tracks = other.track_running_stats

    @rule(how=st.sampled_from((copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)))))
    def copied(self, how):
        self.replace(how(self.layer), grads=True)

    def replace(self, layer, *, grads):
        """Go on with another layer, which has no forward to differentiate."""
        before = self.layer.state_dict()
        layer.train(self.layer.training)
        self.layer, self.model.saved = layer, None
        if not grads:
            self.model.grad_weight = self.model.grad_bias = None
        after = layer.state_dict()
        assert list(before) == list(after)
        for name, value in before.items():
            assert_same_bits(name, value, after[name])

    @rule(number=SEEDS, name=st.sampled_from(("weight", "bias", "running_mean", "running_var")))
    def edit(self, number, name):
        values = np.random.default_rng(number).uniform(0.5, 2, self.channels)
        if getattr(self.layer, name) is None:
            return
        if number % 2:
            setattr(self.layer, name, values)
        else:
            getattr(self.layer, name)[...] = values
        setattr(self.model, name, values.astype(self.model.dtype).astype(np.float64))

    @rule(momentum=st.sampled_from((None, 0.0, 0.1, 1.0, -0.5)))
    def set_momentum(self, momentum):
        self.layer.momentum = self.model.momentum = momentum

    @rule(eps=st.sampled_from((1e-5, 1e-2, 1e-8)))
    def set_eps(self, eps):
        self.layer.eps = self.model.eps = eps

    @rule(tracks=st.booleans())
    def set_tracking(self, tracks):
        self.layer.track_running_stats = self.model.tracks = tracks

    @rule()
    def reset_running_stats(self):
        self.layer.reset_running_stats()
        self.forget()

    def forget(self):
        if self.model.tracks:
            if self.model.running_mean is not None:
                self.model.running_mean = np.zeros(self.channels)
                self.model.running_var = np.ones(self.channels)
            if self.model.counter is not None:
                self.model.counter = 0

    @rule()
    def reset_parameters(self):
        self.layer.reset_parameters()
        self.forget()
        self.model.weight = None if self.model.weight is None else np.ones(self.channels)
        self.model.bias = None if self.model.bias is None else np.zeros(self.channels)

    @rule()
    def zero_grad(self):
        self.layer.zero_grad()
        self.model.grad_weight = self.model.grad_bias = None

    @rule(name=names)
    def set_backend(self, name):
        bnfast.set_backend(name)

    @rule(name=names)
    def set_backend_of_layer(self, name):
        self.layer.backend = name

    @rule(number=st.sampled_from((None, 1, 2, 3, 4)))
    def set_threads(self, number):
        bnfast.set_num_threads(number)

    @rule(sizes=st.sampled_from(CACHES))
    def assume_caches(self, sizes):
        for name in AVAILABLE:
            assume_caches(name, sizes)

    @rule()
    def empty_cache(self):
        bnfast.empty_cache()
        assert memory.idle() == 0

    @precondition(lambda self: self.model.running_mean is not None)
    @rule(data=st.data(), number=SEEDS, dtype=st.sampled_from(DTYPES))
    def freeze(self, data, number, dtype):
        x = self.array(data, number, dtype, [3] * (self.ndim - 1))
        training = self.layer.training
        frozen = self.layer.freeze()
        assert_same_bits("frozen", frozen(x), self.layer.eval()(x))
        self.layer.train(training)

    @rule(
        bad=st.sampled_from(
            ("channels", "dimensions", "int32", "eps", "residual", "out", "overlap")
        ),
    )
    def refused(self, bad):
        shape = (3, self.channels, *[2] * (self.ndim - 2))
        buffer = np.ones(2 * np.prod(shape), np.float32)
        x = buffer[: np.prod(shape)].reshape(shape)
        arguments = {"x": x}
        eps = self.layer.eps
        if bad == "channels":
            arguments["x"] = np.concatenate([x, x], axis=1)
        elif bad == "dimensions":
            arguments["x"] = x[None, None]
        elif bad == "int32":
            arguments["x"] = x.astype(np.int32)
        elif bad == "eps":
            self.layer.eps = -1.0
        elif bad == "residual":
            arguments["residual"] = x[:1]
        elif bad == "out":
            arguments["out"] = x.astype(np.float64)
        else:
            arguments["out"] = buffer[1 : 1 + x.size].reshape(shape)
        with pytest.raises((ValueError, TypeError)):
            self.layer(**arguments)
        self.layer.eps = eps
        assert (buffer == 1).all()

    @rule(missing=st.booleans())
    def refused_state(self, missing):
        state = self.layer.state_dict()
        if missing or not state:
            state["unknown"] = np.ones(self.channels)
        else:
            name = next(iter(state))
            state[name] = np.ones((self.channels + 1, 2))
        with pytest.raises(ValueError, match=r"state of|should"):
            self.layer.load_state_dict(state)

    @invariant()
    def agrees(self):
        if hasattr(self, "model"):
            self.model.take(self.layer)

    def teardown(self):
        self.assume_caches(None)
        bnfast.set_backend(None)
        bnfast.set_num_threads(None)


def test_lives(request):
    for number in rounds(request.config):
        machine = type("Life", (Life,), {})
        run_state_machine_as_test(seed(number)(machine), settings=options(LIVES))
