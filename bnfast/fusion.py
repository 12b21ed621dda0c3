"""Batch norm folded into the convolution or the linear layer before it, as torch's helpers do.

In eval mode batch norm is an affine map of each channel, and so is what comes before it: the two
are one. Everything is computed in float64 and rounded once, to the dtype that was given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfast import channels
from bnfast.checks import check_eps
from bnfast.spec import Channels
from bnfast.state import check_variance


def fuse_conv_bn_weights(
    conv_w: NDArray[Any],
    conv_b: NDArray[Any] | None,
    bn_rm: NDArray[Any],
    bn_rv: NDArray[Any],
    bn_eps: float,
    bn_w: NDArray[Any] | None,
    bn_b: NDArray[Any] | None,
    transpose: bool = False,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return weight and bias of a convolution that does its own and the batch norm after it.

    Parameters
    ----------
    conv_w : ndarray, shape (C, in, ...), or (in, C, ...) with ``transpose``
        The convolution's weight; any floating dtype, bfloat16 included.
    conv_b : ndarray, shape (C,), or None
        Its bias.
    bn_rm, bn_rv : ndarray, shape (C,)
        Running mean and variance of the batch norm.
    bn_eps : float
        Its eps.
    bn_w, bn_b : ndarray, shape (C,), or None
        Its weight and bias; None means 1 and 0.
    transpose : bool
        Whether the weight is that of a transposed convolution.

    Returns
    -------
    weight : ndarray
        Shape and dtype of ``conv_w``.
    bias : ndarray, shape (C,)
        The dtype of ``conv_b``, or of ``conv_w`` where that is None.

    Raises
    ------
    ValueError
        For shapes that do not fit, a bad eps, and a variance that is NaN or, with eps, not above 0.
    TypeError
        For weights that are not floating.

    Notes
    -----
    With ``scale = bn_w / sqrt(bn_rv + bn_eps)``, the weight is ``conv_w * scale`` and the bias
    ``(conv_b - bn_rm) * scale + bn_b``. The arguments are those of
    ``torch.nn.utils.fusion.fuse_conv_bn_weights``.

    Examples
    --------
    A convolution of one pixel is a matrix product:

    >>> rng = np.random.default_rng(0)
    >>> w, x = rng.normal(size=(4, 3)), rng.normal(size=(10, 3))
    >>> bn = bnfast.BatchNorm1d(4)
    >>> _ = bn(x @ w.T)
    >>> _ = bn.eval()
    >>> fused_w, fused_b = bnfast.fuse_conv_bn_weights(
    ...     w, None, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    ... )
    >>> np.allclose(x @ fused_w.T + fused_b, bn(x @ w.T))
    True
    """
    weight = _floating(conv_w, "conv_w")
    axis = 1 if transpose else 0
    if weight.ndim < 2:
        raise ValueError(f"conv_w should have at least 2 dimensions, got shape {weight.shape}")
    return _fused(weight, axis, conv_b, "conv_b", bn_rm, bn_rv, bn_eps, bn_w, bn_b)


def fuse_linear_bn_weights(
    linear_w: NDArray[Any],
    linear_b: NDArray[Any] | None,
    bn_rm: NDArray[Any],
    bn_rv: NDArray[Any],
    bn_eps: float,
    bn_w: NDArray[Any] | None,
    bn_b: NDArray[Any] | None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return weight and bias of a linear layer that does its own and the batch norm after it.

    Parameters
    ----------
    linear_w : ndarray, shape (C, in)
        The linear layer's weight; any floating dtype, bfloat16 included.
    linear_b : ndarray, shape (C,), or None
        Its bias.
    bn_rm, bn_rv, bn_eps, bn_w, bn_b
        As in `fuse_conv_bn_weights`.

    Returns
    -------
    weight, bias : ndarray
        As `fuse_conv_bn_weights` returns them.

    Raises
    ------
    ValueError, TypeError
        As `fuse_conv_bn_weights`.

    Examples
    --------
    >>> w = np.array([[1.0, 2.0]], np.float32)
    >>> one = np.ones(1, np.float32)
    >>> bnfast.fuse_linear_bn_weights(w, one, 3 * one, 4 * one, 0.0, None, None)
    (array([[0.5, 1. ]], dtype=float32), array([-1.], dtype=float32))
    """
    weight = _floating(linear_w, "linear_w")
    if weight.ndim != 2:
        raise ValueError(f"linear_w should have shape (C, in), got {weight.shape}")
    return _fused(weight, 0, linear_b, "linear_b", bn_rm, bn_rv, bn_eps, bn_w, bn_b)


def _fused(
    weight: NDArray[Any],
    axis: int,
    bias: Any,
    bias_name: str,
    bn_rm: Any,
    bn_rv: Any,
    bn_eps: float,
    bn_w: Any,
    bn_b: Any,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Fold a batch norm into a weight whose axis ``axis`` counts the channels."""
    count = weight.shape[axis]
    mean = channels.pack(channels.as_array(bn_rm, "bn_rm"), 0.0, count, "bn_rm")
    var = channels.pack(channels.as_array(bn_rv, "bn_rv"), 1.0, count, "bn_rv")
    scale = channels.pack(bn_w, 1.0, count, "bn_w")
    shift = channels.pack(bn_b, 0.0, count, "bn_b")
    bias_dtype = weight.dtype if bias is None else _floating(bias, bias_name).dtype
    own_bias = channels.pack(bias, 0.0, count, bias_name)
    check_eps(bn_eps, training=False)
    check_variance(var, "bn_rv")
    if not (var + bn_eps > 0).all():
        raise ValueError(f"bn_rv should be above -bn_eps, {-bn_eps}, got {var.min()}")
    scale /= np.sqrt(var + bn_eps)
    across = scale.reshape([-1 if at == axis else 1 for at in range(weight.ndim)])
    return (
        _rounded(weight.astype(np.float64) * across, weight.dtype),
        _rounded((own_bias - mean) * scale + shift, bias_dtype),
    )


def _floating(array: Any, name: str) -> NDArray[Any]:
    """Return an array; raise TypeError unless its numbers are floating."""
    array = channels.as_array(array, name)
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name} should be floating, got dtype {array.dtype}")
    floating: NDArray[Any] = array
    return floating


def _rounded(exact: NDArray[np.float64] | Channels, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return float64 numbers in ``dtype``, rounded to nearest once.

    The cast of ml_dtypes to bfloat16 goes by way of float32, and rounds twice: 1 + 2**-8 + 2**-40
    becomes 1. Here float32 is rounded to odd on the way, which leaves the second rounding right:
    Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008.
    """
    if dtype.name != "bfloat16":
        return exact.astype(dtype)
    single = exact.astype(np.float32)
    inexact = np.isfinite(single) & (single != exact)
    away = inexact & (np.abs(single) > np.abs(exact))
    bits = single.view(np.uint32)  # the next number towards 0 is one bit pattern lower
    bits -= away
    bits |= inexact
    return single.astype(dtype)
