"""Ctrl-C at any moment: a layer's state is that before the call or that after it, never between."""

from __future__ import annotations

import signal
import threading
import time

import numpy as np
import pytest
from backends_here import over_backends

import bnfast
from bnfast import threads
from bnfast.testing.bounds import assert_same_bits

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no timers")
TRIES = 400


@pytest.fixture
def interrupt_after():
    """Return a function that sends this process one Ctrl-C after so many seconds."""

    def start(seconds):
        signal.setitimer(signal.ITIMER_REAL, seconds)

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield start
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def state_of(layer):
    state = layer.state_dict()
    for name in ("grad_weight", "grad_bias"):
        if getattr(layer, name) is not None:
            state[name] = getattr(layer, name).copy()
    return state


def same(one, other):
    return all(np.array_equal(value, other.get(name)) for name, value in one.items())


def test_state_is_never_between_two_calls(rng, interrupt_after):
    layer = bnfast.BatchNorm2d(3)
    x = rng.normal(size=(2, 3, 4, 4)).astype(np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)
    layer(x)
    layer.grad_weight = layer.grad_bias = np.zeros(3, np.float32)
    interrupted = 0
    for _ in range(TRIES):
        before = state_of(layer)
        calls = []
        try:
            interrupt_after(float(rng.uniform(5e-6, 3e-4)))
            while True:
                calls.append(None)
                layer(x)
                layer.backward(dy)
        except KeyboardInterrupt:
            interrupted += 1
        expected = bnfast.BatchNorm2d(3)
        expected.load_state_dict({name: before[name] for name in expected.state_dict()})
        expected.grad_weight, expected.grad_bias = before["grad_weight"], before["grad_bias"]
        possible = [before]
        for _ in calls:
            expected(x)
            possible.append(state_of(expected))
            expected.backward(dy)
            possible.append(state_of(expected))
        found = state_of(layer)
        assert any(same(found, state) for state in possible[-5:])
        # And the layer goes on: its last forward can be differentiated.
        assert layer.backward(dy).shape == x.shape
        layer.grad_weight = layer.grad_bias = np.zeros(3, np.float32)
    assert interrupted == TRIES


@over_backends
def test_a_long_call_is_interrupted_when_it_returns(rng, interrupt_after, backend):
    layer = bnfast.BatchNorm2d(64, backend=backend)
    x = rng.normal(size=(16, 64, 56, 56)).astype(np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)
    layer(x)  # whatever is to be compiled
    layer.backward(dy)
    layer.zero_grad()
    start = time.perf_counter()
    y = layer(x)
    length = time.perf_counter() - start
    dx = layer.backward(dy)
    before = state_of(layer)

    def call():
        interrupt_after(length / 3)
        layer(2 * x)
        time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        call()
    after_it = state_of(layer)
    if same(before, after_it):  # else it came a moment too late
        layer.zero_grad()
        assert_same_bits("the gradient of the call before", layer.backward(dy), dx)
    layer.load_state_dict(bnfast.BatchNorm2d(64).state_dict())
    assert_same_bits("a later call", layer(x), y)


def test_a_call_in_another_thread_is_not_disturbed(rng, interrupt_after):
    layer = bnfast.BatchNorm2d(64).eval()
    x = rng.normal(size=(32, 64, 56, 56)).astype(np.float32)
    expected, results = layer(x), []
    thread = threading.Thread(target=lambda: results.append(layer(x)))

    def wait():
        interrupt_after(0.003)
        time.sleep(5)

    thread.start()
    with pytest.raises(KeyboardInterrupt):
        wait()
    thread.join()
    assert_same_bits("the call that went on", results[0], expected)


def test_the_threads_are_free_after_an_interrupt(rng, interrupt_after):
    layer = bnfast.BatchNorm2d(8).eval()
    x = rng.normal(size=(8, 8, 64, 64)).astype(np.float32)
    y = np.empty_like(x)  # an interrupt is lost in what runs when a new array dies
    lost = 0
    with bnfast.use_num_threads(2):
        for _ in range(100):
            try:
                interrupt_after(float(rng.uniform(1e-5, 1e-3)))
                while True:
                    layer(x, out=y)
            except KeyboardInterrupt:
                pass
            claimed = threads.claim(x.size)
            threads.free[True] = True
            lost += claimed == 1
    assert lost == 0
