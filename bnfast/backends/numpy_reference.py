"""The kernels as their definition reads, in float64, with NumPy alone.

This is what the other backends are measured against in spirit, and the last resort where none of
them can run: float64 throughout, on one thread, and free with memory (several copies of x).

Every function views its arrays with the channels in front, computes, and rounds at the end. float32
is rounded before a residual is added, too, as the contract has it.
"""

from __future__ import annotations

import numpy as np

from bnfast.backends.host_arrays import accepts, empty, view
from bnfast.spec import STORAGE_DTYPES, Channels, Floats

__all__ = [
    "STORAGE_DTYPES",
    "accepts",
    "backward",
    "backward_input",
    "backward_sums",
    "empty",
    "instruction_set",
    "moments",
    "normalize",
    "train",
    "unavailable",
    "view",
]


def unavailable() -> str | None:
    """NumPy is always there."""
    return None


def instruction_set() -> str:
    """Return "numpy": NumPy's own loops choose for themselves."""
    return "numpy"


def moments(x: Floats, *, mean: Channels, m2: Channels, num_threads: int) -> None:
    """See `bnfast.spec.Kernels.moments`."""
    values, count = _wide(x), _count(x)
    with np.errstate(all="ignore"):
        mean[:] = values.sum(axis=(1, 2)) / count
        # The first mean is off by the rounding of a long sum; the deviations from it tell how much.
        mean += (values - _each(mean)).sum(axis=(1, 2)) / count
        m2[:] = np.square(values - _each(mean)).sum(axis=(1, 2))


def normalize(
    x: Floats,
    mean: Channels,
    var: Channels,
    weight: Channels,
    bias: Channels,
    eps: float,
    residual: Floats | None,
    *,
    y: Floats,
    relu: bool,
    num_threads: int,
) -> None:
    """See `bnfast.spec.Kernels.normalize`."""
    with np.errstate(all="ignore"):
        scale = weight / np.sqrt(var + eps)
        affine = (_wide(x) - _each(mean)) * _each(scale) + _each(bias)
        result = affine.astype(np.float32) if y.dtype == np.float32 else affine
        if residual is not None:
            result += _channels(residual).astype(result.dtype)
        if relu:
            result = np.maximum(result, 0)
        _channels(y)[...] = result


def train(
    x: Floats,
    weight: Channels,
    bias: Channels,
    eps: float,
    residual: Floats | None,
    *,
    y: Floats,
    mean: Channels,
    m2: Channels,
    relu: bool,
    num_threads: int,
) -> None:
    """See `bnfast.spec.Kernels.train`."""
    moments(x, mean=mean, m2=m2, num_threads=num_threads)
    var = m2 / _count(x)
    normalize(x, mean, var, weight, bias, eps, residual, y=y, relu=relu, num_threads=num_threads)


def backward_sums(
    dy: Floats,
    x: Floats,
    y: Floats | None,
    mean: Channels,
    invstd: Channels,
    *,
    sum_dy: Channels,
    sum_dy_xhat: Channels,
    relu: bool,
    num_threads: int,
) -> None:
    """See `bnfast.spec.Kernels.backward_sums`."""
    with np.errstate(all="ignore"):
        g = _masked(dy, y)
        xhat = (_wide(x) - _each(mean)) * _each(invstd)
        sum_dy[:] = g.sum(axis=(1, 2))
        sum_dy_xhat[:] = (g * xhat).sum(axis=(1, 2))


def backward_input(
    dy: Floats,
    x: Floats,
    y: Floats | None,
    mean: Channels,
    invstd: Channels,
    weight: Channels,
    sum_dy: Channels,
    sum_dy_xhat: Channels,
    count: int,
    *,
    dx: Floats,
    dresidual: Floats | None,
    relu: bool,
    num_threads: int,
) -> None:
    """See `bnfast.spec.Kernels.backward_input`."""
    with np.errstate(all="ignore"):
        g = _masked(dy, y)
        xhat = (_wide(x) - _each(mean)) * _each(invstd)
        # Where the sum is 0, as in eval mode, x does not matter, not even an infinite one.
        spread = np.where(_each(sum_dy_xhat) == 0, 0.0, xhat * _each(sum_dy_xhat))
        centred = g - (_each(sum_dy) + spread) / count
        _channels(dx)[...] = _each(weight * invstd) * centred
        if dresidual is not None:
            _channels(dresidual)[...] = g


def backward(
    dy: Floats,
    x: Floats,
    y: Floats | None,
    mean: Channels,
    invstd: Channels,
    weight: Channels,
    *,
    dx: Floats,
    dresidual: Floats | None,
    sum_dy: Channels,
    sum_dy_xhat: Channels,
    relu: bool,
    num_threads: int,
) -> None:
    """See `bnfast.spec.Kernels.backward`."""
    backward_sums(
        dy,
        x,
        y,
        mean,
        invstd,
        sum_dy=sum_dy,
        sum_dy_xhat=sum_dy_xhat,
        relu=relu,
        num_threads=num_threads,
    )
    backward_input(
        dy,
        x,
        y,
        mean,
        invstd,
        weight,
        sum_dy,
        sum_dy_xhat,
        _count(x),
        dx=dx,
        dresidual=dresidual,
        relu=relu,
        num_threads=num_threads,
    )


def _channels(x: Floats) -> Floats:
    """Return a view of either form with the channels in front: (C, N, S), or (C, M, 1)."""
    return x.transpose(1, 0, 2) if x.ndim == 3 else x.T[:, :, None]


def _wide(x: Floats) -> Floats:
    """Return the same as a C-contiguous float64 copy, which NumPy sums pairwise."""
    return np.array(_channels(x), np.float64, order="C")


def _count(x: Floats) -> int:
    """Return the number of elements per channel, at least 1, so that sums of nothing are 0."""
    return max(int(x.shape[0]) * (int(x.shape[2]) if x.ndim == 3 else 1), 1)


def _each(vector: Channels) -> Floats:
    """Return a channel vector that broadcasts against (C, N, S)."""
    return vector[:, None, None]


def _masked(dy: Floats, y: Floats | None) -> Floats:
    """Return g, the gradient behind the ReLU."""
    g = _wide(dy)
    if y is not None:
        g[~(_channels(y) > 0)] = 0.0
    return g
