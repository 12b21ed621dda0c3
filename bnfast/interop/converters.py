"""The constructors of a layer that take one of another framework."""

from __future__ import annotations

from typing import Any, Self


class Converters:
    """What a batch-norm layer inherits: ``from_torch``, ``from_keras`` and ``from_onnx``."""

    @classmethod
    def from_torch(
        cls, module: Any, *, activation: str | None = None, backend: str | None = None
    ) -> Self:
        """Return a layer in eval mode that computes what a torch BatchNorm module does.

        Parameters
        ----------
        module : torch.nn.BatchNorm1d, 2d, 3d or SyncBatchNorm
            Or any object with their attributes; torch is not imported. Its tensors are copied;
            those of float16 and bfloat16 become float32, exactly.
        activation, backend
            As in the constructor.

        Raises
        ------
        TypeError
            For another kind of module, and for one of another number of dimensions.
        ValueError
            For vectors that do not fit, and a ``running_var`` with NaN.

        Notes
        -----
        The conventions are the same: momentum is the weight of the new value (None is the
        cumulative average), and ``running_var`` is unbiased. What the module lacks
        (``affine=False``, ``bias=False``, ``track_running_stats=False``), the layer lacks.
        """
        from bnfast.interop.from_torch import convert

        return convert(cls, module, activation, backend)

    @classmethod
    def from_keras(
        cls, layer: Any, *, activation: str | None = None, backend: str | None = None
    ) -> Self:
        """Return a layer in eval mode that computes what a Keras BatchNormalization layer does.

        Parameters
        ----------
        layer : keras.layers.BatchNormalization
            Built; or any object with its attributes. Keras is not imported.
        activation, backend
            As in the constructor.

        Raises
        ------
        TypeError
            For an object that lacks these attributes.
        ValueError
            For a layer that is not built, vectors that do not fit, and a ``moving_variance`` with
            NaN.

        Notes
        -----
        Channels are on axis 1 here and last in Keras, unless its ``axis`` says otherwise: pass
        ``x.transpose(0, 3, 1, 2)``, a view, which is not copied. Keras's momentum is the weight of
        the old value, so the layer's is ``1 - momentum``. A ``moving_variance`` is the average of
        biased variances and is taken as it is; training on, the layer adds unbiased ones.
        """
        from bnfast.interop.from_keras import convert

        return convert(cls, layer, activation, backend)

    @classmethod
    def from_onnx(
        cls,
        node: Any,
        initializers: Any,
        *,
        activation: str | None = None,
        backend: str | None = None,
    ) -> Self:
        """Return a layer in eval mode that computes what an ONNX BatchNormalization node does.

        Parameters
        ----------
        node : onnx.NodeProto
            Or any object with its ``input`` and ``attribute``. onnx is not imported.
        initializers : mapping of str to array, or iterable of onnx.TensorProto
            The values of the node's inputs by name, or ``model.graph.initializer``.
        activation, backend
            As in the constructor.

        Raises
        ------
        TypeError
            For a node of another type.
        ValueError
            For inputs that have no initializer, vectors that do not fit, an ``input_var`` with
            NaN, and ``spatial=0``.

        Notes
        -----
        ONNX's momentum is the weight of the old value, so the layer's is ``1 - momentum``. Its
        running variance is the average of biased ones and is taken as it is. ``training_mode`` is
        ignored. An eps of 1e-5 is 9.99999975e-6 in ONNX, whose attributes are float32 numbers.
        """
        from bnfast.interop.from_onnx import convert

        return convert(cls, node, initializers, activation, backend)
