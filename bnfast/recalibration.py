"""Running statistics measured anew: those of all the data, instead of a moving average."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bnfast import functional, moments
from bnfast.deferred import Deferred, is_deferred
from bnfast.device import DeviceArray
from bnfast.layers import _BatchNorm
from bnfast.moments import Moments

MODES = ("population", "torch")

_LARGE_MEAN = 2.0**8
"""The mean, in standard deviations, from which on its rounding is seen in merged variances."""

_SMALL = 2**13
"""Elements up to which the moments are computed anew in long double, in 0.6 ms for 64 channels."""

_EXTENDED = np.finfo(np.longdouble).nmant > np.finfo(np.float64).nmant
"""Whether long double has more digits than float64 here."""

_PIECE = 2**22
"""Bytes of an input that are copied at a time to refine its mean."""


def recalibrate(
    model: Callable[[Any], object],
    layers: Iterable[_BatchNorm],
    batches: Iterable[Any],
    mode: str = "population",
    progress: bool = True,
) -> None:
    """Run a model over batches of data, and take over the statistics that its layers see.

    During the run the layers are in training mode: each normalises with the statistics of its
    batch, and so each sees what it would see in training.

    Parameters
    ----------
    model : callable
        Called as ``model(batch)``; its result is not used.
    layers : iterable of BatchNorm1d, BatchNorm2d or BatchNorm3d
        The layers that the model calls and that are to be recalibrated.
    batches : iterable
        The data. Of a batch that is a tuple or a list, such as inputs with their labels, the model
        gets the first element. Or a collection of dask, see `bnfast.interop.dask.recalibrate`.
    mode : {"population", "torch"}
        "population": ``running_mean`` and ``running_var`` become mean and unbiased variance of all
        the elements that the layer saw, as if they were one array. "torch": they become the
        averages of the batches' means and unbiased variances, each batch of the same weight, as
        ``torch.optim.swa_utils.update_bn`` does it.
    progress : bool
        Whether to show a progress bar, where tqdm is installed.

    Raises
    ------
    ValueError
        For an unknown mode, no layers, a layer without running statistics, no batches, and a layer
        that the model did not call or that saw no elements.
    TypeError
        For layers that are not batch-norm layers of this package.

    Notes
    -----
    After an error, or an interrupt, the layers are what they were. Otherwise
    ``num_batches_tracked`` is the number of calls of the layer during the run. Modes, momentum,
    parameters, gradients, and what `backward` belongs to are left alone.

    The average of the batches' variances is not the variance of the data: it lacks the variance
    between the batches' means. Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3.

    Examples
    --------
    >>> bn = bnfast.BatchNorm1d(2, dtype=np.float64)
    >>> data = np.random.default_rng(0).normal(3, 2, (100, 2))
    >>> bnfast.recalibrate(bn, [bn], np.split(data, [10, 40]), progress=False)
    >>> np.allclose(bn.running_mean, data.mean(axis=0), rtol=1e-12)
    True
    >>> np.allclose(bn.running_var, data.var(axis=0, ddof=1), rtol=1e-12)
    True
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: expected one of {', '.join(MODES)}")
    watched = _checked(layers)
    if is_deferred(batches):
        seen = Deferred(batches, "batches").engine.observe(model, watched, batches, mode, progress)
    else:
        seen = observe(model, watched, _shown(batches, progress), mode)
    _take_over(watched, seen)


class Seen(NamedTuple):
    """What a layer saw during a run."""

    calls: int
    elements: int
    whole: Moments | None
    """The moments of all its inputs, where they were asked for."""
    averages: NDArray[Any]
    """Averages of the means and the unbiased variances of its calls, shape (2, C)."""

    def merge(self, *others: Seen) -> Seen:
        """Return what was seen in several runs together, in this order."""
        runs = (self, *others)
        calls = sum(run.calls for run in runs)
        parts = [run.whole for run in runs if run.whole is not None]
        whole = parts[0].merge(*parts[1:]) if parts else None
        averages = sum(run.calls / max(calls, 1) * run.averages for run in runs)
        return Seen(calls, sum(run.elements for run in runs), whole, np.asarray(averages))


