"""Batch normalisation in ONNX's reference evaluator: right for every opset, and fast.

======================  =========================================================================
`ReferenceEvaluator`    a drop-in for ``onnx.reference.ReferenceEvaluator``: change the import
`BatchNormalization`    the operator alone, for ``new_ops=`` of onnx's own evaluator
`profile`               what each batch-norm node of a model costs, in the stock operator and here
======================  =========================================================================

Importing this module imports onnx; nothing else in bnfast does. The kernels are those of the
backend in force: `bnfast.use_backend`, `bnfast.set_backend` and ``BNFAST_BACKEND`` apply.

What a node means is in `bnfast.interop.onnx_nodes`, what it computes in
`bnfast.interop.onnx_operator`, and which nodes run as one call in `bnfast.interop.onnx_fusion`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx.reference import ReferenceEvaluator as _Stock
from onnx.reference.op_run import OpRun

from bnfast.interop import onnx_fusion
from bnfast.interop.onnx_operator import BatchNormalization

if TYPE_CHECKING:
    from bnfast.interop.onnx_profile import Profile

__all__ = ["BatchNormalization", "ReferenceEvaluator", "profile"]


class ReferenceEvaluator(_Stock):
    """``onnx.reference.ReferenceEvaluator`` whose batch norm is right, and fast.

    A drop-in: it takes the same arguments, and runs `BatchNormalization` of this module wherever a
    model has such a node: in the graph, in model-local functions, and in the bodies of If, Loop and
    Scan. All other nodes are onnx's.

    Parameters
    ----------
    proto : onnx.ModelProto, GraphProto, FunctionProto or NodeProto, str, Path or bytes
        The model.
    opsets, functions, verbose, new_ops
        As in onnx. Operators of ``new_ops`` go first, one called BatchNormalization as well.
    fuse : bool, optional
        Whether a batch norm whose result goes into a Relu and nowhere else, or into an Add, or a
        Sum of two, and from there into a Relu and nowhere else, runs as one call with them. That is
        so unless a subclass says otherwise, by its attribute ``fuse``.
    **options
        What else onnx's evaluator takes.

    Raises
    ------
    ValueError, onnx.reference.op_run.RuntimeTypeError
        As for `BatchNormalization`.

    Notes
    -----
    In float32 and float64 a fused call gives the bits of the separate ones (where a NaN meets a
    NaN, the sign of the result is open); in float16 and bfloat16 it rounds once instead of two or
    three times. Nodes are fused only where nothing but the
    Relu can see what is between them. A run whose caller looks there does not fuse: with
    ``intermediate=True``, ``verbose``, shape annotations that are checked, or a name in
    ``output_names`` that would not be there.

    Examples
    --------
    >>> import onnx
    >>> node = onnx.helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"])
    >>> ones = np.ones(3, np.float32)
    >>> x = np.full((2, 3, 4), 3, np.float32)
    >>> (y,) = ReferenceEvaluator(node).run(None, dict(x=x, s=ones, b=ones, m=ones, v=ones))
    >>> float(y[0, 0, 0].round(4))
    3.0
    """

    fuse = True
    _operator: type[OpRun] = BatchNormalization

    def __init__(
        self,
        proto: Any,
        opsets: dict[str, int] | None = None,
        functions: Any = None,
        verbose: int = 0,
        new_ops: list[type[OpRun]] | None = None,
        *args: Any,
        fuse: bool | None = None,
        **options: Any,
    ) -> None:
        if fuse is not None and fuse is not self.fuse:
            # onnx makes the evaluators of functions and bodies from the class of this one.
            own: Any = type(self)
            self.__class__ = _variant(own, fuse)
        super().__init__(
            str(proto) if isinstance(proto, Path) else proto,
            opsets,
            None if functions is None else [self._own(function) for function in functions],
            verbose,
            [*(new_ops or ()), self._operator],
            *args,
            **options,
        )

    def _own(self, function: Any) -> Any:
        """Return an evaluator of this class for a function, also for one that onnx evaluates."""
        other = isinstance(function, ReferenceEvaluator) and function.fuse is not self.fuse
        if not other and type(function) is not _Stock:
            return function
        options = {}
        if hasattr(function, "check_shape_annotations_"):
            options["check_shape_annotations"] = function.check_shape_annotations_
        return type(self)(
            function.proto_,
            functions=list(function.functions_.values()),
            verbose=function.verbose,
            new_ops=list(function.new_ops_.values()),
            **options,
        )

    def _init(self) -> None:
        super()._init()
        self._separate: Any = self
        self._hidden: frozenset[str] = frozenset()
        if self.fuse:
            nodes, self._hidden = onnx_fusion.fused(
                self.rt_nodes_,
                BatchNormalization,
                self.output_names,
                {*self.input_names, *self.rt_inits_},
            )
            if self._hidden:
                self._separate = copy.copy(self)
                self.rt_nodes_ = nodes

    def run(
        self,
        output_names: Any,
        feed_inputs: dict[str, Any],
        attributes: dict[str, Any] | None = None,
        intermediate: bool = False,
        check_shape_annotations: bool | None = None,
        _bindings: Any = None,
    ) -> Any:
        """Run the model; arguments and result are those of onnx's evaluator."""
        checks: dict[str, Any] = {
            "check_shape_annotations": check_shape_annotations,
            "_bindings": _bindings,
        }
        checks = {name: value for name, value in checks.items() if value is not None}
        looked_at = (
            intermediate
            or self.verbose > 0
            or bool(check_shape_annotations)
            or _bindings is not None
            or getattr(self, "check_shape_annotations_", False)
            or not self._hidden.isdisjoint(output_names or ())
        )
        evaluator = self._separate if looked_at else self
        return _Stock.run(evaluator, output_names, feed_inputs, attributes, intermediate, **checks)


@functools.cache
def _variant(cls: Any, fuse: bool) -> Any:
    """Return a class that differs in ``fuse``."""
    return type(cls.__name__, (cls,), {"fuse": fuse, "__module__": cls.__module__})


def profile(
    model: Any, inputs: Mapping[str, Any], *, repeat: int = 5, progress: bool = True
) -> Profile:
    """Time each batch-norm node of a model, in onnx's operator and in this one.

    Parameters
    ----------
    model : onnx.ModelProto, str, Path or bytes
        The model, or its file.
    inputs : mapping of str to ndarray
        The model's inputs by name.
    repeat : int
        How often each node is timed in either operator, in turns; the medians count.
    progress : bool
        Whether to show a progress bar where the run takes more than a second, and tqdm is
        installed.

    Returns
    -------
    Profile
        A row for each node, shape and dtype; printed, a table.

    Raises
    ------
    ValueError
        For a ``repeat`` below 1, and as for `ReferenceEvaluator`.

    Examples
    --------
    >>> import onnx
    >>> names = ["x", "s", "b", "m", "v"]
    >>> graph = onnx.helper.make_graph(
    ...     [onnx.helper.make_node("BatchNormalization", names, ["y"], name="bn1")],
    ...     "graph",
    ...     [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names],
    ...     [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
    ... )
    >>> ones = np.ones(64, np.float32)
    >>> inputs = dict(x=np.ones((1, 64, 56, 56), np.float32), s=ones, b=ones, m=ones, v=ones)
    >>> report = profile(onnx.helper.make_model(graph), inputs)
    >>> report.rows[0].name, report.rows[0].shape, report.rows[0].calls
    ('bn1', (1, 64, 56, 56), 1)
    """
    from bnfast.interop.onnx_profile import measure

    return measure(model, inputs, repeat, progress)
