"""Training whose statistics are pooled with those of other batches, between the kernels' halves.

The two calls are those of `bnfast.functional`, cut in the middle: the reductions of this batch,
then a function that pools them with those of others, then the elementwise half with what it
returns. What can fail for reasons of this batch alone does so before the function is called,
memory included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfast import layout, registry, threads
from bnfast.checks import check_like
from bnfast.packed import Gradients, deliver, forward_arrays
from bnfast.spec import Channels


def train(
    pool: Callable[[int, Channels, Channels], int],
    x: NDArray[Any],
    weight: Channels,
    bias: Channels,
    mean: Channels,
    m2: Channels,
    eps: float,
    residual: Any,
    relu: bool,
    out: Any,
    backend: str | None,
) -> tuple[NDArray[Any], int]:
    """Run ``moments`` and ``normalize``, as `packed.train` runs ``train``.

    ``pool(n, mean, m2)`` gets the elements per channel and the moments of this batch, puts those of
    all batches in the place of the latter, and returns their elements per channel.
    """
    kernels = registry.choose(backend, x)
    plan = layout.plan(x.shape, x.strides, x.dtype)
    x_form, residual_form, out, y, y_form = forward_arrays(x, residual, out, plan, kernels)
    threads.run(kernels.moments, x.size, x_form, mean=mean, m2=m2)
    count = pool(plan.count, mean, m2)
    var = m2 / (count or 1)
    threads.run(
        kernels.normalize,
        x.size,
        x_form,
        mean,
        var,
        weight,
        bias,
        eps,
        residual_form,
        y=y_form,
        relu=relu,
    )
    return y if out is None else deliver(out, y, kernels), count


def backward(
    pool: Callable[[Channels, Channels], None],
    count: int,
    dy: Any,
    x: NDArray[Any],
    y: Any,
    mean: Channels,
    invstd: Channels,
    weight: Channels,
    want_residual: bool,
    backend: str | None,
) -> Gradients:
    """Run ``backward_sums`` and ``backward_input``, as `packed.backward` runs both.

    ``count`` is the number of elements per channel of all batches. ``pool(sum_dy, sum_dy_xhat)``
    puts the sums over all batches in the place of those over this one.
    """
    kernels = registry.choose(backend, x)
    plan = layout.plan(x.shape, x.strides, x.dtype)
    dy = check_like(dy, x, "dy", kernels)
    relu = y is not None
    y_form = kernels.view(check_like(y, x, "y", kernels), plan) if relu else None
    dx = kernels.empty(plan, x)
    dx_form = kernels.view(dx, plan)
    dresidual = kernels.empty(plan, like=x) if want_residual else None
    dresidual_form = None if dresidual is None else kernels.view(dresidual, plan)
    dy_form, x_form = kernels.view(dy, plan), kernels.view(x, plan)
    sum_dy, sum_dy_xhat = np.empty(mean.shape), np.empty(mean.shape)
    threads.run(
        kernels.backward_sums,
        x.size,
        dy_form,
        x_form,
        y_form,
        mean,
        invstd,
        sum_dy=sum_dy,
        sum_dy_xhat=sum_dy_xhat,
        relu=relu,
    )
    pool(sum_dy, sum_dy_xhat)
    threads.run(
        kernels.backward_input,
        x.size,
        dy_form,
        x_form,
        y_form,
        mean,
        invstd,
        weight,
        sum_dy,
        sum_dy_xhat,
        count or 1,
        dx=dx_form,
        dresidual=dresidual_form,
        relu=relu,
    )
    return Gradients(dx, sum_dy_xhat, sum_dy, dresidual)
