"""Moments of channels, and merging that is exact.

A part enters a merge as three exact sums: its count n, n * mean, and m2 + n * mean**2. Those of a
whole are the sums of its parts', in integers of any length; mean and m2 are rounded from them once.
So every order and every grouping of the parts gives the same bits, over batches, files or hosts,
and a mean that is large against the deviation costs no digits.

The integers of one part count in units of a power of two, 2**unit for sums and 4**unit for squares.
What is not finite has no integer: it is carried as a float of its own, and poisons its channel.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bnfast import channels
from bnfast.spec import Channels


class _Sums(NamedTuple):
    """The exact sums of some elements; arrays of shape (C,), of Python's integers or of floats."""

    n: int
    unit: int
    sums: NDArray[np.object_]
    squares: NDArray[np.object_]
    lost_mean: Channels
    """A mean that is not finite, else 0; so for m2."""
    lost_m2: Channels


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations of each channel; they merge exactly.

    Parameters
    ----------
    count : int
        Elements per channel.
    mean : array_like of real numbers, shape (C,)
        Their mean.
    m2 : array_like of real numbers, shape (C,)
        Their sum of squared deviations from ``mean``. The biased variance is ``m2 / count``, the
        unbiased one ``m2 / (count - 1)``.

    Raises
    ------
    ValueError
        For a negative count or m2, and for shapes that do not fit.
    TypeError
        For a count that is no integer, and for vectors that do not hold real numbers.

    Notes
    -----
    ``mean`` and ``m2`` are kept as read-only float64 copies. Two are equal if count, mean and m2
    are; where there is a NaN, they are not. What a merge knows beyond the digits of ``mean`` and
    ``m2`` survives pickling.

    Examples
    --------
    >>> import bnfast.functional as F
    >>> x = np.random.default_rng(0).normal(1e6, 1, (8, 2, 5))
    >>> a, b, c = (F.moments(part) for part in (x[:1], x[1:4], x[4:]))
    >>> a.merge(b).merge(c) == c.merge(a.merge(b)) == b.merge(c, a)
    True
    >>> whole = F.moments(x)
    >>> whole.count, bool(np.allclose(a.merge(b, c).m2, whole.m2, rtol=1e-9))
    (40, True)
    """

    count: int
    mean: Channels
    m2: Channels
    _sums: _Sums | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        """Check the parts, and keep read-only copies of the vectors."""
        count = operator.index(self.count)
        if count < 0:
            raise ValueError(f"count should not be negative, got {count}")
        mean, m2 = channels.as_array(self.mean, "mean"), channels.as_array(self.m2, "m2")
        if mean.ndim != 1:
            raise ValueError(f"mean should have shape (C,), got {mean.shape}")
        vectors = [channels.pack(mean, 0.0, mean.size, "mean")]
        vectors += [channels.pack(m2, 0.0, mean.size, "m2")]
        if (vectors[1] < 0).any():
            raise ValueError(f"m2 should not be negative, got {vectors[1].min()}")
        for vector in vectors:
            vector.flags.writeable = False
        self._set("count", count)
        self._set("mean", vectors[0])
        self._set("m2", vectors[1])

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        """Return whether count, mean and m2 are equal."""
        if not isinstance(other, Moments):
            return NotImplemented
        return (
            self.count == other.count
            and np.array_equal(self.mean, other.mean)
            and np.array_equal(self.m2, other.m2)
        )

    __hash__ = None  # type: ignore[assignment]

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        """Return what the moments are, for dask's names of tasks."""
        sums = self._sums and [np.asarray(part).tolist() for part in self._sums]
        return type(self).__qualname__, self.count, self.mean, self.m2, sums

    def merge(self, *others: Moments) -> Moments:
        """Return the moments of all the elements together.

        Parameters
        ----------
        *others : Moments
            Moments of the same number of channels.

        Returns
        -------
        Moments
            The same bits for every order and grouping in which parts are merged: mean and m2 are
            the exact ones of the parts, rounded once.

        Raises
        ------
        ValueError
            If the numbers of channels differ.
        TypeError
            For what is not Moments.
        """
        for other in others:
            if not isinstance(other, Moments):
                raise TypeError(f"expected Moments to merge with, got {type(other).__name__}")
            if self.mean.shape != other.mean.shape:
                raise ValueError(
                    f"cannot merge moments of {self.mean.size} channels with moments of "
                    f"{other.mean.size} channels"
                )
        parts = [part for part in (self, *others) if part.count]
        if len(parts) < 2:
            return parts[0] if parts else self
        return _rounded(_total([part._sums or _sums(part) for part in parts]))


