"""Keras's BatchNormalization layers: other names, and a momentum that weighs the old value."""

from __future__ import annotations

from typing import Any

from bnfast.interop.assembling import LayerT, assemble, weight_of_new

_NAMES = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}


def convert(cls: type[LayerT], layer: Any, activation: str | None, backend: str | None) -> LayerT:
    """Return what ``cls.from_keras`` does."""
    kind = type(layer).__name__
    missing = [name for name in ("epsilon", "momentum") if not hasattr(layer, name)]
    if missing:
        raise TypeError(
            f"expected a BatchNormalization layer of Keras, got {kind}, "
            f"which has no {', '.join(missing)}"
        )
    # center=False and scale=False leave beta and gamma out.
    vectors = {own: (name, _value(getattr(layer, name, None))) for own, name in _NAMES.items()}
    if vectors["running_mean"][1] is None:
        raise ValueError(f"{kind} has no moving_mean yet: build it, or call it once")
    return assemble(
        cls,
        vectors,
        eps=float(layer.epsilon),
        momentum=weight_of_new(layer.momentum),
        activation=activation,
        backend=backend,
    )


def _value(variable: Any) -> Any:
    """Return the array or tensor that a variable of Keras 3 wraps; anything else as it is."""
    value = getattr(variable, "value", variable)
    return variable if callable(value) else value
