"""Calls that are refused, and the check that a refusal changes nothing.

A case is a call on a fresh scene: a layer that has trained, arrays, and an ``out``. After the error
every array and the layer's state must be what they were, and the layer's gradient that of the
forward call before.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

import bnfast
from bnfast import BackendUnavailableError, UnknownBackendError
from bnfast.testing.bounds import assert_same_bits

SHAPE = (4, 3, 2, 8)
MASKED = "masked arrays are not accepted: the mask would be ignored"
CAST = (
    "expected an array of float16, bfloat16, float32 or float64, got dtype {}; cast it first, for "
    "example "
)


class Scene:
    """A layer that has trained, and arguments that would be fine."""

    def __init__(self, rng):
        self.layer = bnfast.BatchNorm2d(3)
        self.buffer = rng.normal(3, 2, (2 * 192 + 8,)).astype(np.float32)
        self.x = self.buffer[:192].reshape(SHAPE)
        self.overlapping = self.buffer[4 : 4 + 192].reshape(SHAPE)
        self.residual, self.dy, self.y, self.out = (
            rng.normal(size=SHAPE).astype(np.float32) for _ in range(4)
        )
        self.weight, self.bias, self.mean = rng.normal(size=(3, 3)).astype(np.float32)
        self.var = rng.uniform(1, 2, 3).astype(np.float32)
        self.before_x = rng.normal(size=SHAPE).astype(np.float32)
        self.layer(self.before_x)
        self.layer.backward(self.dy)

    def arrays(self):
        return {
            name: value.copy()
            for name, value in vars(self).items()
            if isinstance(value, np.ndarray)
        }

    def snapshot(self):
        layer = self.layer
        return {
            **self.arrays(),
            **{f"layer.{name}": value for name, value in layer.state_dict().items()},
            "grad_weight": layer.grad_weight.copy(),
            "grad_bias": layer.grad_bias.copy(),
            "training": np.array(layer.training),
        }


def read_only(array):
    view = array.view()
    view.flags.writeable = False
    return view


# What both the layer and the functions refuse: arguments by name, the error, its whole message.
COMMON = {
    "int32": (
        lambda s: {"x": s.x.astype(np.int32)},
        TypeError,
        CAST.format("int32") + "x.astype(np.float32)",
    ),
    "bool": (
        lambda s: {"x": s.x > 0},
        TypeError,
        CAST.format("bool") + "x.astype(np.float32)",
    ),
    "complex": (
        lambda s: {"x": s.x.astype(np.complex64)},
        TypeError,
        CAST.format("complex64") + "x.astype(np.float32)",
    ),
    "object": (
        lambda s: {"x": s.x.astype(object)},
        TypeError,
        CAST.format("object") + "x.astype(np.float32)",
    ),
    "longdouble": (
        lambda s: {"x": s.x.astype(np.longdouble)},
        TypeError,
        CAST.format(np.dtype(np.longdouble)) + "x.astype(np.float32)",
    ),
    "text": (
        lambda s: {"x": "not an array"},
        TypeError,
        CAST.format("<U12") + "x.astype(np.float32)",
    ),
    "none": (
        lambda s: {"x": None},
        TypeError,
        CAST.format("object") + "x.astype(np.float32)",
    ),
    "masked": (
        lambda s: {"x": np.ma.masked_array(s.x, s.x > 3)},
        TypeError,
        MASKED,
    ),
    "residual_masked": (
        lambda s: {"residual": np.ma.masked_array(s.residual, s.residual > 0)},
        TypeError,
        MASKED,
    ),
    "residual_shape": (
        lambda s: {"residual": s.residual[:1]},
        ValueError,
        "residual should have the shape of x, (4, 3, 2, 8), got (1, 3, 2, 8)",
    ),
    "residual_scalar": (
        lambda s: {"residual": 1.0},
        ValueError,
        "residual should have the shape of x, (4, 3, 2, 8), got ()",
    ),
    "residual_dtype": (
        lambda s: {"residual": s.residual.astype(np.float64)},
        TypeError,
        "residual should have the dtype of x, float32, got float64",
    ),
    "out_shape": (
        lambda s: {"out": s.out[:, :, :1]},
        ValueError,
        "out should have the shape of x, (4, 3, 2, 8), got (4, 3, 1, 8)",
    ),
    "out_dtype": (
        lambda s: {"out": s.out.astype(np.float64)},
        TypeError,
        "out should have dtype float32, got float64",
    ),
    "out_byte_order": (
        lambda s: {"out": s.out.astype(">f4")},
        TypeError,
        "out should have dtype float32, got >f4",
    ),
    "out_read_only": (
        lambda s: {"out": read_only(s.out)},
        ValueError,
        "out is read-only",
    ),
    "out_broadcast": (
        lambda s: {"out": np.broadcast_to(s.out[:1], SHAPE)},
        ValueError,
        "out is read-only",
    ),
    "out_interleaved": (
        lambda s: {"out": np.lib.stride_tricks.as_strided(s.buffer[192:], SHAPE, (24, 8, 16, 4))},
        ValueError,
        "out has elements that share their memory",
    ),
    "out_list": (
        lambda s: {"out": s.out.tolist()},
        TypeError,
        "out should be an array like x, got list",
    ),
    "out_overlaps_x": (
        lambda s: {"out": s.overlapping},
        ValueError,
        "out overlaps x without being x itself",
    ),
    "out_is_x_backwards": (
        lambda s: {"out": s.x[::-1]},
        ValueError,
        "out overlaps x without being x itself",
    ),
    "out_overlaps_residual": (
        lambda s: {"x": s.dy, "residual": s.x, "out": s.overlapping},
        ValueError,
        "out overlaps residual without being residual itself",
    ),
    "activation": (
        lambda s: {"activation": "gelu"},
        ValueError,
        "unknown activation 'gelu': expected None or \"relu\"",
    ),
    "eps_negative": (
        lambda s: {"eps": -1e-5},
        ValueError,
        "batch_norm eps must be finite and non-negative, but got -1e-05",
    ),
    "eps_nan": (
        lambda s: {"eps": np.nan},
        ValueError,
        "batch_norm eps must be finite and non-negative, but got nan",
    ),
    "eps_inf": (
        lambda s: {"eps": np.inf},
        ValueError,
        "batch_norm eps must be finite and non-negative, but got inf",
    ),
    "backend_unknown": (
        lambda s: {"backend": "cyton"},
        UnknownBackendError,
        re.compile(r"^unknown backend 'cyton' \(asked for by the argument backend=\)"),
    ),
    "backend_absent": (
        lambda s: {"backend": "absent"},
        BackendUnavailableError,
        re.compile(r"^backend 'absent' \(asked for by the argument backend=\) cannot run here"),
    ),
}

IN_TRAINING = {
    "one_value": (
        lambda s: {"x": s.x[:1, :, :1, :1]},
        ValueError,
        "Expected more than 1 value per channel when training, got input size [1, 3, 1, 1]",
    ),
    "eps_zero": (
        lambda s: {"eps": 0.0},
        ValueError,
        "batch_norm eps must be positive during training, but got 0.0",
    ),
}


def expect(scene, call, error, message):
    """Check that ``call`` raises exactly this, and leaves the scene as it was."""
    before = scene.snapshot()
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    if isinstance(message, re.Pattern):
        assert message.search(str(caught.value))
    else:
        assert str(caught.value) == message
    after = scene.snapshot()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, name)
    scene.layer.zero_grad()
    scene.layer.backend = None  # some cases set it
    dx = scene.layer.backward(scene.dy)
    fresh = bnfast.BatchNorm2d(3)
    fresh(scene.before_x)
    assert_same_bits("the gradient of the forward before", dx, fresh.backward(scene.dy))


def layer_call(scene, arguments, training):
    layer = scene.layer.train(training)
    for name in ("eps", "activation", "backend"):
        if name in arguments:
            setattr(layer, name, arguments.pop(name))
    call = {"x": scene.x, "out": scene.out, **arguments}
    return lambda: layer(**call)
