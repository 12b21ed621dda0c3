"""One array of more than 2^31 elements, normalised in place: 8.6 GB, seconds per run.

Element i of the flat array is ``pattern[i % PERIOD]``, of a prime period, so that a wrapped index
reads another value, and an element that is skipped keeps its own. The pattern has few digits: the
statistics of a channel follow exactly from prefix sums of integers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from backends_here import AVAILABLE, y_ulps

import bnfast
from bnfast import spec

PERIOD = 65_521
SIDE = 18_920
BATCH, CHANNELS, PLANE = 2, 3, SIDE * SIDE
SIZE = BATCH * CHANNELS * PLANE
NEEDED = 4 * SIZE + 2**30


def available_memory():
    """Return the bytes that can be had without swapping; None if the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def prefix(values):
    """Return sums of the first k integers of ``values``, repeated without end, as a function."""
    sums = np.concatenate([[0], np.cumsum(values)])
    return lambda k: int(sums[-1]) * (k // PERIOD) + int(sums[k % PERIOD])


def moments_of(channel, integers):
    """Return mean and biased variance of a channel of the channels-first array."""
    first, second = prefix(integers), prefix(integers.astype(np.int64) ** 2)
    starts = [(n * CHANNELS + channel) * PLANE for n in range(BATCH)]
    count = BATCH * PLANE
    total = sum(first(start + PLANE) - first(start) for start in starts)
    squares = sum(second(start + PLANE) - second(start) for start in starts)
    # In whole numbers up to the last step: count * squares has 80 bits.
    return total / count / 256, (count * squares - total * total) / count**2 / 65_536


def places(rng):
    """Return flat indices: at random, and around every border that an index can stumble over."""
    borders = [0, 2**29, 2**30, 2**31, SIZE, *(run * PLANE for run in range(BATCH * CHANNELS))]
    near = np.concatenate([np.arange(border - 99, border + 100) for border in borders])
    every = np.concatenate([near, rng.integers(0, SIZE, 200_000)])
    return every[(every >= 0) & (every < SIZE)]


# Not numpy: its backend makes several float64 copies.
@pytest.mark.slow
@pytest.mark.parametrize("backend", [name for name in AVAILABLE if name != "numpy"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_in_place_beyond_32_bits(rng, backend, channels_last):
    """Channels-first in training, channels-last in eval mode."""
    memory = available_memory()
    if memory is not None and memory < NEEDED:
        pytest.skip(f"needs {NEEDED / 1e9:.1f} GB of memory, {memory / 1e9:.1f} GB are available")
    assert SIZE > 2**31
    integers = rng.integers(-1024, 1025, PERIOD) + 300
    pattern = (integers / 256).astype(np.float32)
    flat = np.empty(SIZE, np.float32)
    whole = SIZE - SIZE % PERIOD
    flat[:whole].reshape(-1, PERIOD)[...] = pattern
    flat[whole:] = pattern[: SIZE - whole]

    layer = bnfast.BatchNorm2d(CHANNELS, momentum=1.0, dtype=np.float64, backend=backend)
    layer.weight, layer.bias = np.array([1.5, -0.25, 30.0]), np.array([0.1, -7.0, 2.0])
    at = places(rng)
    if channels_last:
        layer.eval()
        layer.running_mean = mean = np.array([1.0, -2.0, 1.17])
        layer.running_var = var = np.array([4.0, 0.3, 17.0])
        x = flat.reshape(BATCH, SIDE, SIDE, CHANNELS).transpose(0, 3, 1, 2)
        channel = at % CHANNELS
    else:
        x = flat.reshape(BATCH, CHANNELS, SIDE, SIDE)
        mean, var = np.array([moments_of(c, integers) for c in range(CHANNELS)]).T
        channel = at // PLANE % CHANNELS
    y = layer(x, out=x)
    assert y is x

    if not channels_last:
        count = BATCH * PLANE
        np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-13)
        np.testing.assert_allclose(layer.running_var, var * (count / (count - 1)), rtol=1e-13)
    xhat = (pattern[at % PERIOD] - mean[channel]) / np.sqrt(var[channel] + layer.eps)
    weight, bias = layer.weight[channel], layer.bias[channel]
    exact = xhat * weight + bias
    ulp = np.spacing(spec.output_scale(xhat, weight, bias, 0.0, exact).astype(np.float32))
    error = np.abs(flat[at] - exact) / ulp
    assert error.max() <= y_ulps(backend), at[error.argmax()]
