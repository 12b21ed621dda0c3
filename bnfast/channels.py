"""C-sized work, all in float64: packing parameters, running statistics.

Of 200 ns that an operation on 64 numbers takes, NumPy spends 20 on the numbers. So what is done at
every call is done in few operations, on several vectors at once where they are rows of one array.
"""

from __future__ import annotations

from contextvars import Context
from functools import lru_cache
from typing import Any, Final

import numpy as np

from bnfast.device import on_device, where
from bnfast.spec import Channels

FLOAT64: Final = np.dtype(np.float64)

# Where NumPy does not warn. Running a function in a copy of it costs 40 ns, errstate 650.
_SILENT: Final = Context()
_SILENT.run(np.seterr, all="ignore")


def refuse_mask(value: Any) -> None:
    """Raise TypeError for a masked array: its mask would be lost."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError("masked arrays are not accepted: the mask would be ignored")


def refuse_device(value: Any, name: str) -> None:
    """Raise TypeError for an array on a device."""
    if on_device(value):
        raise TypeError(
            f"{name} is {where(value)}, but parameters and running statistics live in host memory, "
            "wherever x is: copy it to a NumPy array first"
        )


def as_array(value: Any, name: str) -> np.ndarray[Any, Any]:
    """Return ``value`` as a NumPy array; raise TypeError for one that is masked or on a device."""
    if type(value) is np.ndarray:
        return value
    refuse_mask(value)
    refuse_device(value, name)
    return np.asarray(value)


def pack(vector: Any, default: float, channels: int, name: str) -> Channels:
    """Return a copy of a parameter as the kernels want it: float64, contiguous, never None.

    Raises
    ------
    TypeError
        If ``vector`` does not hold real numbers.
    ValueError
        If its shape is not ``(channels,)``.
    """
    if vector is None:
        packed = np.empty(channels)
        packed.fill(default)
        return packed
    array = vector if type(vector) is np.ndarray else as_array(vector, name)
    check_vector(array, channels, name)
    return array.astype(FLOAT64)


def as_channels(vector: Any, channels: int, name: str) -> Channels:
    """Return a vector as the kernels want it: itself, if it is that already; else as `pack`."""
    array = as_array(vector, name)
    if array.dtype is FLOAT64 and array.shape == (channels,) and array.flags.carray:
        return array
    return pack(array, 0.0, channels, name)


def check_vector(array: np.ndarray[Any, Any], channels: int, name: str) -> None:
    """Raise unless ``array`` is a vector of ``channels`` real numbers.

    bfloat16 holds real numbers too, though NumPy calls its kind void.
    """
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name} should hold real numbers, got dtype {array.dtype}")
    if array.shape != (channels,):
        raise ValueError(
            f"{name} should contain {channels} elements not {array.size}: "
            f"expected shape ({channels},), got {array.shape}"
        )


def invstd(m2: Channels, count: int, eps: float) -> Channels:
    """Return 1 / sqrt(biased variance + eps)."""
    return _SILENT.copy().run(_invstd, m2, count or 1, eps)


def _invstd(m2: Channels, count: int, eps: float) -> Channels:
    # Arrays of no dimensions: with Python's numbers, each operation takes twice the time.
    # An eps of NumPy's float32 would round its product, and one of float16 overflow.
    n, n_eps = np.array(float(count)), np.array(count * float(eps))
    result: Channels = np.sqrt(n / (m2 + n_eps))
    return result


def update_running(
    statistics: Channels,
    count: int,
    factor: float,
    running_mean: np.ndarray[Any, Any] | None,
    running_var: np.ndarray[Any, Any] | None,
) -> None:
    """Move the running statistics towards a batch: new = (1 - factor) * old + factor * batch.

    The variance that goes in is the unbiased one. Computed in float64, rounded once.

    Parameters
    ----------
    statistics : ndarray of float64, shape (4, C)
        The old mean and variance, the batch's mean and its sum of squared deviations.
    count : int
        Elements per channel, 2 or more.
    factor : float
        The weight of the batch.
    running_mean, running_var : ndarray or None
        Where to write the new statistics.
    """
    _SILENT.copy().run(_update_running, statistics, count, factor, running_mean, running_var)


def moved(statistics: Channels, count: int, factor: float, dtype: Any) -> np.ndarray[Any, Any]:
    """Return what `update_running` would write, of ``dtype`` and shape (2, C)."""
    return _SILENT.copy().run(_moved, statistics, count, factor, dtype)


def _moved(statistics: Channels, count: int, factor: float, dtype: Any) -> np.ndarray[Any, Any]:
    terms = statistics * _shares(factor, count, statistics.shape[1])
    return (terms[:2] + terms[2:]).astype(dtype, copy=False)


def _update_running(
    statistics: Channels,
    count: int,
    factor: float,
    running_mean: np.ndarray[Any, Any] | None,
    running_var: np.ndarray[Any, Any] | None,
) -> None:
    new = _moved(statistics, count, factor, FLOAT64)
    if running_mean is not None:
        running_mean[...] = new[0]
    if running_var is not None:
        running_var[...] = new[1]


@lru_cache(maxsize=64)
def _shares(factor: float, count: int, channels: int) -> Channels:
    """Return what each row of ``statistics`` is multiplied with.

    In their full shape: with one number a row, the multiplication takes three times as long.
    """
    column = np.array([[1.0 - factor], [1.0 - factor], [factor], [factor / (count - 1)]])
    shares = np.repeat(column, channels, axis=1)
    shares.flags.writeable = False
    return shares
