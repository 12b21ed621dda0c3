"""One guarded call of a kernel.

Each IN array is a read-only copy in a frame of NaN, so that reading past an end shows; it must
come back with the bits it had. Each OUT array lies in a frame of a number that no kernel
computes, which must survive, and is prefilled, so that an element not written shows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bnfast.spec import Kernels
from bnfast.testing.cases import Inputs

Outputs: TypeAlias = dict[str, NDArray[Any]]
Run: TypeAlias = Callable[..., Outputs]
"""`run` with its first argument given."""

FRAME = 64
"""Elements of frame at either end: two cache lines of float32, more than any vector."""

CANARY = -0.123456789
CHANNEL_VECTORS = {"mean", "m2", "sum_dy", "sum_dy_xhat"}


def run(
    kernels: Kernels,
    operation: str,
    inputs: Inputs,
    *,
    relu: bool = False,
    num_threads: int = 2,
    alias: str | None = None,
    dresidual: bool = True,
    prefill: float = np.nan,
    offset: int = 0,
) -> Outputs:
    """Call one kernel and return its OUT arrays by name.

    Parameters
    ----------
    operation
        A function of `bnfast.spec.Kernels`; its signature there says what to hand over.
    alias
        The IN array in which the main output (y or dx) is to be computed.
    dresidual
        Whether to ask for that output.
    prefill
        What OUT arrays hold before the call.
    offset
        Elements by which every array is moved in memory, to vary its alignment.
    """
    names_in, names_out = arguments_of(operation)
    arguments = [getattr(inputs, name) for name in names_in]
    if not relu and operation.startswith("backward"):
        arguments[names_in.index("y")] = None
    originals = list(arguments)
    for i, value in enumerate(arguments):
        if isinstance(value, np.ndarray):
            arguments[i] = _framed(value, np.nan, offset)
            arguments[i].flags.writeable = names_in[i] == alias

    frames = {}
    keywords: dict[str, Any] = {"relu": relu, "num_threads": num_threads}
    for name in names_out:
        if name == "dresidual" and not dresidual:
            keywords[name] = None
        elif alias is not None and name in ("y", "dx"):
            keywords[name] = arguments[names_in.index(alias)]
        elif name not in keywords:
            vector = name in CHANNEL_VECTORS
            shape, dtype = (inputs.mean.shape, np.float64) if vector else _form(inputs.x)
            keywords[name] = _framed(np.full(shape, prefill, dtype), CANARY, offset)
            frames[name] = keywords[name].base

    getattr(kernels, operation)(*arguments, **{name: keywords[name] for name in names_out})

    for name, before, after in zip(names_in, originals, arguments, strict=True):
        if isinstance(after, np.ndarray) and name != alias:
            assert before.tobytes() == after.tobytes(), f"{operation} modified its input {name}"
    for name, buffer in frames.items():
        outside = np.concatenate([buffer[: FRAME + offset], buffer[-FRAME:]])
        assert (outside == outside.dtype.type(CANARY)).all(), f"{operation} wrote outside {name}"
    return {
        name: value
        for name, value in keywords.items()
        if name in names_out and isinstance(value, np.ndarray)
    }


def arguments_of(operation: str) -> tuple[list[str], list[str]]:
    """Return the names of a kernel's positional arguments, and of its keyword arguments."""
    parameters = inspect.signature(getattr(Kernels, operation)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return positional[1:], [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def _form(x: NDArray[Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    return x.shape, x.dtype


def _framed(values: NDArray[Any], frame: float, offset: int) -> NDArray[Any]:
    """Return a copy of ``values`` as a view into a longer buffer, which is its ``base``."""
    buffer = np.full(values.size + 2 * FRAME + offset, frame, values.dtype)
    inside = buffer[FRAME + offset : FRAME + offset + values.size].reshape(values.shape)
    inside[...] = values
    return inside
