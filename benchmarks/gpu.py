"""Cases on a GPU: torch's tensors there, who works on them, and how their calls are timed.

The suites are those of `cases.GPU_SUITES`. Everyone gets the same tensors.

    cuda     the layer, or the function that takes saved statistics; parameters are in host memory
    torch    `torch.nn.functional.batch_norm`, and the gradient that torch's autograd finds for it
    limit    a copy that moves as many bytes as the operation has to (see `cases.GPU_PASSES`)

torch takes cuDNN's kernels or its own, as it does for users.
"""

from __future__ import annotations

import functools
import importlib.util
from functools import cached_property, partial
from typing import Any

import contenders
from cases import EPS, GPU_SUITES, Case, Problem
from contenders import Contender, bnfast_layer
from measuring import Call
from numpy.typing import NDArray

PROFILED = ("gpu-resnet50",)
"""Suites of which the device time is taken too: their calls may be shorter than a launch."""


class Tensors:
    """A problem with its arrays on the GPU; for the rest, the problem itself."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.x, *dy = map(tensor, problem.inputs)
        if dy:
            (self.dy,) = dy

    @cached_property
    def out(self) -> Any:
        """What the row ``cuda out=`` writes to."""
        import torch

        return torch.empty_like(self.x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.problem, name)


def tensor(array: NDArray[Any]) -> Any:
    """Return a tensor on the GPU with the strides of an array."""
    import torch

    return torch.from_numpy(array).cuda()


@functools.lru_cache(1)  # arrays are large, and contenders of one problem come in a row
def tensors(problem: Problem) -> Tensors:
    """Return a problem on the GPU, the same for everyone."""
    return Tensors(problem)


class Timed:
    """A call whose times are taken by events of the GPU, on torch's current stream."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def __call__(self) -> Any:
        """Do the work once."""
        return self.call()

    def seconds(self, count: int) -> float:
        """Return the time of so many calls, from the end of another one to the end of the last.

        That one keeps the GPU busy until the first of them is on its way. Where Python is slower
        than the GPU, the time is Python's.
        """
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        result = self.call()
        start.record()
        for _ in range(count):
            result = self.call()
        end.record()
        end.synchronize()
        del result
        return float(start.elapsed_time(end)) / 1e3

    def device_seconds(self, count: int = 20) -> float | None:
        """Return the time of a call that the GPU spends in kernels and copies.

        None if torch's profiler cannot see them, which takes rights that not every machine gives.
        """
        import torch
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(count):
                result = self.call()
            torch.cuda.synchronize()
        del result
        microseconds = sum(row.self_device_time_total for row in profiler.key_averages())
        return microseconds / count / 1e6 if microseconds else None


def layer(problem: Problem, into_out: bool = False) -> Call:
    """Return our call: `contenders.bnfast_layer` on tensors."""
    given: Any = tensors(problem)
    return Timed(bnfast_layer(given, "cuda", into_out))


def torch_function(problem: Problem) -> Call:
    """Return torch's call."""
    import torch

    given: Any = tensors(problem)
    operation = problem.case.operation
    weight, bias, mean, var = map(
        tensor, (problem.weight, problem.bias, problem.running_mean, problem.running_var)
    )
    norm, training = torch.nn.functional.batch_norm, operation == "training"

    def forward() -> Any:
        with torch.inference_mode():
            return norm(given.x, mean, var, weight, bias, training, eps=EPS)

    if operation != "backward":
        return Timed(forward)
    sources = tuple(source.detach().requires_grad_() for source in (given.x, weight, bias))
    x, weight, bias = sources
    y = norm(x, mean, var, weight, bias, True, eps=EPS)
    return Timed(lambda: torch.autograd.grad(y, sources, given.dy, retain_graph=True))


class Copy(Timed):
    """A copy from one place on the GPU to another that moves the bytes of a case."""

    def __init__(self, problem: Problem) -> None:
        import torch

        half = problem.case.bytes // 2  # are read, and as many written
        self.source = torch.randint(256, (half,), dtype=torch.uint8, device="cuda")
        self.target = torch.empty_like(self.source)
        super().__init__(lambda: self.target.copy_(self.source))

    def check(self) -> None:
        """Raise AssertionError unless all bytes are moved."""
        import torch

        self.target.zero_()
        self()
        assert torch.equal(self.target, self.source)


def _instructions() -> str:
    return contenders.CONTENDERS["cuda"].instruction_set()


def _one_thread() -> int:
    return 1


_ROW = Contender(layer, ("numba-cuda",), _instructions, _one_thread, suites=GPU_SUITES)

CONTENDERS: dict[str, Contender] = {
    "cuda": _ROW,
    "cuda out=": _ROW._replace(make=partial(layer, into_out=True)),
    "torch": _ROW._replace(make=torch_function, packages=("torch",)),
    "limit": _ROW._replace(make=lambda problem: {"copy": Copy(problem)}, packages=("torch",)),
}


@functools.cache
def absent() -> str | None:
    """Return None, or why there are no rows on a GPU here."""
    if reason := contenders.absent("cuda"):
        return reason
    if not importlib.util.find_spec("torch"):
        return "torch not installed"
    import torch

    return None if torch.cuda.is_available() else "this torch finds no GPU"


def table(case: Case) -> dict[str, Contender]:
    """Return the contenders among which those of a case are."""
    return CONTENDERS if case.on_gpu else contenders.CONTENDERS


def present(case: Case) -> dict[str, Contender]:
    """Return the contenders of a case that can run here."""
    if case.on_gpu and absent():
        return {}
    return {
        name: contender
        for name, contender in table(case).items()
        if contender.takes(case) and (case.on_gpu or not contenders.absent(name))
    }


def circumstances(case: Case, call: Call) -> dict[str, Any]:
    """Return what there is to say of a row beyond what host rows have."""
    if not case.on_gpu:
        return {}
    import torch

    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name()}
    if case.suite in PROFILED and isinstance(call, Timed):
        seconds = call.device_seconds()
        found |= {} if seconds is None else {"device_us": 1e6 * seconds}
    return found
