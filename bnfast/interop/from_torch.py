"""torch's BatchNorm modules: the same conventions, in tensors."""

from __future__ import annotations

import re
from typing import Any

from bnfast.interop.arrays import as_numpy
from bnfast.interop.assembling import LayerT, assemble
from bnfast.state import VECTORS, as_counter


def convert(cls: type[LayerT], module: Any, activation: str | None, backend: str | None) -> LayerT:
    """Return what ``cls.from_torch`` does."""
    _check_kind(cls, module)
    counter = "num_batches_tracked"
    count = getattr(module, counter, None)
    return assemble(
        cls,
        {name: (name, getattr(module, name)) for name in VECTORS},
        eps=float(module.eps),
        # Modules that were frozen have no momentum, and no use for one.
        momentum=getattr(module, "momentum", 0.1),
        activation=activation,
        backend=backend,
        num_features=getattr(module, "num_features", None),
        count=0 if count is None else as_counter(as_numpy(count, counter), counter),
        tracks=getattr(module, "track_running_stats", None),
    )


def _check_kind(cls: type, module: Any) -> None:
    """Raise TypeError for a module that is no batch norm, or one of other inputs than ``cls``'s.

    Other normalisations, such as InstanceNorm, have the same attributes.
    """
    names = [base.__name__ for base in type(module).__mro__]
    other = next(
        (name for name in names if re.search(r"(Instance|Layer|Group|RMS)Norm", name)), None
    )
    missing = [name for name in (*VECTORS, "eps") if not hasattr(module, name)]
    if other or missing:
        reason = "another normalisation" if other else f"which has no {', '.join(missing)}"
        raise TypeError(
            f"expected a BatchNorm module of torch, got {type(module).__name__}, {reason}"
        )
    rank = next((name for name in names if re.fullmatch(r"BatchNorm[123]d", name)), cls.__name__)
    if rank != cls.__name__:
        raise TypeError(
            f"{cls.__name__}.from_torch expected a {cls.__name__}, got a {rank}: "
            f"use bnfast.{rank}.from_torch"
        )
