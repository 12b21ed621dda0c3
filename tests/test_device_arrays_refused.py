"""Arrays on a GPU that a call refuses, and that a refusal changes nothing.

The GPU is made up (see `made_up_gpu`).
"""

from __future__ import annotations

import numpy as np
import pytest
from made_up_gpu import SHAPE, Array, Kind, Torch, on_host, refused

import bnfast
import bnfast.functional as F
from bnfast.testing.bounds import assert_same_bits

MIXED = (
    "{} is {}, but x is {}: the arrays of a call lie in one place; copy one of them to where the "
    "other is"
)


def test_host_array_beside_a_device_array(kind, numbers):
    x, host, layer = kind(numbers(*SHAPE)), numbers(*SHAPE), bnfast.BatchNorm2d(3)
    for name in ("residual", "out"):
        message = MIXED.format(name, "in host memory", "on cuda:0")
        refused(TypeError, message, layer, x, **{name: host})
    layer(x)
    refused(TypeError, MIXED.format("dy", "in host memory", "on cuda:0"), layer.backward, host)
    refused(
        TypeError, MIXED.format("residual", "in host memory", "on cuda:0"), layer, x, host.tolist()
    )
    with pytest.raises(TypeError, match=r"^y is in host memory, but x is on cuda:0: the arrays"):
        F.batch_norm_backward(x, x, None, np.ones(3), np.ones(3), activation="relu", y=host)


@pytest.mark.parametrize("backend", [None, "numpy", "cuda"])
def test_device_array_beside_a_host_array(kind, numbers, backend):
    x, there, layer = numbers(*SHAPE), kind(numbers(*SHAPE)), bnfast.BatchNorm2d(3, backend=backend)
    # Where an array shows nothing but an address, only its own backend can say which device it is.
    place = (
        "on a CUDA device"
        if backend != "cuda" and kind.name in ("numba", "interface")
        else "on cuda:0"
    )
    for name in ("residual", "out"):
        message = MIXED.format(name, place, "in host memory")
        refused(TypeError, message, layer, x, **{name: there})
    assert layer.num_batches_tracked == 0


def test_arrays_of_two_devices(kind, numbers):
    x, other = kind(numbers(*SHAPE)), kind(numbers(*SHAPE), device=1)
    layer = bnfast.BatchNorm2d(3)
    for name in ("residual", "out"):
        refused(TypeError, MIXED.format(name, "on cuda:1", "on cuda:0"), layer, x, **{name: other})
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("training", [True, False])
def test_vectors_on_a_device(kind, numbers, name, training):
    vectors = {
        key: np.ones(3, np.float32) for key in ("running_mean", "running_var", "weight", "bias")
    }
    vectors[name] = kind(vectors[name])
    message = f"{name} is on (a CUDA device|cuda:0), but parameters and running statistics live in"
    with pytest.raises(TypeError, match=f"^{message} host memory, wherever x is: copy it to a"):
        F.batch_norm(kind(numbers(*SHAPE)), **vectors, training=training)


def test_state_on_a_device(kind):
    layer, there = bnfast.BatchNorm2d(3), kind(np.ones(3, np.float32))
    with pytest.raises(TypeError, match=r"^weight is on .* parameters and running statistics live"):
        layer.weight = there
    state = layer.state_dict("bn.") | {"bn.bias": there}
    if hasattr(there, "cpu"):  # a torch tensor, which is brought to the host
        layer.load_state_dict(state, prefix="bn.")
        assert layer.bias.tolist() == [1, 1, 1]
    else:
        with pytest.raises(TypeError, match=r"^bn\.bias is on .* copy it to a NumPy array first$"):
            layer.load_state_dict(state, prefix="bn.")
    with pytest.raises(TypeError, match=r"^mean is on .* copy it to a NumPy array first$"):
        F.batch_norm_backward(np.ones((2, 3)), np.ones((2, 3)), None, there, np.ones(3))


BAD_ARRAYS = {
    "dtype": (
        lambda put, numbers: {"x": put(numbers(*SHAPE).astype(np.int16))},
        TypeError,
        "expected an array of float16, bfloat16, float32 or float64, got dtype int16; cast it "
        "first, for example x.astype(np.float32)",
    ),
    "ndim": (
        lambda put, numbers: {"x": put(numbers(4, 3))},
        ValueError,
        "expected 4D input (got 2D input): axis 0 is the batch, axis 1 the channels, got shape "
        "(4, 3)",
    ),
    "channels": (
        lambda put, numbers: {"x": put(numbers(4, 2, 2, 2))},
        ValueError,
        "running_mean should contain 2 elements not 3: expected input with 3 channels on axis 1, "
        "got shape (4, 2, 2, 2)",
    ),
    "one value": (
        lambda put, numbers: {"x": put(numbers(1, 3, 1, 1))},
        ValueError,
        "Expected more than 1 value per channel when training, got input size [1, 3, 1, 1]",
    ),
    "residual shape": (
        lambda put, numbers: {"residual": put(numbers(1, 3, 2, 8))},
        ValueError,
        "residual should have the shape of x, (4, 3, 2, 8), got (1, 3, 2, 8)",
    ),
    "residual dtype": (
        lambda put, numbers: {"residual": put(np.zeros(SHAPE))},
        TypeError,
        "residual should have the dtype of x, float32, got float64",
    ),
    "out shape": (
        lambda put, numbers: {"out": put(numbers(1, 3, 2, 8))},
        ValueError,
        "out should have the shape of x, (4, 3, 2, 8), got (1, 3, 2, 8)",
    ),
    "out dtype": (
        lambda put, numbers: {"out": put(np.zeros(SHAPE))},
        TypeError,
        "out should have dtype float32, got float64",
    ),
    "out broadcast": (
        lambda put, numbers: {
            "out": put(np.lib.stride_tricks.as_strided(numbers(16), SHAPE, (0, 0, 32, 4)))
        },
        ValueError,
        "out has elements that share their memory",
    ),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays(kind, numbers, case):
    make, error, message = BAD_ARRAYS[case]
    layer = bnfast.BatchNorm2d(3)
    layer(kind(numbers(*SHAPE)))
    before = layer.state_dict()
    arguments = {"x": kind(numbers(*SHAPE))} | make(kind, numbers)
    refused(error, message, layer, **arguments)
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[name], name)
    layer.backward(kind(numbers(*SHAPE)))


