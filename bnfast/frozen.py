"""A layer for inference that nothing can change any more."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bnfast import channels, packed, registry
from bnfast.checks import admit, check_channels, check_eps, is_relu
from bnfast.deferred import Deferred
from bnfast.spec import Channels
from bnfast.state import NEUTRAL, VECTORS, check_variance


class FrozenBatchNorm:
    """An immutable batch-norm layer for inference, as ``layer.freeze()`` returns it.

    Its results have the bits of the layer's in eval mode. Nothing about it changes, so that any
    number of threads may share it, and a call has nothing to look up or to compare.

    Parameters
    ----------
    weight, bias : array_like of real numbers, shape (C,), or None
        The affine parameters; None means 1 and 0.
    running_mean, running_var : array_like of real numbers, shape (C,)
        What inputs are normalised with.
    eps : float
        Added to the variance.
    dtype : dtype
        In which the vectors are kept: float32 or float64. The input's may differ.
    ndims : tuple of int, optional
        The numbers of dimensions of inputs that are accepted; any from 2 on if None.
    activation : None or "relu"
        Applied to the result, in the same pass over memory.
    backend : str, optional
        A backend's name for this layer's calls, checked at once.

    Attributes
    ----------
    num_features : int
        Number of channels, C.
    training : bool
        False.

    Raises
    ------
    ValueError, TypeError
        For vectors of other shapes or dtypes, a ``running_var`` with NaN, a bad eps or activation.

    Examples
    --------
    >>> bn = bnfast.BatchNorm2d(3)
    >>> x = np.random.default_rng(0).normal(5, 2, (8, 3, 4, 4)).astype(np.float32)
    >>> y = bn(x)
    >>> frozen = bn.freeze()
    >>> np.array_equal(frozen(x), bn.eval()(x))
    True
    >>> frozen.eps = 1.0
    Traceback (most recent call last):
        ...
    AttributeError: a FrozenBatchNorm cannot be changed
    """

    __slots__ = (
        "_packed",
        "activation",
        "backend",
        "bias",
        "eps",
        "ndims",
        "num_features",
        "running_mean",
        "running_var",
        "weight",
    )

    weight: NDArray[Any] | None
    bias: NDArray[Any] | None
    running_mean: NDArray[Any]
    running_var: NDArray[Any]
    num_features: int
    eps: float
    ndims: tuple[int, ...] | None
    activation: str | None
    backend: str | None
    _packed: tuple[Channels, ...]

    training = False

    def __init__(
        self,
        weight: Any,
        bias: Any,
        running_mean: Any,
        running_var: Any,
        eps: float = 1e-5,
        *,
        dtype: DTypeLike = np.float32,
        ndims: tuple[int, ...] | None = None,
        activation: str | None = None,
        backend: str | None = None,
    ) -> None:
        check_eps(eps, training=False)
        is_relu(activation)
        dtype = np.dtype(dtype).newbyteorder("=")
        if dtype.char not in "fd":
            raise TypeError(f"dtype should be float32 or float64, got {dtype}")
        if backend is not None:
            registry.choose(backend)
        num_features = channels.as_array(running_mean, "running_mean").size
        vectors = []
        given = (weight, bias, running_mean, running_var)
        for name, vector, neutral in zip(VECTORS, given, NEUTRAL, strict=True):
            own = None
            if vector is not None or name.startswith("running"):
                own = _constant(vector, num_features, name, dtype)
            object.__setattr__(self, name, own)
            vectors.append(channels.pack(own, neutral, num_features, name))
        check_variance(vectors[3], "running_var")
        for name, value in {
            "num_features": num_features,
            "eps": eps,
            "ndims": ndims,
            "activation": activation,
            "backend": backend,
            "_packed": tuple(vectors),
        }.items():
            object.__setattr__(self, name, value)

    def __call__(self, x: Any, residual: Any = None, out: Any = None) -> NDArray[Any]:
        """Normalise ``x``; the arguments are those of a layer.

        Parameters
        ----------
        x : ndarray of float32 or float64, shape (N, C, ...)
            Any strides.
        residual : ndarray like ``x``, optional
            Added to the normalised result, before the activation.
        out : ndarray like ``x``, optional
            Where to write the result; may be ``x`` or ``residual`` itself.

        Returns
        -------
        ndarray
            ``out``, or a new array of the shape, dtype and layout of ``x``.

        Raises
        ------
        ValueError, TypeError
            For what `bnfast.functional.batch_norm` refuses.
        """
        try:
            x = admit(x, self.ndims, self.backend)
        except Deferred as deferred:
            return self._deferred(deferred, residual, out)
        check_channels(x, self.num_features)
        weight, bias, mean, var = self._packed
        relu = self.activation is not None
        return packed.normalize(
            x, mean, var, weight, bias, self.eps, residual, relu, out, self.backend
        )

    def _deferred(self, deferred: Deferred, residual: Any, out: Any) -> NDArray[Any]:
        """Return the result of a call on a dask array."""
        x, engine = deferred.collection, deferred.engine
        check_channels(engine.admit(x, self.ndims, self.backend), self.num_features)
        y: NDArray[Any] = engine.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            eps=self.eps,
            residual=residual,
            activation=self.activation,
            out=out,
            backend=self.backend,
        )
        return y

    def eval(self) -> FrozenBatchNorm:
        """Return the layer: it is in eval mode, always."""
        return self

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError("a FrozenBatchNorm cannot be changed")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError("a FrozenBatchNorm cannot be changed")

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        """Return what the results depend on, for dask's names of tasks."""
        kept = (self.eps, self.ndims, self.activation, self.backend)
        vectors = (self.weight, self.bias, self.running_mean, self.running_var)
        return (type(self).__qualname__, *kept, *vectors)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what makes the same layer again, for pickle and copy."""
        make = partial(
            type(self),
            eps=self.eps,
            dtype=self.running_mean.dtype,
            ndims=self.ndims,
            activation=self.activation,
            backend=self.backend,
        )
        return make, (self.weight, self.bias, self.running_mean, self.running_var)

    def __repr__(self) -> str:
        """Return the number of features, eps, and what differs from its defaults."""
        text = f"{type(self).__name__}({self.num_features}, eps={self.eps}"
        if self.running_mean.dtype != np.float32:
            text += f", dtype={self.running_mean.dtype}"
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        if self.backend is not None:
            text += f", backend={self.backend!r}"
        return text + ")"


def _constant(vector: Any, count: int, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return a copy on memory that NumPy cannot make writable again."""
    array = channels.as_array(vector, name)
    channels.check_vector(array, count, name)
    with np.errstate(over="ignore"):
        return np.frombuffer(array.astype(dtype).tobytes(), dtype)