def refined(part: Moments, mean: Channels, m2: Channels | float = 0.0) -> Moments:
    """Return a part whose moments are known beyond its digits: with these, if finite, added."""
    mean, m2 = (np.where(np.isfinite(tail), tail, 0.0).astype(np.float64) for tail in (mean, m2))
    return _rounded(_sums(part, (part.mean, mean), (part.m2, m2)))


def side_by_side(parts: Sequence[Moments]) -> Moments:
    """Return the moments of all the channels of parts with the same count, as one."""
    if len(parts) == 1:
        return parts[0]
    mean, m2 = (np.concatenate([getattr(part, name) for part in parts]) for name in ("mean", "m2"))
    joined = Moments(parts[0].count, mean, m2)
    if all(part._sums for part in parts):
        sums = [part._sums for part in parts if part._sums]
        unit = min(one.unit for one in sums)
        shifted = [one.sums << one.unit - unit for one in sums]
        squares = [one.squares << 2 * (one.unit - unit) for one in sums]
        lost = ([getattr(one, name) for one in sums] for name in ("lost_mean", "lost_m2"))
        columns = map(np.concatenate, (shifted, squares, *lost))
        joined._set("_sums", _Sums(joined.count, unit, *columns))
    return joined


def _sums(part: Moments, means: Sequence[Channels] = (), m2s: Sequence[Channels] = ()) -> _Sums:
    """Return the exact sums of a part whose mean and m2 are these sums, or else its own."""
    with np.errstate(invalid="ignore"):
        not_finite = part.mean - part.mean  # NaN where the mean is not finite, else 0
        known = np.isfinite(not_finite)
        known_m2 = known & np.isfinite(part.m2)
        lost_mean = np.where(known, 0.0, part.mean)
        lost_m2 = np.where(known_m2, 0.0, part.m2 + not_finite)
    mean, mean_unit = _sum([np.where(known, mean, 0.0) for mean in means or (part.mean,)])
    m2, m2_unit = _sum([np.where(known_m2, m2, 0.0) for m2 in m2s or (part.m2,)])
    unit = min(mean_unit, m2_unit // 2)
    mean = mean << mean_unit - unit
    squares = (m2 << m2_unit - 2 * unit) + part.count * mean * mean
    return _Sums(part.count, unit, part.count * mean, squares, lost_mean, lost_m2)


def _sum(vectors: Sequence[Channels]) -> tuple[NDArray[np.object_], int]:
    """Return the exact sum of vectors: integers, and the power of two in whose units they are."""
    parts = [_integers(vector) for vector in vectors]
    unit = min(part_unit for _, part_unit in parts)
    return np.sum([part << part_unit - unit for part, part_unit in parts], axis=0), unit


def _integers(vector: Channels) -> tuple[NDArray[np.object_], int]:
    """Return integers, and the power of two in whose units they are the numbers of ``vector``."""
    mantissa, exponent = np.frexp(vector)
    unit = int(exponent.min(initial=0))
    # 53 bits of a mantissa below 1 make an integer.
    integers = np.ldexp(mantissa, 53).astype(np.int64).astype(object)
    return integers << (exponent - unit).astype(object), unit - 53


def _total(parts: Sequence[_Sums]) -> _Sums:
    """Add the sums of several parts."""
    unit = min(part.unit for part in parts)
    with np.errstate(invalid="ignore"):  # inf - inf is NaN
        return _Sums(
            sum(part.n for part in parts),
            unit,
            np.sum([part.sums << part.unit - unit for part in parts], axis=0),
            np.sum([part.squares << 2 * (part.unit - unit) for part in parts], axis=0),
            np.sum([part.lost_mean for part in parts], axis=0),
            np.sum([part.lost_m2 for part in parts], axis=0),
        )


def _rounded(total: _Sums) -> Moments:
    """Return the moments that exact sums amount to."""
    count, unit, sums = total.n, total.unit, total.sums
    deviations = count * total.squares - sums * sums  # count * m2, by Lagrange's identity
    merged = Moments(
        count,
        _quotients(sums, count, unit) + total.lost_mean,
        _quotients(deviations, count, 2 * unit) + total.lost_m2,
    )
    merged._set("_sums", total)
    return merged


def _quotients(numerators: NDArray[np.object_], count: int, exponent: int) -> Channels:
    """Return ``numerators / count * 2**exponent``, rounded once; infinite where it is too large."""
    if exponent > 0:
        numerators = numerators << exponent
    denominator = count << max(-exponent, 0)

    def divide(numerator: int) -> float:
        try:
            return numerator / denominator  # Python rounds the quotient of two integers correctly
        except OverflowError:
            return np.inf

    return np.array([divide(numerator) for numerator in numerators], np.float64)
