"""What ranks tell each other, and what all of them make of it: see `bnfast.interop.mpi`.

::

    message of a rank    head   vector   vector          1 + C + C float64
    head                 count * 2**12 + mark            an integer below 2**53
    mark                 layer (8 bits), backward (1), dtype (2), refused (1)

Everything here works on a communicator of mpi4py and on what it delivers, and imports nothing of
it. Whatever is raised after a collective is decided by what the collective delivered, so that it is
raised on all ranks.
"""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from bnfast.spec import STORAGE_DTYPES, Channels

_DTYPES: Final = ("float32", "float64", *STORAGE_DTYPES)
_LAYERS: Final[int] = 256
_MARKS: Final[int] = 4096

_RAISED: Final = ("ValueError", "TypeError", "MemoryError", "RuntimeError")
"""The kinds of error that are raised on all ranks as what they were on one."""

_next_number: int = 0


class Place(NamedTuple):
    """Where a rank is: what it has to have in common with the others."""

    layer: int
    """The number that `agree` gave the layer."""
    backward: bool
    dtype: str = _DTYPES[0]

    def mark(self, refused: bool) -> int:
        """Return the place as a number from 0 to 4095."""
        direction = self.layer % _LAYERS * 2 + int(self.backward)
        dtype: int = _DTYPES.index(self.dtype)
        return (direction * 4 + dtype) * 2 + int(refused)


def agree(comm: Any, description: dict[str, object]) -> int:
    """Compare a layer with the other ranks' and give it a number, which no layer had before it.

    Raises
    ------
    ValueError
        On all ranks, if the descriptions differ.
    """
    global _next_number
    everyone = comm.allgather((_next_number, description))
    _next_number = max(number for number, _ in everyone) + 1
    for name in description:
        values = [str(one.get(name)) for _, one in everyone]
        if len(set(values)) > 1:
            raise ValueError(
                f"the ranks have different layers, they disagree on {name}: {_by_rank(values)}"
            )
    return int(_next_number) - 1  # `max` of what MPI delivered is anything, to mypy


def exchange(
    comm: Any, place: Place, count: int, vectors: Channels, refusal: Exception | None = None
) -> tuple[NDArray[np.int64], Channels]:
    """Give a count and two vectors to all ranks and get theirs, in one collective.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        The ranks.
    place : Place
        What the ranks should have in common.
    count : int
        Below 2**40.
    vectors : ndarray of float64, shape (2, C)
        C is the same on all ranks.
    refusal : Exception, optional
        Why this rank has nothing to give. Then, as on all other ranks, this raises.

    Returns
    -------
    counts : ndarray of int64, shape (ranks,)
    vectors : ndarray of float64, shape (ranks, 2, C)

    Raises
    ------
    RuntimeError
        If the ranks are in different layers, or not all in the same direction.
    TypeError
        If their dtypes differ.
    Exception
        What a rank refused its call with.
    """
    message = np.empty(1 + vectors.size)
    message[0] = count * _MARKS + place.mark(refusal is not None)
    message[1:] = vectors.ravel()
    everyone = np.empty((comm.size, message.size))
    comm.Allgather(message, everyone)
    counts, marks = np.divmod(everyone[:, 0].astype(np.int64), _MARKS)
    if (marks != marks[0]).any() or marks[0] % 2:
        _disagree(comm, [int(mark) for mark in marks], refusal)
    return counts, everyone[:, 1:].reshape(comm.size, *vectors.shape)


def _disagree(comm: Any, marks: list[int], refusal: Exception | None) -> NoReturn:
    """Raise what all ranks raise where they are not in one place, or one has refused."""
    directions = ("forward", "backward")
    places = [f"{directions[mark // 8 % 2]} of layer {mark // 16}" for mark in marks]
    if len(set(places)) > 1:
        raise RuntimeError(
            "the ranks should call the same layers in the same order, but they are in different "
            f"calls: {_by_rank(places)} (layers count from 0, in the order of their first calls)"
        ) from refusal
    if any(mark % 2 for mark in marks):
        own = refusal and (type(refusal).__name__, str(refusal))
        _raise_refusals(comm.allgather(own), refusal)
    dtypes = [_DTYPES[mark // 2 % 4] for mark in marks]
    raise TypeError(f"expected batches of one dtype on all ranks, got {_by_rank(dtypes)}")


def _raise_refusals(refusals: Sequence[tuple[str, str] | None], own: Exception | None) -> NoReturn:
    """Raise the first rank's refusal, with the text of all of them."""
    kinds = [refusal[0] for refusal in refusals if refusal]
    texts = [refusal[1] if refusal else "" for refusal in refusals]
    kind = getattr(builtins, kinds[0]) if kinds[0] in _RAISED else RuntimeError
    alike = len(set(texts)) == 1
    raise kind(texts[0] if alike else f"refused on {_by_rank(texts)}") from own


def _by_rank(values: Sequence[str], most: int = 8) -> str:
    """Return which ranks have which of some texts, but for empty ones."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        if value:
            ranks.setdefault(value, []).append(rank)
    parts = []
    for value, those in list(ranks.items())[:most]:
        listed = ", ".join(map(str, those[:most])) + ", ..." * (len(those) > most)
        parts.append(f"rank{'s' * (len(those) > 1)} {listed}: {value}")
    return "; ".join(parts) + "; ..." * (len(ranks) > most)


def merged(counts: NDArray[np.int64], vectors: Channels) -> tuple[int, Channels, Channels]:
    """Return count, mean and m2 of all batches together, from those of each.

    In float64 and in the order of the ranks, about the mean of the first: a mean that is large
    against the deviation costs no digits beyond its own rounding. `Moments.merge` would be exact,
    and take 56 ms for 1,024 ranks of 64 channels; this takes 2.
    """
    present = counts > 0
    n = int(counts.sum())
    if present.sum() < 2:
        mean, m2 = vectors[present.argmax()]
        return n, mean, m2
    means, m2s = vectors[present].swapaxes(0, 1)
    weights = counts[present].astype(np.float64)[:, None]
    with np.errstate(all="ignore"):
        away = means - means[0]
        shift = total(weights / n * away)
        apart = away - shift
        return n, means[0] + shift, total(m2s + weights * apart * apart)


def total(rows: Channels) -> Channels:
    """Return the sum of the rows, added in their order. `numpy.sum` leaves the order to NumPy."""
    result: Channels = np.add.accumulate(rows, axis=0)[-1]
    return result
