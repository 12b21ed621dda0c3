"""A backend in one file: NumPy, one channel at a time, the channels shared out among threads.

The contract, with the types and the meaning of every argument, is `bnfast.spec.Kernels`. Both array
forms, (N, C, S) and (M, C), have the channels on axis 1, so `x[:, c]` is one channel of either.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bnfast.backends.host_arrays import accepts, empty, view  # noqa: F401  the array hooks


def unavailable():
    return None  # or one sentence: what is missing, and what to install


def instruction_set():
    return "numpy"


def moments(x, *, mean, m2, num_threads):
    def one(c):
        values = wide(x, c)
        first = mean_of(values)
        mean[c] = first + mean_of(values - first)  # takes back the rounding of the first sum
        m2[c] = np.square(values - mean[c]).sum()

    each_channel(one, x, num_threads)


def normalize(x, mean, var, weight, bias, eps, residual, *, y, relu, num_threads):
    def one(c):
        scale = weight[c] / np.sqrt(var[c] + eps)
        result = ((wide(x, c) - mean[c]) * scale + bias[c]).astype(y.dtype)
        if residual is not None:
            result += residual[:, c]
        y[:, c] = np.maximum(result, 0) if relu else result  # maximum() lets NaN pass

    each_channel(one, x, num_threads)


def train(x, weight, bias, eps, residual, *, y, mean, m2, relu, num_threads):
    moments(x, mean=mean, m2=m2, num_threads=num_threads)
    var = m2 / count_of(x)
    normalize(x, mean, var, weight, bias, eps, residual, y=y, relu=relu, num_threads=num_threads)


def backward_sums(dy, x, y, mean, invstd, *, sum_dy, sum_dy_xhat, relu, num_threads):
    def one(c):
        g, xhat = behind_relu(dy, y, c), (wide(x, c) - mean[c]) * invstd[c]
        sum_dy[c], sum_dy_xhat[c] = g.sum(), (g * xhat).sum()

    each_channel(one, x, num_threads)


def backward_input(
    dy, x, y, mean, invstd, weight, sum_dy, sum_dy_xhat, count, *, dx, dresidual, relu, num_threads
):
    def one(c):
        g, xhat = behind_relu(dy, y, c), (wide(x, c) - mean[c]) * invstd[c]
        dx[:, c] = weight[c] * invstd[c] * (g - (sum_dy[c] + xhat * sum_dy_xhat[c]) / count)
        if dresidual is not None:
            dresidual[:, c] = g

    each_channel(one, x, num_threads)


def backward(
    dy, x, y, mean, invstd, weight, *, dx, dresidual, sum_dy, sum_dy_xhat, relu, num_threads
):
    sums = {"sum_dy": sum_dy, "sum_dy_xhat": sum_dy_xhat}
    out = {"dx": dx, "dresidual": dresidual}
    how = {"relu": relu, "num_threads": num_threads}
    backward_sums(dy, x, y, mean, invstd, **sums, **how)
    backward_input(dy, x, y, mean, invstd, weight, **sums, count=count_of(x), **out, **how)


def each_channel(one, x, num_threads):
    """Call `one(c)` for every channel. Which thread does it has no influence on the result."""

    def quietly(c):
        with np.errstate(all="ignore"):  # NaN and inf are data: a kernel does not complain
            one(c)

    if num_threads == 1:
        for c in range(x.shape[1]):
            quietly(c)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(quietly, range(x.shape[1])))  # list() raises what a thread raised


def wide(x, c):
    """Return channel c in float64, as a contiguous copy, which NumPy sums in pairs."""
    return x[:, c].astype(np.float64, order="C")


def behind_relu(dy, y, c):
    return wide(dy, c) if y is None else np.where(y[:, c] > 0, wide(dy, c), 0.0)


def mean_of(values):
    return values.sum() / max(values.size, 1)


def count_of(x):
    return max(x[:, :1].size, 1)
