"""What each batch-norm node of an ONNX model costs, in onnx's operator and in bnfast's.

The model runs once. Each batch norm that comes up is computed several times there and then, in
either operator in turns, on the arrays that the model has at that point. What the run takes besides
that is the time of all other nodes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from onnx import ModelProto
from onnx.reference.ops import load_op

from bnfast.interop.onnx import BatchNormalization, ReferenceEvaluator

_COLUMNS = ("node", "shape", "dtype", "calls", "stock", "bnfast", "faster", "share", "share now")


@dataclass(frozen=True, slots=True)
class NodeTime:
    """A batch-norm node, on arrays of one shape and dtype.

    Attributes
    ----------
    name : str
        The node's name, or that of its first output if it has none.
    shape : tuple of int
        Of X.
    dtype : str
        Of X.
    calls : int
        How often the run calls it: more than once in a loop, or in a function.
    stock : float or None
        Seconds for all calls in onnx's operator; None if that one raises an error.
    bnfast : float
        Seconds for all calls in bnfast's.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    calls: int
    stock: float | None
    bnfast: float

    @property
    def speedup(self) -> float | None:
        """How many times longer the stock operator takes; None if it raises an error."""
        return None if self.stock is None else self.stock / self.bnfast


@dataclass(frozen=True, slots=True)
class Profile:
    """Where the time of a run goes.

    Attributes
    ----------
    rows : tuple of NodeTime
        The batch-norm nodes, in the order in which they were first called.
    other : float
        Seconds in all other nodes.
    """

    rows: tuple[NodeTime, ...]
    other: float

    @property
    def stock(self) -> float:
        """Seconds in batch norm with onnx's operator, where it raises no error."""
        return sum(row.stock or 0.0 for row in self.rows)

    @property
    def bnfast(self) -> float:
        """Seconds in batch norm with bnfast's operator."""
        return sum(row.bnfast for row in self.rows)

    def __str__(self) -> str:
        """Return a table: times in milliseconds, shares of the run with either operator."""
        compared = [row for row in self.rows if row.stock is not None]
        finishes = len(compared) == len(self.rows)
        whole = self.stock + self.other if finishes else None
        whole_now = self.bnfast + self.other
        lines = [list(_COLUMNS)]
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            lines.append([row.name, shape, row.dtype, str(row.calls)])
            lines[-1] += _cells(row.stock, row.bnfast, row.bnfast, whole, whole_now)
        calls = str(sum(row.calls for row in self.rows))
        lines.append(["all batch norms", "", "", calls])
        as_stock = sum(row.bnfast for row in compared)
        lines[-1] += _cells(self.stock or None, self.bnfast, as_stock, whole, whole_now)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(
                cell.ljust(width) if number < 3 else cell.rjust(width)
                for number, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        rule = "  ".join("-" * width for width in widths)
        before = "fails" if whole is None else f"{whole * 1e3:.1f}"
        end = f"times in ms; the run: {before} with the stock operator, "
        end += f"{whole_now * 1e3:.1f} with bnfast"
        if not finishes:
            end += "; faster: of the nodes that the stock operator runs"
        return "\n".join([table[0], rule, *table[1:-1], rule, table[-1], end])


def _cells(
    stock: float | None, bnfast: float, as_stock: float, whole: float | None, whole_now: float
) -> list[str]:
    """Return the cells of a line from "stock" on; ``as_stock`` is what stock is compared with."""
    times = ["fails", f"{bnfast * 1e3:.3f}", "", ""]
    if stock:
        share = "" if whole is None else f"{stock / whole:.1%}"
        times = [f"{stock * 1e3:.3f}", times[1], f"{stock / as_stock:.1f}x", share]
    return [*times, f"{bnfast / whole_now:.1%}"]


def measure(model: Any, inputs: Mapping[str, Any], repeat: int, progress: bool) -> Profile:
    """Return what `bnfast.interop.onnx.profile` does."""
    if repeat < 1:
        raise ValueError(f"repeat should be at least 1, got {repeat}")
    calls: dict[tuple[Any, ...], list[tuple[float | None, float]]] = {}
    spent = [0.0]

    class Timed(BatchNormalization):
        """Computes and times, and keeps the times by node, shape and dtype."""

        def __init__(self, onnx_node: Any, run_params: dict[str, Any]) -> None:
            super().__init__(onnx_node, run_params)
            opset = run_params["opsets"][""]
            try:
                self._stock = load_op("", "BatchNormalization", opset)(onnx_node, run_params)
            except Exception:  # up to opset 5 there is none
                self._stock = None

        def run(self, *inputs: Any, **options: Any) -> Any:
            start = time.perf_counter()
            outputs = super().run(*inputs, **options)  # errors in the input surface here
            name = self.onnx_node.name or self.onnx_node.output[0]
            key = (id(self), name, inputs[0].shape, str(inputs[0].dtype))
            times = _medians(self._stock, super().run, inputs, options, repeat)
            calls.setdefault(key, []).append(times)
            spent[0] += time.perf_counter() - start
            return outputs

    # The evaluator knows an operator by the name of its class.
    Timed.__name__ = BatchNormalization.__name__
    settings = {"fuse": False, "_operator": Timed}
    evaluator = type("ReferenceEvaluator", (ReferenceEvaluator,), settings)(model)
    if not isinstance(evaluator.proto_, ModelProto):
        raise ValueError(f"expected a model, got a {type(evaluator.proto_).__name__}")
    if progress:
        evaluator.rt_nodes_ = _shown(evaluator.rt_nodes_)
    start = time.perf_counter()
    evaluator.run(None, dict(inputs))
    other = time.perf_counter() - start - spent[0]
    rows = []
    for (_, name, shape, dtype), times in calls.items():
        stock = [first for first, _ in times if first is not None]
        rows.append(
            NodeTime(
                name,
                shape,
                dtype,
                len(times),
                sum(stock) if len(stock) == len(times) else None,
                sum(second for _, second in times),
            )
        )
    return Profile(tuple(rows), other)


def _medians(
    stock: Any, own: Any, inputs: tuple[Any, ...], options: dict[str, Any], repeat: int
) -> tuple[float | None, float]:
    """Return the median seconds of both operators; None for the stock one if it raises an error."""
    seconds: tuple[list[float], list[float]] = ([], [])
    works = stock is not None
    for turn in range(repeat + 1):  # the first is a warm-up
        if works:
            start = time.perf_counter()
            try:
                stock.run(*inputs, **options)
            except Exception:
                works = False
            if turn:
                seconds[0].append(time.perf_counter() - start)
        start = time.perf_counter()
        own(*inputs, **options)
        if turn:
            seconds[1].append(time.perf_counter() - start)
    return statistics.median(seconds[0]) if works else None, statistics.median(seconds[1])


def _shown(nodes: Iterable[Any]) -> Iterable[Any]:
    """Return the nodes, behind a progress bar that appears after a second, if tqdm is installed."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return nodes
    bar: Iterable[Any] = tqdm(nodes, desc="profile", unit="node", delay=1.0)
    return bar
