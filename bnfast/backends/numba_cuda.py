"""The CUDA backend: kernels for NVIDIA GPUs, compiled by Numba at first use.

This module is the front, and imports neither Numba nor the driver: `unavailable` says in a sentence
what is missing. The kernels, and what launches them, are in `bnfast.backends.cuda_kernels`.

``num_threads`` does not concern a GPU.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from bnfast.backends.cuda_kernels import failures
from bnfast.device import DeviceArray
from bnfast.layout import Plan
from bnfast.spec import STORAGE_DTYPES as STORAGE_DTYPES
from bnfast.spec import Channels, Floats


def unavailable() -> str | None:
    """Return None, or one sentence saying why the backend cannot run and what to install."""
    try:
        from bnfast.backends.cuda_kernels import driver
    except ImportError as error:
        return failures.not_imported(error)
    return driver.unavailable()


def instruction_set() -> str:
    """Return "simulator", or the compute capability of the current device."""
    return str(_launching().instruction_set())


def accepts(x: object) -> bool:
    """Return whether ``x`` is an array that this backend reads where it lies, or copies."""
    return bool(_arrays().accepts(x))


def view(x: Any, plan: Plan) -> Floats:
    """Return ``x`` in the form that ``plan`` names: a view where it can be, else one copy."""
    form: Floats = _arrays().view(x, plan)
    return form


def empty(plan: Plan, like: Any) -> Any:
    """Return a new, uninitialised array of ``plan.shape`` in the memory order of ``plan``."""
    return _arrays().empty(plan, like)


def describe(x: Any) -> DeviceArray:
    """Return what is known of an array on a GPU; see `bnfast.backends.cuda_kernels.arrays`."""
    described: DeviceArray = _arrays().describe(x)
    return described


def assign(out: DeviceArray, y: Any) -> None:
    """Copy a new array to a described one in any memory order."""
    _arrays().assign(out, y)


def moments(x: Floats, *, mean: Channels, m2: Channels, num_threads: int) -> None:
    """See `bnfast.spec.Kernels.moments`."""
    if x.size == 0:
        mean[:] = m2[:] = 0.0
        return
    launch = _launching()
    with launch.Call(x) as call:
        call.bring(launch.measure(call, call.read(x)), mean, m2)


def normalize(
    x: Floats,
    mean: Channels,
    var: Channels,
    weight: Channels,
    bias: Channels,
    eps: float,
    residual: Floats | None,
    *,
    y: Floats,
    relu: bool,
    num_threads: int,
) -> None:
    """See `bnfast.spec.Kernels.normalize`."""
    if x.size == 0:
        return
    launch = _launching()
    with launch.Call(x) as call:
        sent = call.send(mean, var, weight, bias)
        at = launch.pointer(sent), launch.pointer(sent, 2 * mean.size)
        arrays = call.read(x), call.read(residual), call.write(y)
        launch.normalize(call, *arrays, *at, eps, 1.0, relu, reverse=False)


def train(
    x: Floats,
    weight: Channels,
    bias: Channels,
    eps: float,
    residual: Floats | None,
    *,
    y: Floats,
    mean: Channels,
    m2: Channels,
    relu: bool,
    num_threads: int,
) -> None:
    """See `bnfast.spec.Kernels.train`."""
    if x.size == 0:
        mean[:] = m2[:] = 0.0
        return
    launch = _launching()
    with launch.Call(x) as call:
        sent = call.send(weight, bias)
        given = call.read(x)
        result = launch.measure(call, given)
        at = launch.pointer(result), launch.pointer(sent)
        arrays = given, call.read(residual), call.write(y)
        launch.normalize(call, *arrays, *at, eps, _count(x), relu, reverse=True)
        call.bring(result, mean, m2)


def backward_sums(
    dy: Floats,
    x: Floats,
    y: Floats | None,
    mean: Channels,
    invstd: Channels,
    *,
    sum_dy: Channels,
    sum_dy_xhat: Channels,
    relu: bool,
    num_threads: int,
) -> None:
    """See `bnfast.spec.Kernels.backward_sums`."""
    if x.size == 0:
        sum_dy[:] = sum_dy_xhat[:] = 0.0
        return
    launch = _launching()
    with launch.Call(x) as call:
        arrays = call.read(dy), call.read(x), call.read(y if relu else None)
        result = launch.add_up(call, *arrays, call.send(mean, invstd), relu)
        call.bring(result, sum_dy, sum_dy_xhat)


def backward_input(
    dy: Floats,
    x: Floats,
    y: Floats | None,
    mean: Channels,
    invstd: Channels,
    weight: Channels,
    sum_dy: Channels,
    sum_dy_xhat: Channels,
    count: int,
    *,
    dx: Floats,
    dresidual: Floats | None,
    relu: bool,
    num_threads: int,
) -> None:
    """See `bnfast.spec.Kernels.backward_input`."""
    if x.size == 0:
        return
    launch = _launching()
    with launch.Call(x) as call:
        sent = call.send(mean, invstd, weight, sum_dy, sum_dy_xhat)
        at = launch.pointer(sent), launch.pointer(sent, 3 * mean.size)
        arrays = call.read(dy), call.read(x), call.read(y if relu else None)
        results = call.write(dx), call.write(dresidual)
        launch.differentiate(call, *arrays, *results, *at, float(count), relu, reverse=False)


def backward(
    dy: Floats,
    x: Floats,
    y: Floats | None,
    mean: Channels,
    invstd: Channels,
    weight: Channels,
    *,
    dx: Floats,
    dresidual: Floats | None,
    sum_dy: Channels,
    sum_dy_xhat: Channels,
    relu: bool,
    num_threads: int,
) -> None:
    """See `bnfast.spec.Kernels.backward`."""
    if x.size == 0:
        sum_dy[:] = sum_dy_xhat[:] = 0.0
        return
    launch = _launching()
    with launch.Call(x) as call:
        sent = call.send(mean, invstd, weight)
        arrays = call.read(dy), call.read(x), call.read(y if relu else None)
        sums = launch.add_up(call, *arrays, sent, relu)
        at = launch.pointer(sent), launch.pointer(sums)
        results = call.write(dx), call.write(dresidual)
        launch.differentiate(call, *arrays, *results, *at, _count(x), relu, reverse=True)
        call.bring(sums, sum_dy, sum_dy_xhat)


def _count(x: Floats) -> float:
    """Return the number of elements per channel."""
    return float(x.size // x.shape[1])


@functools.cache
def _launching() -> ModuleType:
    from bnfast.backends.cuda_kernels import launch

    return launch


@functools.cache
def _arrays() -> ModuleType:
    from bnfast.backends.cuda_kernels import arrays

    return arrays
