r"""Batch norms of an evaluator that run as one call with a Relu behind them, or an Add and a Relu.

Before, and after::

    x -> BatchNormalization -> y -> Relu -> z          x -> (all in one) -> z

    x -> BatchNormalization -> y \
                                  Add -> s -> Relu -> z    x, r -> (all in one) -> z
    r ---------------------------/

y and s must be seen by nobody else: they are no outputs of the graph, and each is the input of one
node, once, counting what nodes in the bodies of If, Loop and Scan take from around them. The one
call stands where the Relu stood, so that r is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np


class Fused:
    """What takes the place of two or three nodes in an evaluator's list of them.

    Where the residual turns out to have another shape or dtype than X, the nodes run one by one.
    """

    has_linked_attribute: bool
    domain = ""

    def __init__(self, batch_norm: Any, add: Any | None, relu: Any) -> None:
        self._batch_norm, self._add, self._relu = batch_norm, add, relu
        parts = [batch_norm, relu] if add is None else [batch_norm, add, relu]
        self.op_type = "+".join(part.op_type for part in parts)
        self.onnx_node = relu.onnx_node
        self.has_linked_attribute = batch_norm.has_linked_attribute
        self.input = list(batch_norm.input)
        self.output = list(relu.output)
        self._first = False
        if add is not None:
            self._first = add.input[0] == batch_norm.output[0]
            self.input.append(add.input[1 if self._first else 0])

    def need_context(self) -> bool:
        """Return False: there is no subgraph."""
        return False

    def run(self, *inputs: Any, **linked: Any) -> tuple[Any, ...]:
        """Return what the last node does."""
        batch_norm = self._batch_norm
        if self._add is None:
            return (batch_norm.run(*inputs, relu=True, **linked)[0],)
        *own, residual = inputs
        x = own[0]
        if (
            isinstance(residual, np.ndarray)
            and isinstance(x, np.ndarray)
            and residual.shape == x.shape
            and residual.dtype == x.dtype
        ):
            return (batch_norm.run(*own, residual=residual, relu=True, **linked)[0],)
        y = batch_norm.run(*own, **linked)[0]
        (total,) = self._add.run(*((y, residual) if self._first else (residual, y)))
        outputs: tuple[Any, ...] = self._relu.run(total)
        return outputs


def fused(
    nodes: Sequence[Any],
    operator: type,
    outputs: Iterable[str],
    given: Iterable[str],
) -> tuple[list[Any], frozenset[str]]:
    """Return the nodes of an evaluator, some of them fused, and the names that are gone.

    Parameters
    ----------
    nodes : sequence of OpRun
        In the order in which they run.
    operator : type
        The class of the batch norms.
    outputs : iterable of str
        Those of the graph.
    given : iterable of str
        What the graph has without its nodes: inputs and initializers.
    """
    if not _made_once(nodes, given):
        return list(nodes), frozenset()
    used = Counter(outputs)
    for node in nodes:
        used.update(_names_used(node.onnx_node))
    consumer = {name: node for node in nodes for name in node.input}
    replaced: dict[int, Fused | None] = {}
    for node in nodes:
        if _is_own(node, operator) and id(node) not in replaced:
            chain = _chain(node, consumer, used)
            if chain and not any(id(part) in replaced for part in chain):
                replaced |= dict.fromkeys(map(id, chain[:-1]))
                replaced[id(chain[-1])] = Fused(
                    chain[0], chain[1] if chain[2:] else None, chain[-1]
                )
    hidden = frozenset(node.output[0] for node in nodes if replaced.get(id(node), node) is None)
    kept = [replaced.get(id(node), node) for node in nodes]
    return [node for node in kept if node is not None], hidden


def _made_once(nodes: Sequence[Any], given: Iterable[str]) -> bool:
    """Return whether every name is made once, and before it is used; else the order counts.

    A name that is used first is of the graph around this one, or missing.
    """
    seen = set(given)
    for node in nodes:
        seen.update(_names_used(node.onnx_node))
        for name in filter(None, node.output):
            if name in seen:
                return False
            seen.add(name)
    return True


def _is_own(node: Any, operator: Any) -> bool:
    """Return whether a node is computed by the operator, and not by a subclass in its own way."""
    kind = type(node)
    return isinstance(node, operator) and kind.run is operator.run and kind._run is operator._run


def _chain(node: Any, consumer: Mapping[str, Any], used: Mapping[str, int]) -> list[Any]:
    """Return a batch norm and what can be fused with it, up to a Relu; or nothing."""
    chain = [node]
    for types in (("Relu", "Add", "Sum"), ("Relu",)):
        names = [name for name in chain[-1].output if name]
        if len(names) != 1 or used[names[0]] != 1 or names[0] not in consumer:
            return []
        after = consumer[names[0]]
        if not _is_stock(after, types):
            return []
        chain.append(after)
        if after.op_type == "Relu":
            return chain
    return []


def _is_stock(node: Any, types: tuple[str, ...]) -> bool:
    """Return whether a node is onnx's own, of one of the types; of a Sum, one of two operands."""
    operands = 1 if node.op_type == "Relu" else 2
    return (
        node.op_type in types
        and type(node).__module__.startswith("onnx.reference.ops.")
        and len(node.input) == operands
        and all(node.input)
        and len(node.output) == 1
    )


def _names_used(node: Any) -> Iterator[str]:
    """Yield the names that a NodeProto takes, and whatever the graphs in it mention."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from (value.name for value in graph.output)
            for inner in graph.node:
                yield from _names_used(inner)