def test_out_that_overlaps(kind, numbers):
    room, layer = numbers(2 * 192), bnfast.BatchNorm2d(3)
    x, shifted = room[:192].reshape(SHAPE), room[4 : 4 + 192].reshape(SHAPE)
    message = "out overlaps {0} without being {0} itself"
    refused(ValueError, message.format("x"), layer, kind(x), out=kind(shifted))
    refused(ValueError, message.format("x"), layer, kind(x), out=kind(x[::-1]))
    apart, residual = numbers(*SHAPE), kind(x)
    refused(ValueError, message.format("residual"), layer, kind(apart), residual, out=kind(shifted))
    with pytest.raises(ValueError, match=r"^out overlaps x$"):
        F.batch_norm_backward(kind(apart), kind(x), None, np.ones(3), np.ones(3), out=kind(x))
    arguments = {"activation": "relu", "y": kind(x), "out": kind(shifted)}
    with pytest.raises(ValueError, match=r"^out overlaps y$"):
        F.batch_norm_backward(kind(apart), kind(apart), None, np.ones(3), np.ones(3), **arguments)


def test_out_that_interleaves_without_overlapping(kind, numbers):
    room = numbers(4, 3, 2, 16)
    expected = on_host(room[..., ::2])
    bnfast.BatchNorm2d(3)(kind(room[..., ::2]), out=kind(room[..., 1::2]))
    assert_same_bits("out", room[..., 1::2], expected)


def test_read_only_array(gpu, numbers):
    x = Array(numbers(*SHAPE), stream=None)
    gpu.owner_of[x.memory.__array_interface__["data"][0]] = 0
    x.read_only = True
    layer = bnfast.BatchNorm2d(3)
    assert_same_bits("y", layer(x).memory, on_host(x.memory))
    refused(ValueError, "out is read-only", layer, x, out=x)


def test_masked_array(gpu, numbers):
    x = Kind(gpu, "interface")(numbers(*SHAPE))
    x.mask = x
    message = "masked arrays are not accepted: the mask would be ignored"
    refused(TypeError, message, bnfast.BatchNorm2d(3), x)


def test_foreign_byte_order(gpu, numbers):
    x = Kind(gpu, "interface")(numbers(*SHAPE).astype(">f4"))
    message = "arrays on a GPU have its byte order, got dtype >f4"
    refused(TypeError, message, bnfast.BatchNorm2d(3), x)


def test_unaligned_array(gpu, numbers):
    memory_ = np.zeros(4 * 192 + 8, np.uint8)[1 : 1 + 768].view(np.float32).reshape(SHAPE)
    x = Kind(gpu, "interface")(memory_)
    with pytest.raises(
        ValueError, match=r"^arrays on a GPU need elements aligned to their 4 bytes, got address 0x"
    ):
        bnfast.BatchNorm2d(3)(x)


def test_torch_gradients_are_not_lost(gpu, numbers):
    x, layer = numbers(*SHAPE), bnfast.BatchNorm2d(3).eval()
    tensor = Torch(x, gpu, requires_grad=True)
    message = (
        "bnfast does not record gradients for torch: call it inside torch.no_grad(), or pass "
        "tensor.detach()"
    )
    refused(RuntimeError, message, layer, tensor)
    refused(RuntimeError, message, layer, Torch(x, gpu), out=tensor)
    with gpu.no_grad():
        assert_same_bits("y", layer(tensor).memory, on_host(x, training=False))
    assert type(layer(tensor.detach())) is Torch


@pytest.mark.parametrize("name", ["torch", "numba"])
def test_stream_that_records_a_graph(gpu, numbers, name):
    gpu.torch_stream, gpu.captured = 7, {7}
    options = {"stream": 7} if name == "numba" else {}
    x, layer = Kind(gpu, name)(numbers(*SHAPE), **options), bnfast.BatchNorm2d(3)
    message = (
        "a call cannot be recorded in a CUDA graph: the parameters go up with each call, from host "
        "memory that a replay would not find"
    )
    for training in (True, False):
        refused(RuntimeError, message, layer.train(training), x)
    assert gpu.launches == []
    assert layer.num_batches_tracked == 0
    gpu.captured.clear()
    layer(x)


def test_torch_negated_view(gpu, numbers):
    tensor = Torch(numbers(*SHAPE), gpu, negative=True)
    message = "the tensor is a negated view: pass tensor.resolve_neg()"
    refused(RuntimeError, message, bnfast.BatchNorm2d(3), tensor)
