"""Batch norm of dask arrays: a batch in chunks, out of memory or over many machines.

A call makes a graph and computes nothing. Chunks may have any size, along the channels too.

Moments
    Each chunk is reduced to its `Moments`, and these are merged in a tree. Merging is exact, so
    the result depends on the chunks and on nothing else: not on the scheduler, nor on the order in
    which tasks end, nor on one that is run again because a worker was lost.
Normalising
    Each chunk on its own: with numbers that are known (in eval mode), or with the moments of the
    whole, which all chunks then wait for. dask keeps the chunks meanwhile, or makes them again.
Running statistics
    Are numbers in the memory of the process that calls. To update them, their moments are
    computed at once, in one pass over the data; the result stays lazy.
Threads
    dask runs chunks side by side, so the call on one takes one thread. Only where chunks come one
    after the other, in the program's own thread (dask's synchronous scheduler), and where there is
    just one, it takes what `bnfast.get_num_threads` says.

What is wrong is said when the graph is made: every check of the call on a NumPy array is made, by
the same code, on an array of the same shape and dtype that has no memory.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

try:
    import dask.array as da
    from dask import delayed
    from dask.core import flatten
except ImportError as error:
    raise ImportError(f'dask is not installed ({error}): pip install "bnfast[dask]"') from error

from bnfast import channels, checks, packed, registry
from bnfast.checks import check_both_running, check_eps, check_like, check_running, is_relu
from bnfast.device import on_device
from bnfast.interop.dask_recalibration import observe, recalibrate, threads_of_a_chunk
from bnfast.moments import Moments, side_by_side
from bnfast.recalibration import accurate_moments

__all__ = ["batch_norm", "moments", "observe", "recalibrate"]

DaskArray: TypeAlias = Any
"""A `dask.array.Array`; dask has no types of its own to show."""


def moments(x: DaskArray, *, backend: str | None = None) -> Any:
    """Return count, mean and sum of squared deviations of each channel of ``x``, lazily.

    Parameters
    ----------
    x : dask.array.Array of float32, float64, float16 or bfloat16, shape (N, C, ...)
        In any chunks.
    backend : str, optional
        As in `bnfast.functional.batch_norm`; it has to be there where the chunks are computed.

    Returns
    -------
    dask.delayed.Delayed
        Of `Moments`: ``moments(x).compute()``. The same bits for the same chunks, on every
        scheduler.

    Raises
    ------
    ValueError, TypeError
        For what `bnfast.functional.moments` refuses, and for chunks of unknown size.

    Examples
    --------
    >>> import dask.array
    >>> from bnfast.interop.dask import moments
    >>> x = dask.array.random.default_rng(0).normal(3, 2, (100, 4, 10), chunks=(30, 2, 10))
    >>> whole = moments(x).compute()
    >>> whole.count, bool(abs(whole.mean - 3).max() < 0.3)
    (1000, True)
    """
    admit(x, None, backend)
    return _joined(_moments_by_channels(x, backend))


def batch_norm(
    x: DaskArray,
    running_mean: NDArray[Any] | None,
    running_var: NDArray[Any] | None,
    weight: NDArray[Any] | None = None,
    bias: NDArray[Any] | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Any = None,
    activation: str | None = None,
    out: None = None,
    backend: str | None = None,
) -> DaskArray:
    """Normalise each channel of ``x``, lazily: `bnfast.functional.batch_norm` for dask arrays.

    Parameters
    ----------
    x : dask.array.Array of float32, float64, float16 or bfloat16, shape (N, C, ...)
        In any chunks, along the channels too.
    running_mean, running_var : ndarray, shape (C,), or None
        As there. In training they are updated in place where given: **their moments are computed
        at once**. Without them nothing is computed.
    weight, bias, training, momentum, eps, activation, backend
        As there.
    residual : dask.array.Array or ndarray like ``x``, or None
        Added to the normalised result. Its chunks are made those of ``x``.
    out : None
        There is no memory to write to.

    Returns
    -------
    dask.array.Array
        Of the shape, chunks and dtype of ``x``.

    Raises
    ------
    ValueError, TypeError
        For what `bnfast.functional.batch_norm` refuses, for chunks of unknown size and for an
        ``out``, all before anything is computed.

    Examples
    --------
    >>> import dask.array
    >>> from bnfast.interop.dask import batch_norm
    >>> x = dask.array.random.default_rng(0).normal(3, 2, (100, 4, 10), chunks=(30, 2, 10))
    >>> y = batch_norm(x, None, None, training=True)
    >>> y.chunks == x.chunks, y.dtype, bool(abs(y.mean().compute()) < 1e-12)
    (True, dtype('float64'), True)
    """
    admitted = admit(x, None, backend)
    count = x.shape[1]
    relu = is_relu(activation)
    check_eps(eps, training)
    if out is not None:
        raise TypeError("out= is not for dask arrays: the result is lazy")
    momentum = float(momentum)
    residual = _beside(residual, x, admitted, backend)
    vectors = [channels.pack(weight, 1.0, count, "weight")]
    vectors += [channels.pack(bias, 0.0, count, "bias")]
    if not training:
        if running_mean is None or running_var is None:
            missing = "running_mean" if running_mean is None else "running_var"
            raise ValueError(
                f"{missing} must be defined in evaluation mode: pass it, or training=True to use "
                "the statistics of this batch"
            )
        known = [channels.pack(running_mean, 0.0, count, "running_mean")]
        known += [channels.pack(running_var, 1.0, count, "running_var")]
        return _normalized(x, residual, [*known, *vectors], eps, relu, backend)
    check_both_running(running_mean, running_var)
    if count and admitted.size == count:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {list(x.shape)}"
        )
    parts = _moments_by_channels(x, backend)
    if running_mean is None or running_var is None:
        return _normalized(x, residual, [parts, *vectors], eps, relu, backend)
    check_running(running_mean, count, "running_mean")
    check_running(running_var, count, "running_var")
    whole = _joined(parts).compute()
    n = whole.count
    if n:
        statistics = np.array([running_mean, running_var, whole.mean, whole.m2], np.float64)
        channels.update_running(statistics, n, momentum, running_mean, running_var)
    return _normalized(x, residual, [whole.mean, whole.m2 / (n or 1), *vectors], eps, relu, backend)


def admit(x: DaskArray, ndim: tuple[int, ...] | None, backend: str | None) -> NDArray[Any]:
    """Return a NumPy array that stands for ``x`` in checks; raise unless it can be normalised.

    It has the shape and the dtype of ``x``, and no memory: all its elements lie in one place.
    """
    if not isinstance(x, da.Array):
        raise TypeError(
            f"expected a dask.array.Array, got {type(x).__module__}.{type(x).__qualname__}: "
            "make one of it, for example with dask.array.from_delayed"
        )
    if any(math.isnan(length) for length in x.shape):
        raise ValueError(
            f"x has chunks of unknown size, its shape is {x.shape}: "
            "call x.compute_chunk_sizes() first"
        )
    channels.refuse_mask(x._meta)
    if not isinstance(x._meta, np.ndarray) and not on_device(x._meta):
        kind = f"{type(x._meta).__module__}.{type(x._meta).__qualname__}"
        raise TypeError(f"expected chunks that are NumPy arrays, or lie on a GPU, got {kind}")
    stand_in = np.broadcast_to(np.zeros((), x.dtype), x.shape)
    return checks.admit(stand_in, ndim, backend)


def _beside(residual: Any, x: DaskArray, admitted: NDArray[Any], backend: str | None) -> Any:
    """Return a residual in the chunks of ``x``; raise unless it has its shape and dtype."""
    if residual is None:
        return None
    if not isinstance(residual, da.Array):
        residual = da.from_array(channels.as_array(residual, "residual"), chunks=x.chunks)
    stand_in = admit(residual, None, backend)
    check_like(stand_in, admitted, "residual", registry.choose(backend, stand_in))
    return residual.rechunk(x.chunks)


def _moments_by_channels(x: DaskArray, backend: str | None) -> DaskArray:
    """Return an array with one chunk for each of the channels' of ``x``: its `Moments`.

    These are no NumPy arrays. The array around them has the shape (C,), so that dask lays them
    beside what else there is of one number per channel.
    """
    return da.reduction(
        x,
        partial(_moments_of_chunk, backend=backend, alone=x.npartitions == 1),
        _merged,
        combine=_merged,
        axis=tuple(axis for axis in range(x.ndim) if axis != 1),
        dtype=object,
        concatenate=False,
        meta=np.empty(0, object),
        name="moments",
    )


def _joined(parts: DaskArray) -> Any:
    """Return the `Moments` of all channels, lazily."""
    return delayed(side_by_side, pure=True)(list(parts.to_delayed()))


def _normalized(
    x: DaskArray, residual: Any, vectors: list[Any], eps: float, relu: bool, backend: str | None
) -> DaskArray:
    """Return ``x`` normalised, chunk by chunk, with vectors of one number per channel."""
    axes = tuple(range(x.ndim))
    arguments: list[Any] = []
    for vector in vectors:
        if not isinstance(vector, da.Array):
            vector = da.from_array(vector, chunks=(x.chunks[1],))
        arguments += [vector, (1,)]
    if residual is not None:
        arguments += [residual, axes]
    return da.blockwise(
        _normalize_chunk,
        axes,
        x,
        axes,
        *arguments,
        eps=float(eps),
        relu=relu,
        backend=backend,
        alone=x.npartitions == 1,
        with_residual=residual is not None,
        dtype=x.dtype,
        meta=x._meta,
        align_arrays=False,
        token="batch_norm",
    )


def _moments_of_chunk(
    x: Any,
    *,
    backend: str | None,
    alone: bool,
    computing_meta: bool = False,
    **reduction: Any,
) -> Moments:
    """Return the moments of a chunk; ``reduction`` is what dask says to every reduction.

    To learn what kind of array comes out, dask calls this on an empty one, and wants an array.
    """
    if computing_meta:
        return np.empty(x.shape, object)  # type: ignore[return-value]
    with threads_of_a_chunk(alone):
        return accurate_moments(x, backend)


def _merged(parts: Any, **reduction: Any) -> Moments:
    """Merge the moments of chunks, which come in nested lists."""
    first, *others = flatten([parts], container=list)
    merged: Moments = first.merge(*others)
    return merged


def _normalize_chunk(
    x: NDArray[Any],
    *arguments: Any,
    eps: float,
    relu: bool,
    backend: str | None,
    alone: bool,
    with_residual: bool,
) -> NDArray[Any]:
    """Normalise a chunk with the vectors of its channels: mean and variance, or their `Moments`."""
    *vectors, weight, bias = arguments[:-1] if with_residual else arguments
    residual = arguments[-1] if with_residual else None
    if isinstance(vectors[0], Moments):
        part = vectors[0]
        vectors = [part.mean, part.m2 / (part.count or 1)]
    mean, var, weight, bias = map(np.ascontiguousarray, (*vectors, weight, bias))
    x = checks.admit(x, None, backend)
    with threads_of_a_chunk(alone):
        return packed.normalize(x, mean, var, weight, bias, eps, residual, relu, None, backend)