def observe(
    model: Callable[[Any], object], layers: list[_BatchNorm], batches: Iterable[Any], mode: str
) -> list[Seen]:
    """Run a model over batches; return what each layer saw. The layers are then as before."""
    saved = [(layer, layer._table.copy(), vars(layer).copy()) for layer in layers]
    parts: list[list[Moments]] = [[] for _ in layers]
    calls, elements = [0] * len(layers), [0] * len(layers)

    def watch(number: int, x: Any) -> None:
        calls[number] += 1
        elements[number] += x.size
        if mode == "population":
            parts[number].append(accurate_moments(x))

    try:
        for number, layer in enumerate(layers):
            layer._watch = lambda x, number=number: watch(number, x)
            layer.reset_running_stats()
            layer.momentum = None
            layer.train()
        number_of_batches = 0
        for batch in batches:
            model(batch[0] if isinstance(batch, (tuple, list)) else batch)
            number_of_batches += 1
        if not number_of_batches:
            raise ValueError("no batches to recalibrate with")
        return [
            layer._pooled(
                Seen(
                    calls[number],
                    elements[number],
                    parts[number][0].merge(*parts[number][1:]) if parts[number] else None,
                    layer._table[2:].copy(),
                )
            )
            for number, layer in enumerate(layers)
        ]
    finally:
        for layer, table, attributes in saved:
            layer._table[:] = table
            del layer._watch
            vars(layer).update(attributes)


def _take_over(layers: list[_BatchNorm], seen: list[Seen]) -> None:
    """Set the running statistics to what the layers saw; raise if one saw nothing."""
    for number, (layer, run) in enumerate(zip(layers, seen, strict=True)):
        if not run.calls:
            raise ValueError(f"layers[{number}], {layer!r}, was not called by the model")
        if not run.elements:
            raise ValueError(f"layers[{number}] saw no elements: all its inputs were empty")
    with np.errstate(over="ignore"):
        for layer, run in zip(layers, seen, strict=True):
            rows: Any = run.averages
            if run.whole is not None:
                rows = run.whole.mean, run.whole.m2 / (run.whole.count - 1)
            layer._table[2:] = rows
            layer.num_batches_tracked = run.calls


def _checked(layers: Iterable[_BatchNorm]) -> list[_BatchNorm]:
    """Return the layers, each once; raise unless all of them can be recalibrated."""
    if isinstance(layers, _BatchNorm):
        raise TypeError(f"layers should be a list of layers, got one: [{layers!r}]")
    watched = list({id(layer): layer for layer in layers}.values())
    if not watched:
        raise ValueError("no layers to recalibrate")
    for number, layer in enumerate(watched):
        if not isinstance(layer, _BatchNorm):
            raise TypeError(
                f"layers[{number}] should be a BatchNorm1d, BatchNorm2d or BatchNorm3d, "
                f"got {type(layer).__name__}"
            )
        if not layer.track_running_stats or (
            layer.running_mean is None or layer.running_var is None
        ):
            raise ValueError(f"layers[{number}], {layer!r}, keeps no running statistics")
    return watched


def _shown(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    """Return the batches, behind a progress bar if that is wanted and tqdm is installed."""
    if not progress:
        return batches
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return batches
    bar: Iterable[Any] = tqdm(batches, desc="recalibrate", unit="batch")
    return bar


def accurate_moments(x: Any, backend: str | None = None) -> Moments:
    """Return the moments of an input, to more digits than float64 has where that is seen.

    Where means of batches differ, an error of theirs goes into the variance of the whole,
    multiplied by their difference. At a mean of 1e6 deviations the rounding of float64 alone is
    1e-10 deviations. So the mean of what remains after subtracting it is computed as well, for the
    channels where the mean is large: there, the difference is exact. A small input has few
    roundings of its own to hide those of the kernels, so both moments are refined, if the platform
    can.
    """
    if is_deferred(x):
        computed: Moments = functional.moments(x, backend=backend).compute()  # type: ignore[attr-defined]
        return computed
    part = functional.moments(x.array if isinstance(x, DeviceArray) else x, backend=backend)
    if not isinstance(x, np.ndarray) or not x.size:
        return part
    if _EXTENDED and x.size <= _SMALL:
        with np.errstate(all="ignore"):  # as in the kernels; what is not finite is in part
            rest = _by_channels(x) - part.mean.astype(np.longdouble)
            tail = rest.mean(axis=0)
            m2 = np.square(rest - tail).sum(axis=0)
            return moments.refined(part, tail, m2 - part.m2)
    large = np.flatnonzero(part.count * part.mean**2 > _LARGE_MEAN**2 * part.m2)
    if not large.size:
        return part
    tail = np.zeros_like(part.mean)
    for piece in np.array_split(x, 1 + x.nbytes // _PIECE):
        tail[large] += (_by_channels(piece, large) - part.mean[large]).sum(axis=0)
    return moments.refined(part, tail / part.count)


def _by_channels(x: NDArray[Any], which: Any = slice(None)) -> NDArray[np.float64]:
    """Return a copy of some channels in float64, of shape (elements of a channel, channels)."""
    copy = np.moveaxis(x, 1, -1)[..., which].astype(np.float64)
    return copy.reshape(-1, copy.shape[-1])
