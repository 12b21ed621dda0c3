"""ONNX's operator BatchNormalization, computed by the kernels of the backend in force.

The way of a node: `bnfast.interop.onnx_nodes` checks it when the model is loaded, and its arrays
when it is run; here they become an array with channels on axis 1 and vectors of float64, which is
what `bnfast.packed` takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.reference.op_run import OpRun, RuntimeTypeError

from bnfast import functional, packed, threads
from bnfast.checks import admit
from bnfast.interop.onnx_nodes import Node, Settings, linked
from bnfast.spec import Channels


class BatchNormalization(OpRun):
    """ONNX's operator BatchNormalization, of every version: 1, 6, 7, 9, 14 and 15.

    For ``new_ops=`` of onnx's own evaluator, which passes it on to the bodies of If, Loop and Scan
    but not to model-local functions. `ReferenceEvaluator` reaches those too.

    Parameters
    ----------
    onnx_node : onnx.NodeProto
        The node.
    run_params : dict
        As the evaluator passes it; the opset is read from ``run_params["opsets"]``.

    Raises
    ------
    ValueError
        When the model is loaded: for missing inputs, unknown attributes, attributes of another
        type, and outputs that the node's mode does not have. When it is run: for shapes that do not
        fit. The message names the node, its opset, and what was expected.
    onnx.reference.op_run.RuntimeTypeError
        For types that this version of the operator does not have, with such a message.

    Notes
    -----
    Every version computes what the text of the standard says::

        inference   Y = (X - mean) / sqrt(var + epsilon) * scale + B
        training    the same with mean and population variance of X for each channel;
                    running = input * momentum + current * (1 - momentum)

    Statistics are computed in float64, whatever the type of X, and rounded once. Versions 1 and 6
    train unless ``is_test`` is set, 7 and 9 where more outputs than Y are asked for, 14 and 15 with
    ``training_mode``. X may have any rank from 1 on, (N,) meaning C = 1, also where an old version
    speaks of four dimensions only; and its type may differ from those of the other inputs, also
    where an old version has one type for all. ``consumed_inputs`` of version 1 has no effect.

    Examples
    --------
    >>> x = np.array([[1.0, 2.0], [3.0, 6.0]], np.float32)
    >>> ones, zeros = np.ones(2, np.float32), np.zeros(2, np.float32)
    >>> BatchNormalization.eval(x, ones, zeros, ones, 4 * ones, epsilon=0.0)
    array([[0. , 0.5],
           [1. , 2.5]], dtype=float32)
    """

    op_domain = ""

    def __init__(self, onnx_node: Any, run_params: dict[str, Any]) -> None:
        node = Node(onnx_node, run_params["opsets"][""])
        # With the version in force as the schema, there are its attributes and no others. Version 1
        # requires one that has no effect.
        required = [name for name, value in node.schema.attributes.items() if value.required]
        for name in required:
            setattr(self, name, None)
        super().__init__(onnx_node, run_params, node.schema)
        self._node = node
        self._seen: tuple[bool, list[Any]] | None = None
        self._attributes = {name: getattr(self, name) for name in node.schema.attributes}
        self._linked = linked(self._attributes)
        if not self._linked:
            node.settings = node.resolve(self._attributes)

    def run(
        self,
        *inputs: Any,
        linked_attributes: Mapping[str, Any] | None = None,
        residual: NDArray[Any] | None = None,
        relu: bool = False,
        **unused: Any,
    ) -> tuple[NDArray[Any] | None, ...]:
        """Compute the node's outputs.

        Parameters
        ----------
        *inputs : ndarray
            X, scale, B, input_mean and input_var.
        linked_attributes : mapping, optional
            The attributes of the function around the node, where it uses any.
        residual : ndarray like X, optional
            Added to Y.
        relu : bool
            Whether to apply ReLU to Y, last.
        **unused
            What the evaluator passes to nodes with subgraphs.

        Returns
        -------
        tuple of ndarray or None
            One for each output that the node names, None for those of an empty name.
        """
        if type(self)._run is not BatchNormalization._run:  # a subclass computes in its own way
            run: Any = super().run
            outputs: tuple[Any, ...] = run(*inputs, linked_attributes=linked_attributes)
            return outputs
        settings = self._node.settings or self._settings(linked_attributes)
        return self._outputs(inputs, settings, residual, relu)

    def _run(self, *inputs: Any, **attributes: Any) -> tuple[NDArray[Any] | None, ...]:
        """Compute the outputs with attributes that take the place of the node's own."""
        settings = self._node.resolve({**self._attributes, **attributes})
        return self._outputs(inputs, settings, None, False)

    def _settings(self, given: Mapping[str, Any] | None) -> Settings:
        """Return the settings with the attributes of the function around the node."""
        missing = sorted(set(self._linked.values()) - set(given or ()))
        if missing or given is None:
            self._node.refuse(f"the function around it should be given {', '.join(missing)}")
        values = {own: given[outer] for own, outer in self._linked.items()}
        return self._node.resolve({**self._attributes, **values})

    def _outputs(
        self, inputs: tuple[Any, ...], settings: Settings, residual: Any, relu: bool
    ) -> tuple[NDArray[Any] | None, ...]:
        # The checks look at types, shapes and dtypes alone. The same as last time, as in nearly
        # every run, need no second look: that is 3 of the 9 us that a call on 10,000 numbers takes.
        kinds = [
            (type(array), getattr(array, "shape", None), getattr(array, "dtype", None))
            for array in inputs
        ]
        seen = (settings.spatial, kinds)
        if seen != self._seen:
            self._node.check_arrays(inputs, settings)
            self._seen = seen
        x, *vectors = inputs
        shape = x.shape
        form = _form(shape, settings.spatial)
        if form != shape:
            x = x.reshape(form)
            residual = None if residual is None else residual.reshape(form)
        weight, bias, mean, var = [np.array(vector, np.float64) for vector in vectors]
        if weight.ndim != 1:
            weight, bias, mean, var = (each.reshape(-1) for each in (weight, bias, mean, var))
        eps = settings.epsilon
        try:
            x = admit(x, None)
            with threads.beside_spinning(x.size):
                if settings.training:
                    y, batch = _train(x, weight, bias, eps, residual, relu)
                else:
                    y = packed.normalize(
                        x, mean, var, weight, bias, eps, residual, relu, None, None
                    )
        except TypeError as error:  # of a backend that does not take this dtype
            raise RuntimeTypeError(f"{self._node}: {error}") from error
        if form != shape:
            y = y.reshape(shape)
        if not settings.training:
            return (y, *[None] * (len(self._node.wanted) - 1))
        return (y, *self._statistics(x.dtype, vectors[2:], (mean, var), batch, settings.momentum))

    def _statistics(
        self,
        dtype: np.dtype[Any],
        given: list[NDArray[Any]],
        old: tuple[Channels, Channels],
        batch: tuple[Channels, Channels],
        momentum: float,
    ) -> list[NDArray[Any] | None]:
        """Return the outputs behind Y in training: running mean and variance, then the batch's."""
        with np.errstate(all="ignore"):
            running = [
                momentum * past + (1.0 - momentum) * new
                for past, new in zip(old, batch, strict=True)
            ]
            return [
                value.astype(self._node.statistics_dtype(dtype, like.dtype)).reshape(like.shape)
                if wanted
                else None
                for wanted, value, like in zip(
                    self._node.wanted[1:], [*running, *batch], [*given, *given], strict=False
                )
            ]


def _form(shape: tuple[int, ...], spatial: bool) -> tuple[int, ...]:
    """Return the shape in which X has its channels on axis 1."""
    if len(shape) == 1:
        return (*shape, 1)
    return shape if spatial else (shape[0], math.prod(shape[1:]))


def _train(
    x: NDArray[Any], weight: Channels, bias: Channels, eps: float, residual: Any, relu: bool
) -> tuple[NDArray[Any], tuple[Channels, Channels]]:
    """Normalise with the statistics of ``x``; return them too, the variance being the biased one.

    In ONNX one value per channel is a batch like any other, of variance 0; and none has NaN.
    """
    mean, m2 = np.empty(weight.shape), np.empty(weight.shape)
    if x.size > weight.size:
        y, count = packed.train(x, weight, bias, mean, m2, eps, residual, relu, None, None)
        return y, (mean, m2 / count)
    if x.size:
        moments = functional.moments(x)
        mean, var = moments.mean, moments.m2
    else:
        mean, var = np.full(weight.shape, np.nan), np.full(weight.shape, np.nan)
    y = packed.normalize(x, mean, var, weight, bias, eps, residual, relu, None, None)
    return y, (mean, var)
