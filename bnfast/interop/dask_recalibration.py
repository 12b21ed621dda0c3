"""Recalibration over dask collections: batches that many workers run the model on.

A task gets some batches and a copy of the model with its layers, pickled together, so that what
the copy's layers see is known to be that of these batches. What the tasks saw is merged in a tree.
Merging moments is exact: the running statistics have the bits of a run over the same batches in
one process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import cloudpickle
import dask.array as da
import dask.bag as db
import numpy as np
from dask import delayed

from bnfast import recalibration, threads
from bnfast.checks import admit, check_channels
from bnfast.layers import _BatchNorm
from bnfast.recalibration import Seen

_FAN_IN = 8
"""How many results a task merges."""


def recalibrate(
    model: Callable[[Any], object],
    layers: Iterable[_BatchNorm],
    batches: Any,
    mode: str = "population",
    progress: bool = True,
) -> None:
    """Run a model over batches on dask's workers, and take over the statistics of its layers.

    `bnfast.recalibrate` for dask collections, to which it hands those that it gets.

    Parameters
    ----------
    model, layers, mode
        As there. The model is pickled with the layers, so it has to carry them: as attributes, or
        as variables of a function that is defined in the program or in another function. A function
        of an imported module is pickled by its name alone.
    batches : dask.array.Array, dask.bag.Bag, or iterable of dask.delayed.Delayed
        Of an array each chunk along axis 0 is a batch (the other axes are not divided), of a bag
        each item, and each `Delayed` is one.
    progress : bool
        Whether to show a progress bar, where tqdm is installed; not on a distributed scheduler.

    Raises
    ------
    ValueError, TypeError
        As there; and TypeError for another kind of collection. An error of a task is raised here.

    Notes
    -----
    The running statistics are those that `bnfast.recalibrate` finds for the same batches; for
    ``mode="population"`` in every bit. The model and its layers are left as they were otherwise.
    Where the model is the one layer itself, its inputs are not normalised, as nobody would see it.

    Examples
    --------
    >>> import dask.array
    >>> from bnfast.interop.dask import recalibrate
    >>> x = dask.array.random.default_rng(0).normal(3, 2, (1000, 2), chunks=(100, 1))
    >>> bn = bnfast.BatchNorm1d(2)
    >>> recalibrate(bn, [bn], x, progress=False)
    >>> bool(np.allclose(bn.running_mean, 3, atol=0.3)), bn.num_batches_tracked
    (True, 10)
    """
    if not isinstance(batches, (da.Array, db.Bag)) and isinstance(batches, Iterable):
        batches = db.from_delayed([delayed(_as_item, pure=True)(batch) for batch in batches])
    recalibration.recalibrate(model, layers, batches, mode, progress)


def observe(
    model: Callable[[Any], object],
    layers: list[_BatchNorm],
    batches: Any,
    mode: str,
    progress: bool,
) -> list[Seen]:
    """Run copies of a model over a collection; return what each layer saw."""
    copies = delayed(cloudpickle.dumps((model, layers)))
    if isinstance(batches, da.Array):
        seen = _over_chunks(copies, batches, mode)
    elif isinstance(batches, db.Bag):
        run = delayed(_observe, pure=True)
        alone = batches.npartitions == 1
        seen = [run(part, copies, mode, alone) for part in batches.to_delayed()]
    else:
        raise TypeError(
            f"batches should be a dask.array.Array or a dask.bag.Bag, got "
            f"{type(batches).__module__}.{type(batches).__qualname__}"
        )
    while len(seen) > 1:
        groups = (seen[start : start + _FAN_IN] for start in range(0, len(seen), _FAN_IN))
        seen = [delayed(_merged, pure=True)(group) for group in groups]
    with _bar(progress):
        result: list[Seen] = seen[0].compute()
    return result


def _over_chunks(copies: Any, x: Any, mode: str) -> list[Any]:
    """Return what the layers see in each chunk along axis 0 of an array, lazily.

    Laid over the chunks as an array's function is, so that dask joins it with what makes a chunk:
    one task reads a chunk, looks at it and forgets it.
    """
    x = x.rechunk(dict.fromkeys(range(1, x.ndim), -1))
    axes = tuple(range(x.ndim))
    seen = da.blockwise(
        _observe_chunk,
        axes,
        x,
        axes,
        copies=copies,
        mode=mode,
        alone=x.npartitions == 1,
        dtype=object,
        meta=np.empty((0,) * x.ndim, object),
    )
    return list(seen.to_delayed().ravel())


def _bar(progress: bool) -> contextlib.AbstractContextManager[Any]:
    """Return the context of a progress bar, if it is wanted and tqdm is installed."""
    if progress:
        try:
            from tqdm.dask import TqdmCallback
        except ImportError:
            return contextlib.nullcontext()
        bar: contextlib.AbstractContextManager[Any] = TqdmCallback(desc="recalibrate", unit="task")
        return bar
    return contextlib.nullcontext()


def threads_of_a_chunk(alone: bool) -> contextlib.AbstractContextManager[None]:
    """Return the context that a task computes in: on one thread, if others may run beside it.

    They may not if it is ``alone``, nor in the main thread of the program: only the synchronous
    scheduler computes there, one task after the other.
    """
    here = threading.current_thread() is threading.main_thread()
    if alone or (here and multiprocessing.parent_process() is None):
        return contextlib.nullcontext()
    return threads.use_num_threads(1)


def _as_item(batch: Any) -> list[Any]:
    return [batch]


def _observe_chunk(x: Any, *, copies: bytes, mode: str, alone: bool) -> list[Seen]:
    return _observe([x], copies, mode, alone)


def _observe(batches: Iterable[Any], copies: bytes, mode: str, alone: bool) -> list[Seen]:
    """Run a copy of the model over some batches."""
    model, layers = cloudpickle.loads(copies)
    if mode == "population" and len(layers) == 1 and model is layers[0]:
        model = _watching(model)
    with threads_of_a_chunk(alone):
        return recalibration.observe(model, layers, batches, mode)


def _watching(layer: _BatchNorm) -> Callable[[Any], None]:
    """Return a model that shows the layer its input, where the result would not be used."""

    def watch(x: Any) -> None:
        x = admit(x, layer._ndims, layer.backend)
        check_channels(x, layer.num_features)
        if layer._watch is not None:
            layer._watch(x)

    return watch


def _merged(parts: Sequence[list[Seen]]) -> list[Seen]:
    """Merge what several tasks saw, layer by layer."""
    return [first.merge(*others) for first, *others in zip(*parts, strict=True)]
