"""BatchNorm1d, 2d and 3d: their arguments, modes, calls and gradients.

`bnfast.state` holds their numbers, `bnfast.interop` what makes one of a layer of another framework.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from numbers import Real
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bnfast import channels, packed, registry
from bnfast.channels import FLOAT64
from bnfast.checks import admit, check_both_running, check_channels, check_eps, is_relu, is_same
from bnfast.deferred import Deferred
from bnfast.device import DeviceArray
from bnfast.frozen import FrozenBatchNorm
from bnfast.interop.converters import Converters
from bnfast.spec import Channels
from bnfast.state import NEUTRAL, State

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]

_Saved: TypeAlias = tuple[
    NDArray[Any], NDArray[Any] | None, Channels, Channels, int, Channels, float, bool
]
"""What a training forward leaves for `backward`: x, y where ReLU was fused, the moments of the
batch (mean, m2, elements per channel), weight, eps, and whether there was a residual."""


class _BatchNorm(State, Converters):
    """The layer of every rank; `BatchNorm2d` documents it."""

    _ndims: ClassVar[tuple[int, ...]]
    training: bool
    _watch: Callable[[NDArray[Any]], None] | None = None
    """What is shown every input, while `bnfast.recalibrate` runs."""
    _train = staticmethod(packed.train)
    _differentiate = staticmethod(packed.backward)
    """What runs the kernels in training: a subclass may pool statistics with other processes."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        dtype: DTypeLike = np.float32,
        activation: str | None = None,
        backend: str | None = None,
    ) -> None:
        num_features = operator.index(num_features)
        if num_features < 0:
            raise ValueError(f"num_features should not be negative, got {num_features}")
        check_eps(eps, training=False)
        is_relu(activation)
        dtype = np.dtype(np.float32 if dtype is None else dtype).newbyteorder("=")
        if dtype.char not in "fd":
            raise TypeError(f"dtype should be float32 or float64, got {dtype}")
        if momentum is not None and not isinstance(momentum, Real):
            raise TypeError(f"momentum should be a number or None, got {momentum!r}")
        if backend is not None:
            registry.choose(backend)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.activation = activation
        self.backend = backend
        self.training = True
        self.num_batches_tracked: int | None = 0 if track_running_stats else None
        self.grad_weight: NDArray[Any] | None = None
        self.grad_bias: NDArray[Any] | None = None
        self.grad_residual: NDArray[Any] | None = None
        self._saved: _Saved | str = "there was no training forward yet"
        present = (affine, affine and bias, track_running_stats, track_running_stats)
        table = np.empty((4, num_features), dtype)
        table[:] = np.array(NEUTRAL)[:, None]
        self._adopt(table, present)

    def __call__(self, x: Any, residual: Any = None, out: Any = None) -> NDArray[Any]:
        """Normalise ``x``; in training mode, update the running statistics.

        Parameters
        ----------
        x : ndarray of float32, float64, float16 or bfloat16, shape (N, C, ...)
            Any strides; also on a GPU, as `bnfast.functional.batch_norm` says. Or a dask array: see
            `bnfast.interop.dask.batch_norm`.
        residual : ndarray like ``x``, optional
            Added to the normalised result, before the activation.
        out : ndarray like ``x``, optional
            Where to write the result; may be ``x`` or ``residual`` itself.

        Returns
        -------
        ndarray
            ``out``, or a new array of the shape, dtype, layout and library of ``x``.

        Raises
        ------
        ValueError, TypeError, MemoryError, RuntimeError
            For what `bnfast.functional.batch_norm` refuses. A refused call changes nothing.
        """
        try:
            x = admit(x, self._ndims, self.backend)
        except Deferred as deferred:
            return self._call_deferred(deferred, residual, out)
        check_channels(x, self.num_features)
        if self._watch is not None:
            self._watch(x)
        relu = self.activation is not None and is_relu(self.activation)
        tracked = self.training and self.track_running_stats
        _, _, running_mean, running_var = self._views
        if (running_mean is None or running_var is None) and (tracked or not self.training):
            check_both_running(running_mean, running_var)
        if not self.training and running_mean is not None:
            check_eps(self.eps, training=False)
            weight, bias, mean, var = self._packed()
            return packed.normalize(
                x, mean, var, weight, bias, self.eps, residual, relu, out, self.backend
            )
        check_eps(self.eps, training=True)
        count = None if self.num_batches_tracked is None else self.num_batches_tracked + 1
        factor = self._factor(count)
        rows = np.empty((6, self.num_features))  # those of the table, and the batch's moments
        rows[:4] = self._table
        weight, mean, m2 = rows[0], rows[4], rows[5]
        y, n = self._train(
            x, weight, rows[1], mean, m2, self.eps, residual, relu, out, self.backend
        )
        saved = self._saved
        if self.training:
            if out is not None and type(out) is not type(x):
                out = admit(out, self._ndims, self.backend)  # once more, for where it lies
            if out is not None and is_same(out, x):
                saved = "its input was overwritten by out=x"
            else:
                # y only where backward needs it: else its memory is the next call's, still cached.
                kept = y if relu else None
                saved = x, kept, mean, m2, n, weight, self.eps, residual is not None
        moved = None
        if tracked and n and running_mean is not None:
            moved = channels.moved(rows[2:], n, factor, self._table.dtype)
        # Without a call in between: Python handles an interrupt before all of this, or after.
        if tracked:
            self.num_batches_tracked = count
        if moved is not None:
            self._table[2:] = moved
        self._saved = saved
        return y

    def _call_deferred(self, deferred: Deferred, residual: Any, out: Any) -> NDArray[Any]:
        """Return the result of a call on a dask array, and update the running statistics now."""
        x, engine = deferred.collection, deferred.engine
        check_channels(engine.admit(x, self._ndims, self.backend), self.num_features)
        if self._watch is not None:
            self._watch(x)
        _, _, mean, var = self._views
        tracked = self.training and self.track_running_stats
        of_the_batch = self.training or (mean is None and var is None)
        count = None if self.num_batches_tracked is None else self.num_batches_tracked + 1
        kept = tracked or not of_the_batch
        y: NDArray[Any] = engine.batch_norm(
            x,
            mean if kept else None,
            var if kept else None,
            self.weight,
            self.bias,
            of_the_batch,
            self._factor(count),
            self.eps,
            residual=residual,
            activation=self.activation,
            out=out,
            backend=self.backend,
        )
        if tracked:
            self.num_batches_tracked = count
        if self.training:
            self._saved = "the input of the last training forward was a dask array"
        return y

    def _pooled(self, seen: Any) -> Any:
        """Return what this layer and its like in other processes saw in `bnfast.recalibrate`."""
        return seen

    def _packed(self) -> tuple[Channels, ...]:
        """Return the rows of the table in float64, packed anew if any of its bits has changed.

        To compare 64 channels takes 80 ns, to pack them 500. The rows come from the bytes that were
        compared, and are never written: calls in other threads may share them.
        """
        numbers = self._table.tobytes()
        last = self._last_packed
        if last[0] != numbers:
            table = np.frombuffer(numbers, self._table.dtype).reshape(self._table.shape)
            last = self._last_packed = (numbers, tuple(table.astype(FLOAT64)))
        return last[1]

    def _factor(self, count: int | None) -> float:
        """Return the weight in the running statistics of what is the ``count``-th batch."""
        if self.momentum is not None:
            return float(self.momentum)
        return 0.0 if count is None else 1.0 / count

    def backward(self, dy: Any) -> NDArray[Any]:
        """Return the gradient of the input of the last training forward.

        Parameters
        ----------
        dy : ndarray like the output
            Gradient of the output.

        Returns
        -------
        ndarray
            ``dx``. ``grad_weight`` and ``grad_bias`` are added to; ``grad_residual`` is set.

        Raises
        ------
        RuntimeError
            If there is no training forward to differentiate, or its input was overwritten by
            ``out=x``.

        Notes
        -----
        A forward call in eval mode saves nothing and does not count. Its gradient is
        ``bnfast.functional.batch_norm_backward(..., training=False)``.
        """
        saved = self._saved
        if isinstance(saved, str):
            raise RuntimeError(f"no gradient: {saved}")
        x, y, mean, m2, n, weight, eps, residual = saved
        if isinstance(x, DeviceArray):
            x = admit(x.array, self._ndims, self.backend)  # by now its stream may be another
        invstd = channels.invstd(m2, n, eps)
        gradients = self._differentiate(
            dy, x, y, mean, invstd, weight, True, residual, None, self.backend
        )
        dtype = self._table.dtype
        grad_weight, grad_bias = self.grad_weight, self.grad_bias
        if self._views[0] is not None:
            grad_weight = _accumulated(grad_weight, gradients.dweight, dtype)
        if self._views[1] is not None:
            grad_bias = _accumulated(grad_bias, gradients.dbias, dtype)
        # Without a call in between, as in `__call__`.
        self.grad_weight, self.grad_bias = grad_weight, grad_bias
        self.grad_residual = gradients.dresidual
        return gradients.dx

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.grad_weight = self.grad_bias = self.grad_residual = None

    def train(self, mode: bool = True) -> _BatchNorm:
        """Enter training mode (or, with False, eval mode), and return the layer."""
        self.training = bool(mode)
        return self

    def eval(self) -> _BatchNorm:
        """Enter eval mode, and return the layer."""
        return self.train(False)

    def freeze(self) -> FrozenBatchNorm:
        """Return an immutable copy for inference, with the bits of this layer in eval mode.

        Raises
        ------
        ValueError
            If the layer has no running statistics, or a ``running_var`` with NaN.
        """
        weight, bias, mean, var = self._views
        if mean is None or var is None:
            raise ValueError(
                f"{type(self).__name__} has no running statistics to freeze: "
                "in eval mode it uses those of the batch"
            )
        return FrozenBatchNorm(
            weight,
            bias,
            mean,
            var,
            self.eps,
            dtype=self._table.dtype,
            ndims=self._ndims,
            activation=self.activation,
            backend=self.backend,
        )

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running variance to 1 and the counter to 0.

        Nothing happens while ``track_running_stats`` is false.
        """
        if not self.track_running_stats:
            return
        for row in (2, 3):
            self._table[row] = NEUTRAL[row]
        if self.num_batches_tracked is not None:
            self.num_batches_tracked = 0

    def reset_parameters(self) -> None:
        """Reset the running statistics, and set the weight to 1 and the bias to 0."""
        self.reset_running_stats()
        for row in (0, 1):
            self._table[row] = NEUTRAL[row]

    def __repr__(self) -> str:
        """Return the constructor call, as PyTorch prints it, and what differs from its defaults."""
        text = (
            f"{type(self).__name__}({self.num_features}, eps={self.eps}, "
            f"momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}"
        )
        if self.affine and self._views[1] is None:
            text += ", bias=False"
        if self._table.dtype != np.float32:
            text += f", dtype={self._table.dtype}"
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        if self.backend is not None:
            text += f", backend={self.backend!r}"
        return text + ")"


def _accumulated(
    total: NDArray[Any] | None, gradient: NDArray[np.float64], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Return ``total + gradient`` in ``dtype``."""
    added: NDArray[Any] = (gradient if total is None else total + gradient).astype(dtype)
    return added


