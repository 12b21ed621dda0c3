"""A layer of given numbers: what the converters have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, TypeVar

import numpy as np

from bnfast import channels
from bnfast.interop.arrays import as_numpy
from bnfast.state import VECTORS, check_variance

LayerT = TypeVar("LayerT")


def weight_of_new(weight_of_old: float | np.floating[Any]) -> float:
    """Return 1 - momentum, in decimals: that of 0.9 is 0.1, and not 0.09999999999999998."""
    return float(1 - Decimal(str(weight_of_old)))


def assemble(
    cls: type[LayerT],
    vectors: Mapping[str, tuple[str, Any]],
    *,
    eps: float,
    momentum: float | None,
    activation: str | None,
    backend: str | None,
    num_features: int | None = None,
    count: int = 0,
    tracks: bool | None = None,
) -> LayerT:
    """Return a layer in eval mode.

    Parameters
    ----------
    cls : type
        The class of the layer.
    vectors : mapping
        For each of weight, bias, running_mean and running_var its name where it comes from, for
        messages, and its value, or None for what the layer is to lack.
    eps, momentum, activation, backend
        As in the constructor.
    num_features : int, optional
        Needed where there is no vector to count.
    count : int
        Batches that the running statistics have seen.
    tracks : bool, optional
        Whether training updates them. It may differ from whether there are any.
    """
    found = {
        own: (name, as_numpy(value, name))
        for own, (name, value) in vectors.items()
        if value is not None
    }
    for name, array in found.values():
        if num_features is None:
            num_features = array.size
        channels.check_vector(array, num_features, name)
    if ("running_mean" in found) is not ("running_var" in found):
        names = [vectors[own][0] for own in VECTORS[2:]]
        raise ValueError(f"{names[0]} and {names[1]} must either both be None or neither be None")
    if "running_var" in found:
        name, array = found["running_var"]
        check_variance(array, name)
    double = any(array.dtype == np.float64 for _, array in found.values())
    make: Callable[..., Any] = cls
    layer = make(
        num_features,
        eps,
        momentum,
        affine="weight" in found or "bias" in found,
        track_running_stats="running_mean" in found,
        bias="bias" in found,
        dtype=np.float64 if double else np.float32,
        activation=activation,
        backend=backend,
    )
    for own in VECTORS:
        setattr(layer, own, found[own][1] if own in found else None)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked = count
    if tracks is not None:
        layer.track_running_stats = tracks
    converted: LayerT = layer.eval()
    return converted
