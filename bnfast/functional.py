"""Batch normalisation as functions, in the argument order of ``torch.nn.functional``.

The way of a call: admit the array, check every argument, plan the layout, choose the kernels, run
them. Nothing is written before everything is checked. The second half of that way is in
`bnfast.packed`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfast import channels, layout, packed, registry, threads
from bnfast.checks import (
    admit,
    check_apart,
    check_both_running,
    check_eps,
    check_running,
    is_relu,
)
from bnfast.deferred import Deferred
from bnfast.moments import Moments
from bnfast.packed import Gradients
from bnfast.spec import Channels

__all__ = [
    "Gradients",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_with_stats",
    "moments",
]


def batch_norm(
    x: Any,
    running_mean: NDArray[Any] | None,
    running_var: NDArray[Any] | None,
    weight: NDArray[Any] | None = None,
    bias: NDArray[Any] | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: NDArray[Any] | None = None,
    activation: str | None = None,
    out: NDArray[Any] | None = None,
    backend: str | None = None,
) -> NDArray[Any]:
    """Normalise each channel of ``x``, as ``torch.nn.functional.batch_norm`` does.

    Parameters
    ----------
    x : ndarray of float32, float64, float16 or bfloat16, shape (N, C, ...)
        The input; any strides. With the last two the arithmetic is float32's or wider, and every
        result is rounded once, to the dtype of x; bfloat16 is that of the package ml_dtypes. It
        may live on a GPU: as an array of CuPy, torch or Numba, or as any other with
        ``__cuda_array_interface__`` or DLPack. ``residual`` and ``out`` are then on the same GPU,
        and all vectors of one number per channel in host memory, as NumPy arrays. For a dask array
        see `bnfast.interop.dask.batch_norm`.
    running_mean, running_var : ndarray, shape (C,), or None
        Both or neither. In training they are updated in place where given:
        ``new = (1 - momentum) * old + momentum * batch``, with the unbiased batch variance.
        Otherwise they are what ``x`` is normalised with.
    weight, bias : ndarray, shape (C,), or None
        The affine parameters, of any real dtype; None means 1 and 0.
    training : bool
        Whether to normalise with the statistics of this batch (the biased variance).
    momentum : float
        The weight of the new value.
    eps : float
        Added to the variance.
    residual : ndarray like ``x``, or None
        Added to the normalised result.
    activation : None or "relu"
        Applied last.
    out : ndarray like ``x``, or None
        Where to write the result; may be ``x`` or ``residual`` itself.
    backend : str, optional
        A backend's name, or several, separated by commas, in order of preference.

    Returns
    -------
    ndarray
        ``out``, or a new array of the shape, dtype and layout of ``x``. For an ``x`` on a GPU, of
        its library; of Numba where that is none of the three.

    Raises
    ------
    ValueError
        For shapes that do not fit, one value per channel in training, a bad eps or activation, or
        an ``out`` that overlaps an input without being it.
    TypeError
        For dtypes that are not accepted, arrays of several devices, or of a device and the host.
    MemoryError
        If the host or the GPU has no memory for the result. Nothing is changed then.
    RuntimeError
        For a torch tensor on a GPU that requires grad, outside ``torch.no_grad()``, and on a stream
        that records a CUDA graph.

    Examples
    --------
    >>> import numpy as np, bnfast.functional as F
    >>> x = np.array([[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]], np.float32)
    >>> F.batch_norm(x, None, None, training=True).round(3)
    array([[[-1.464, -0.878, -0.293]],
    <BLANKLINE>
           [[ 0.293,  0.878,  1.464]]], dtype=float32)
    """
    try:
        x = admit(x, None, backend)
    except Deferred as deferred:
        y: NDArray[Any] = deferred.engine.batch_norm(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            residual=residual,
            activation=activation,
            out=out,
            backend=backend,
        )
        return y
    count = x.shape[1]
    relu = is_relu(activation)
    check_eps(eps, training)
    momentum = float(momentum)
    packed_weight = channels.pack(weight, 1.0, count, "weight")
    packed_bias = channels.pack(bias, 0.0, count, "bias")
    if not training:
        if running_mean is None or running_var is None:
            missing = "running_mean" if running_mean is None else "running_var"
            raise ValueError(
                f"{missing} must be defined in evaluation mode: pass it, or training=True to use "
                "the statistics of this batch"
            )
        mean = channels.pack(running_mean, 0.0, count, "running_mean")
        var = channels.pack(running_var, 1.0, count, "running_var")
        return packed.normalize(
            x, mean, var, packed_weight, packed_bias, eps, residual, relu, out, backend
        )
    check_both_running(running_mean, running_var)
    statistics = np.empty((4, count))
    if running_mean is not None and running_var is not None:
        check_running(running_mean, count, "running_mean")
        check_running(running_var, count, "running_var")
        check_apart(out, {"running_mean": running_mean, "running_var": running_var})
        statistics[0], statistics[1] = running_mean, running_var
    mean, m2 = statistics[2], statistics[3]
    y, n = packed.train(x, packed_weight, packed_bias, mean, m2, eps, residual, relu, out, backend)
    if n and running_mean is not None:
        channels.update_running(statistics, n, momentum, running_mean, running_var)
    return y


def batch_norm_with_stats(
    x: Any,
    weight: NDArray[Any] | None = None,
    bias: NDArray[Any] | None = None,
    eps: float = 1e-5,
    *,
    residual: NDArray[Any] | None = None,
    activation: str | None = None,
    out: NDArray[Any] | None = None,
    backend: str | None = None,
) -> tuple[NDArray[Any], Channels, Channels]:
    """Normalise ``x`` with its own statistics, and return what the backward pass needs of them.

    Parameters
    ----------
    x, weight, bias, eps, residual, activation, out, backend
        As in `batch_norm`.

    Returns
    -------
    y : ndarray
        The normalised input.
    mean, invstd : ndarray of float64, shape (C,)
        The batch mean and ``1 / sqrt(biased variance + eps)``.
    """
    x = admit(x, None, backend)
    count = x.shape[1]
    relu = is_relu(activation)
    check_eps(eps, training=True)
    packed_weight = channels.pack(weight, 1.0, count, "weight")
    packed_bias = channels.pack(bias, 0.0, count, "bias")
    mean, m2 = np.empty(count), np.empty(count)
    y, n = packed.train(x, packed_weight, packed_bias, mean, m2, eps, residual, relu, out, backend)
    return y, mean, channels.invstd(m2, n, eps)


def batch_norm_backward(
    dy: Any,
    x: Any,
    weight: NDArray[Any] | None,
    mean: NDArray[Any],
    invstd: NDArray[Any],
    *,
    training: bool = True,
    activation: str | None = None,
    y: NDArray[Any] | None = None,
    residual: bool = False,
    out: NDArray[Any] | None = None,
    backend: str | None = None,
) -> Gradients:
    """Return the gradients of `batch_norm` for the output gradient ``dy``.

    Parameters
    ----------
    dy, x : ndarray, shape (N, C, ...)
        The gradient of the output, and the input of the forward call; same shape and dtype.
    weight : ndarray, shape (C,), or None
        As in the forward call.
    mean, invstd : ndarray, shape (C,)
        What ``x`` was normalised with (see `batch_norm_with_stats`).
    training : bool
        Whether they were the batch's own. If not (eval mode), they count as constants.
    activation : None or "relu"
        As in the forward call; "relu" needs ``y``.
    y : ndarray like ``x``, or None
        The output of the forward call: the gradient passes where ``y > 0``.
    residual : bool
        Whether to return the gradient of a residual as well.
    out : ndarray like ``x``, or None
        Where to write ``dx``; may be ``dy`` itself.
    backend : str, optional
        As in `batch_norm`.

    Returns
    -------
    Gradients
        ``dx, dweight, dbias, dresidual``.

    Notes
    -----
    With ``g`` the gradient behind the activation and n elements per channel::

        dbias = sum(g)        dweight = sum(g * xhat)
        dx = weight * invstd * (g - (dbias + xhat * dweight) / n)      (training)
        dx = weight * invstd * g                                       (eval)

    Ioffe and Szegedy, "Batch Normalization", 2015, section 3.
    """
    x = admit(x, None, backend)
    count = x.shape[1]
    relu = is_relu(activation)
    if relu and y is None:
        raise ValueError('activation="relu" needs y, the output of the forward call')
    packed_weight = channels.pack(weight, 1.0, count, "weight")
    return packed.backward(
        dy,
        x,
        y if relu else None,
        channels.as_channels(mean, count, "mean"),
        channels.as_channels(invstd, count, "invstd"),
        packed_weight,
        training,
        residual,
        out,
        backend,
    )


def moments(x: Any, *, backend: str | None = None) -> Moments:
    """Return count, mean and sum of squared deviations of each channel of ``x``.

    Parameters
    ----------
    x : ndarray of float32, float64, float16 or bfloat16, shape (N, C, ...)
        The input; any strides. For a dask array see `bnfast.interop.dask.moments`.
    backend : str, optional
        As in `batch_norm`.

    Returns
    -------
    Moments
        In float64, ready to be merged with those of other batches.
    """
    try:
        x = admit(x, None, backend)
    except Deferred as deferred:
        promised: Moments = deferred.engine.moments(x, backend=backend)
        return promised
    kernels = registry.choose(backend, x)
    plan = layout.plan(x.shape, x.strides, x.dtype)
    x_form = kernels.view(x, plan)
    mean, m2 = np.empty(x.shape[1]), np.empty(x.shape[1])
    threads.run(kernels.moments, x.size, x_form, mean=mean, m2=m2)
    return Moments(plan.count, mean, m2)