class BatchNorm1d(_BatchNorm):
    """`BatchNorm2d` for inputs of shape (N, C) or (N, C, L)."""

    _ndims = (2, 3)


class BatchNorm2d(_BatchNorm):
    """Batch normalisation of inputs of shape (N, C, H, W), with the semantics of PyTorch's layer.

    Parameters
    ----------
    num_features : int
        Number of channels, C.
    eps : float
        Added to the variance.
    momentum : float or None
        Weight of the new value in the running statistics; None keeps the cumulative average.
    affine : bool
        Whether the layer has a weight and a bias.
    track_running_stats : bool
        Whether it keeps running statistics. Without them it uses the batch's, in eval mode too.
    bias : bool
        Whether an affine layer has a bias.
    dtype : dtype
        Of parameters and running statistics: float32 or float64. The input's may differ.
    activation : None or "relu"
        Applied to the result, in the same pass over memory.
    backend : str, optional
        A backend's name for this layer's calls, checked at once.

    Attributes
    ----------
    training : bool
        The mode; a new layer trains.
    grad_weight, grad_bias : ndarray of shape (C,), or None
        Gradients that `backward` added up since `zero_grad`.
    grad_residual : ndarray or None
        Gradient of the last call's residual.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> bn = bnfast.BatchNorm2d(3)
    >>> x = np.random.default_rng(0).normal(5, 2, (8, 3, 4, 4)).astype(np.float32)
    >>> y = bn(x)
    >>> float(abs(y.mean())) < 1e-6, y.dtype, y.shape
    (True, dtype('float32'), (8, 3, 4, 4))
    >>> bn.eval()
    BatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)
    >>> bn(x[:1]).shape
    (1, 3, 4, 4)
    """

    _ndims = (4,)


class BatchNorm3d(_BatchNorm):
    """`BatchNorm2d` for inputs of shape (N, C, D, H, W)."""

    _ndims = (5,)
