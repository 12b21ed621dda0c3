"""Every check of a call's arguments, made before anything is computed or written."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from bnfast import channels, registry
from bnfast.deferred import refuse_deferred
from bnfast.device import DeviceArray, where
from bnfast.layout import Plan
from bnfast.spec import STORAGE_DTYPES, DeviceKernels, Kernels


def admit(x: Any, ndim: tuple[int, ...] | None, backend: str | None = None) -> NDArray[Any]:
    """Return ``x`` as an array of an accepted dtype and number of dimensions.

    ``ndim`` lists the numbers of dimensions to accept; None means any from 2 on. For an array that
    lives elsewhere than in host memory this is a `DeviceArray`, from the backend that reads it:
    ``backend``, or the choice in force.

    Raises
    ------
    TypeError
        For other dtypes, naming the cast to use, for masked arrays, whose mask would be lost, for
        dask arrays (a `Deferred`), and for what `registry.choose` refuses.
    ValueError
        For other numbers of dimensions.
    """
    if type(x) is not np.ndarray:
        refuse_deferred(x, "x")
        x = registry.describe(backend, x) or channels.as_array(x, "x")
    if x.dtype.char not in "fd":
        _check_storage(x, backend)
    if x.ndim not in ndim if ndim else x.ndim < 2:
        accepted = " or ".join(f"{n}D" for n in ndim) if ndim else "at least 2D"
        raise ValueError(
            f"expected {accepted} input (got {x.ndim}D input): axis 0 is the batch, axis 1 the "
            f"channels, got shape {x.shape}"
        )
    array: NDArray[Any] = x
    return array


def check_channels(x: NDArray[Any], num_features: int) -> None:
    """Raise ValueError unless an input of a layer has as many channels as the layer."""
    if x.shape[1] != num_features:
        raise ValueError(
            f"running_mean should contain {x.shape[1]} elements not {num_features}: "
            f"expected input with {num_features} channels on axis 1, got shape {x.shape}"
        )


def _check_storage(x: Any, backend: str | None) -> None:
    """Raise TypeError unless the backend takes the dtype of ``x``, neither float32 nor float64."""
    name = _storage_dtype(x.dtype)
    if name is None:
        expected = "expected an array of float16, bfloat16, float32 or float64"
    else:
        choice = registry.choice_for(backend, x)
        taken = getattr(choice.kernels, "STORAGE_DTYPES", ())
        if name in taken:
            return
        others = ", ".join(["float32", *taken])
        expected = f"backend {choice.name!r} takes arrays of {others} and float64 here"
    raise TypeError(
        f"{expected}, got dtype {x.dtype}; cast it first, for example x.astype(np.float32)"
    )


@functools.cache
def _storage_dtype(dtype: np.dtype[Any]) -> str | None:
    """Return the name of a 16-bit dtype; None for all others. NumPy takes 1 us to make a name."""
    return dtype.name if dtype.name in STORAGE_DTYPES else None


def is_relu(activation: str | None) -> bool:
    """Return whether ``activation`` is "relu"; raise ValueError if it is unknown."""
    if activation is None:
        return False
    if activation == "relu":
        return True
    raise ValueError(f'unknown activation {activation!r}: expected None or "relu"')


def check_eps(eps: float, training: bool) -> None:
    """Raise ValueError unless ``eps`` is finite and not negative; in training it must exceed 0."""
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"batch_norm eps must be finite and non-negative, but got {eps}")
    if training and eps == 0.0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")


def check_like(array: Any, x: NDArray[Any], name: str, kernels: Kernels) -> NDArray[Any]:
    """Return ``array`` as an array; raise unless it has the shape, dtype and place of ``x``."""
    if type(array) is not type(x):  # x is a NumPy array and nothing more, or a DeviceArray
        array = _beside(array, x, name, kernels)
        if not isinstance(array, DeviceArray):
            array = channels.as_array(array, name)
    if array.shape != x.shape:
        raise ValueError(f"{name} should have the shape of x, {x.shape}, got {array.shape}")
    if array.dtype.char != x.dtype.char:
        raise TypeError(f"{name} should have the dtype of x, {x.dtype}, got {array.dtype}")
    checked: NDArray[Any] = array
    return checked


def check_out(
    out: Any,
    x: NDArray[Any],
    plan: Plan,
    kernels: Kernels,
    may_be: Mapping[str, NDArray[Any] | None],
) -> Any:
    """Return ``out`` if it can take the result of a call on ``x``, a device's array described.

    It may be one of the arrays of ``may_be`` itself, but overlaps none of them otherwise.
    """
    if type(out) is not type(x):
        out = _beside(out, x, "out", kernels)
        if not isinstance(out, np.ndarray | DeviceArray):
            raise TypeError(f"out should be an array like x, got {type(out).__name__}")
        channels.refuse_mask(out)
    if out.shape != plan.shape:
        raise ValueError(f"out should have the shape of x, {plan.shape}, got {out.shape}")
    if out.dtype is not plan.dtype and out.dtype != plan.dtype:  # to compare takes 0.1 us
        raise TypeError(f"out should have dtype {plan.dtype}, got {out.dtype}")
    if not out.flags.carray:  # which is contiguous and writable; that covers most calls
        if not out.flags.writeable:
            raise ValueError("out is read-only")
        if _repeats(out):
            raise ValueError("out has elements that share their memory")
    for name, array in may_be.items():
        if array is not out and _overlap(out, array) and not is_same(out, array):
            raise ValueError(f"out overlaps {name} without being {name} itself")
    return out


def check_apart(out: Any, arrays: Mapping[str, Any]) -> None:
    """Raise ValueError if ``out`` overlaps one of ``arrays``."""
    if isinstance(out, np.ndarray | DeviceArray):
        for name, array in arrays.items():
            if _overlap(out, array):
                raise ValueError(f"out overlaps {name}")


def _beside(array: Any, x: Any, name: str, kernels: Kernels) -> Any:
    """Return what stands for ``array`` in a call on ``x``; raise unless both are in one place."""
    refuse_deferred(array, name)
    if not isinstance(array, np.ndarray) and kernels.accepts(array):
        array = cast("DeviceKernels", kernels).describe(array)
    if where(array) != where(x):
        raise TypeError(
            f"{name} is {where(array)}, but x is {where(x)}: the arrays of a call lie in one "
            "place; copy one of them to where the other is"
        )
    return array


def is_same(a: Any, b: Any) -> bool:
    """Return whether two arrays of one shape are the same elements in the same places."""
    if a is b or not np.may_share_memory(a, b):
        return a is b
    if a.__array_interface__["data"] != b.__array_interface__["data"]:
        return False
    return all(
        n <= 1 or one == other for n, one, other in zip(a.shape, a.strides, b.strides, strict=True)
    )


def _repeats(array: Any) -> bool:
    """Return whether several elements of the array lie in one place, wholly or in part."""
    extent = array.dtype.itemsize
    long = [(abs(step), n) for n, step in zip(array.shape, array.strides, strict=True) if n > 1]
    for step, n in sorted(long):
        if step < extent:
            # Axes that reach into each other, as only as_strided makes them: they may interleave.
            return array.size > 0 and (step == 0 or _collides(array))
        extent += step * (n - 1)
    return False


def _collides(array: NDArray[Any]) -> bool:
    places: NDArray[np.int64] = np.zeros((), np.int64)
    for n, step in zip(array.shape, array.strides, strict=True):
        places = np.add.outer(places, step * np.arange(n))
    return bool((np.diff(np.sort(places, axis=None)) < array.dtype.itemsize).any())


def _overlap(a: Any, b: Any) -> bool:
    """Return whether two arrays share memory, or that is too hard to tell; None shares none."""
    if b is None or not np.may_share_memory(a, b):
        return False
    max_work: Any = 100_000  # the problem is NP-complete; NumPy's stub knows -1 and 0 alone
    try:
        return np.shares_memory(a, b, max_work=max_work)
    except np.exceptions.TooHardError:
        return True


def check_both_running(mean: Any, var: Any) -> None:
    """Raise ValueError if one of the running statistics is None and the other is not."""
    if (mean is None) is not (var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")


def check_running(running: Any, count: int, name: str) -> None:
    """Raise unless ``running`` is a vector of ``count`` that can be updated in place."""
    if not isinstance(running, np.ndarray):
        channels.refuse_device(running, name)
        raise TypeError(f"{name} should be an array: training updates it in place")
    channels.refuse_mask(running)
    channels.check_vector(running, count, name)
    if running.dtype.kind in "iu":
        raise TypeError(
            f"{name} should be floating, got {running.dtype}: training updates it in place"
        )
    if not running.flags.writeable:
        raise ValueError(f"{name} is read-only: training updates it in place")
