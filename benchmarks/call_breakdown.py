"""Where the time of a small call goes: ``python benchmarks/call_breakdown.py``, half a minute.

Times the whole calls on (1, 64, 8, 8) float32, what they are measured against, and each step on its
own, in an order that rotates from round to round; medians in nanoseconds. The steps of a call add
up to less than the call: alone in a loop, a step finds its code and its data at hand.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import numpy as np

import bnfast
import bnfast.functional as F
from bnfast import channels, checks, layout, registry, threads

try:
    import torch
except ImportError:
    torch = None

ROUNDS, CALLS = 60, 200


def claim_and_free(elements: int) -> None:
    num_threads = threads.claim(elements)
    threads.free[num_threads > 1] = True


def main(rounds: int = ROUNDS, calls: int = CALLS) -> None:
    """Measure and print one line for each."""
    timed = whole_calls() | steps()
    names = list(timed)
    times: dict[str, list[float]] = {name: [] for name in names}
    with inference_mode():
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                timeit.timeit(timed[name], number=calls // 10)
                times[name].append(timeit.timeit(timed[name], number=calls) / calls)
    nothing = median(times.pop("nothing"))
    print(f"backend {bnfast.get_backend()}, nanoseconds")
    for name, samples in times.items():
        print(f"{name:42} {(median(samples) - nothing) * 1e9:7.0f}")


def whole_calls() -> dict[str, Callable[[], Any]]:
    """Return the calls of bnfast, and those that they are compared with."""
    x, dy, out = arrays()
    evaluating, training, trained = (bnfast.BatchNorm2d(64) for _ in range(3))
    evaluating.eval()
    trained(x)
    vectors = [vector.copy() for vector in trained.state_dict().values()][:4]
    weight, bias, mean, var = vectors
    _, batch_mean, invstd = F.batch_norm_with_stats(x)
    scale, shift = np.ones((2, 1, 64, 1, 1), np.float32)

    def backward() -> None:
        trained.zero_grad()
        trained.backward(dy)

    def folded() -> None:
        np.multiply(x, scale, out=out)
        np.add(out, shift, out=out)

    calls: dict[str, Callable[[], Any]] = {
        "nothing": lambda: None,
        "eval, bn(x)": lambda: evaluating(x),
        "eval, bn(x, out=out)": lambda: evaluating(x, out=out),
        "training, bn(x)": lambda: training(x),
        "bn.backward(dy)": backward,
        "F.batch_norm, eval": lambda: F.batch_norm(x, mean, var, weight, bias),
        "F.batch_norm, training": lambda: F.batch_norm(x, mean, var, weight, bias, training=True),
        "F.batch_norm_backward": lambda: F.batch_norm_backward(dy, x, weight, batch_mean, invstd),
        "NumPy, folded, two ufuncs with out=": folded,
    }
    if torch is None:
        return calls
    torch.set_num_threads(2)
    module, module_training = torch.nn.BatchNorm2d(64).eval(), torch.nn.BatchNorm2d(64)
    tensor = torch.from_numpy(x)
    calls["torch, eval"] = lambda: module(tensor)
    calls["torch, training"] = lambda: module_training(tensor)
    return calls


def steps() -> dict[str, Callable[[], Any]]:
    """Return the steps that the calls are made of."""
    x, dy, out = arrays()
    layer = bnfast.BatchNorm2d(64)
    kernels, plan = registry.choose(None, x), layout.plan(x.shape, x.strides, x.dtype)
    form, y, dy_form = kernels.view(x, plan), kernels.view(out, plan), kernels.view(dy, plan)
    statistics = np.ones((4, 64))
    w, b, m, v, first, second = np.ones((6, 64))
    common = {"relu": False, "num_threads": 1}
    return {
        "step: check the input": lambda: checks.admit(x, (4,)),
        "step: choose the backend": lambda: registry.choose(None, x),
        "step: plan the layout": lambda: layout.plan(x.shape, x.strides, x.dtype),
        "step: the layer's vectors, unchanged": lambda: layer._packed(),
        "step: pack one vector of F.batch_norm": lambda: channels.pack(w, 1.0, 64, "weight"),
        "step: check out": lambda: checks.check_out(out, x, plan, kernels, {"x": x}),
        "step: view an array as its kernel form": lambda: kernels.view(x, plan),
        "step: a new output": lambda: kernels.empty(plan, x),
        "step: claim and free the threads": lambda: claim_and_free(x.size),
        "step: running statistics": lambda: channels.update_running(statistics, 64, 0.1, m, v),
        "step: invstd for backward": lambda: channels.invstd(v, 64, 1e-5),
        "kernel: normalize": lambda: kernels.normalize(form, m, v, w, b, 1e-5, None, y=y, **common),
        "kernel: train": lambda: kernels.train(
            form, w, b, 1e-5, None, y=y, mean=first, m2=second, **common
        ),
        "kernel: backward": lambda: kernels.backward(
            dy_form, form, None, m, v, w,
            dx=y, dresidual=None, sum_dy=first, sum_dy_xhat=second, **common,
        ),
    }  # fmt: skip


def inference_mode() -> AbstractContextManager[Any]:
    """Return the mode in which torch's module saves nothing for a backward pass."""
    return nullcontext() if torch is None else torch.inference_mode()


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return an input, a gradient and room for a result."""
    x, dy = np.random.default_rng(0).normal(size=(2, 1, 64, 8, 8)).astype(np.float32)
    return x, dy, np.empty_like(x)


if __name__ == "__main__":
    main()
