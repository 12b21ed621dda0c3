"""C-sized work, all in float64: packing parameters, merging moments, running statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bnfast.spec import Channels


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations of each channel; two of them merge into one.

    Attributes
    ----------
    count : int
        Elements per channel.
    mean : ndarray of float64, shape (C,)
        Their mean.
    m2 : ndarray of float64, shape (C,)
        Their sum of squared deviations from ``mean``. The biased variance is ``m2 / count``, the
        unbiased one ``m2 / (count - 1)``.

    Examples
    --------
    >>> import bnfast.functional as F
    >>> x = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    >>> whole, halves = F.moments(x), F.moments(x[:1]).merge(F.moments(x[1:]))
    >>> whole.count, bool(np.allclose(whole.m2, halves.m2))
    (12, True)
    """

    count: int
    mean: Channels
    m2: Channels

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of elements together.

        Parameters
        ----------
        other : Moments
            Moments of the same number of channels.

        Raises
        ------
        ValueError
            If the channel counts differ.

        Notes
        -----
        The pairwise update of Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm
        for computing sample variances", 1979.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"cannot merge moments of {self.mean.size} channels with moments of "
                f"{other.mean.size} channels"
            )
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta * delta * (self.count * (other.count / count))
        return Moments(count, mean, m2)


def refuse_mask(value: Any) -> None:
    """Raise TypeError for a masked array: its mask would be lost."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError("masked arrays are not accepted: the mask would be ignored")


def as_array(value: Any) -> np.ndarray[Any, Any]:
    """Return ``value`` as an array; raise TypeError for a masked one."""
    if type(value) is np.ndarray:
        return value
    refuse_mask(value)
    return np.asarray(value)


def pack(vector: Any, default: float, channels: int, name: str) -> Channels:
    """Return a parameter as the kernels want it: float64, contiguous, never None.

    Raises
    ------
    TypeError
        If ``vector`` does not hold real numbers.
    ValueError
        If its shape is not ``(channels,)``.
    """
    if vector is None:
        return np.full(channels, default)
    array = as_array(vector)
    check_vector(array, channels, name)
    return np.ascontiguousarray(array, np.float64)


def check_vector(array: np.ndarray[Any, Any], channels: int, name: str) -> None:
    """Raise unless ``array`` is a vector of ``channels`` real numbers."""
    if not is_real(array.dtype):
        raise TypeError(f"{name} should hold real numbers, got dtype {array.dtype}")
    if array.shape != (channels,):
        raise ValueError(
            f"{name} should contain {channels} elements not {array.size}: "
            f"expected shape ({channels},), got {array.shape}"
        )


def is_real(dtype: np.dtype[Any]) -> bool:
    """Return whether ``dtype`` holds real numbers (bfloat16, which NumPy calls void, included)."""
    return dtype.kind in "fiu" or dtype.name == "bfloat16"


def invstd(batch: Moments, eps: float) -> Channels:
    """Return 1 / sqrt(biased variance + eps)."""
    with np.errstate(all="ignore"):
        result: Channels = 1.0 / np.sqrt(batch.m2 / max(batch.count, 1) + eps)
    return result


def update_running(
    running_mean: np.ndarray[Any, Any] | None,
    running_var: np.ndarray[Any, Any] | None,
    batch: Moments,
    factor: float,
) -> None:
    """Move the running statistics towards a batch: new = (1 - factor) * old + factor * batch.

    The variance that goes in is the unbiased one. Computed in float64, rounded once.
    """
    with np.errstate(all="ignore"):
        if running_mean is not None:
            running_mean[...] = (1.0 - factor) * running_mean.astype(np.float64) + (
                factor * batch.mean
            )
        if running_var is not None:
            unbiased = batch.m2 / (batch.count - 1)
            running_var[...] = (1.0 - factor) * running_var.astype(np.float64) + factor * unbiased
