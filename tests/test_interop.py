"""Layers from objects that look like those of torch, Keras and ONNX: read by attribute alone.

The real ones are in test_against_torch_interop.py, test_interop_keras.py and test_interop_onnx.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from fresh_python import output_of
from trained_layers import VECTORS, draw

import bnfast
import bnfast.functional as F
from bnfast.testing.bounds import assert_same_bits

KINDS = {
    bnfast.BatchNorm1d: (6, 3),
    bnfast.BatchNorm2d: (4, 3, 2, 8),
    bnfast.BatchNorm3d: (2, 3, 2, 3, 4),
}
CONVERTERS = ("from_torch", "from_keras", "from_onnx")


class Tensor:
    """What NumPy cannot read before it is detached and on the host."""

    def __init__(self, array, dtype=None, ready=0):
        self.array, self.dtype, self.ready = array, dtype or str(array.dtype), ready

    def detach(self):
        return Tensor(self.array, self.dtype, ready=1)

    def cpu(self):
        assert self.ready == 1
        return Tensor(self.array, self.dtype, ready=2)

    def float(self):
        return Tensor(self.array.astype(np.float32), ready=self.ready)

    def numpy(self):
        assert self.ready == 2
        if "bfloat16" in self.dtype:
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.array

    def __array__(self, *_, **__):
        raise TypeError("this tensor requires grad")


def vectors_of(rng, dtype=np.float32, **changes):
    """Return weight, bias, running_mean and running_var by name."""
    vectors = dict(zip(VECTORS, rng.uniform(0.5, 3, (4, 3)).astype(dtype), strict=True))
    return vectors | changes


def torch_module(vectors, **attributes):
    return SimpleNamespace(
        **{name: None if array is None else Tensor(array) for name, array in vectors.items()},
        **{
            "num_features": 3,
            "eps": 1e-5,
            "momentum": 0.3,
            "affine": True,
            "track_running_stats": True,
            "num_batches_tracked": Tensor(np.array(17)),
        }
        | attributes,
    )


def keras_layer(vectors, **attributes):
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    values = dict(zip(names, vectors.values(), strict=True))
    return SimpleNamespace(**values, **({"epsilon": 1e-5, "momentum": 0.7} | attributes))


def onnx_node(vectors, **attributes):
    """Return a node and its initializers, by name."""
    names = ["w", "b", "mean", "var"]
    node = SimpleNamespace(
        op_type="BatchNormalization",
        input=["x", *names],
        attribute=[
            SimpleNamespace(name=name, f=value, i=value)
            for name, value in ({"epsilon": 1e-5, "momentum": 0.7} | attributes).items()
        ],
    )
    return node, dict(zip(names, vectors.values(), strict=True))


def arguments_of(converter, vectors):
    if converter == "from_onnx":
        return onnx_node(vectors)
    return ({"from_torch": torch_module, "from_keras": keras_layer}[converter](vectors),)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("converter", CONVERTERS)
def test_the_layer_computes_the_same(rng, converter, kind, dtype):
    vectors = vectors_of(rng, dtype)
    layer = getattr(kind, converter)(*arguments_of(converter, vectors), activation="relu")
    assert type(layer) is kind
    assert layer.training is False
    assert layer.affine
    assert layer.track_running_stats
    assert layer.num_features == 3
    assert abs(layer.momentum - 0.3) < 1e-15
    assert layer.activation == "relu"
    x = draw(rng, KINDS[kind])
    mean, var = vectors["running_mean"], vectors["running_var"]
    eps = float(np.float32(1e-5)) if converter == "from_onnx" else 1e-5
    assert layer.eps == eps
    expected = F.batch_norm(
        x, mean, var, vectors["weight"], vectors["bias"], eps=eps, activation="relu"
    )
    assert_same_bits("y", layer(x), expected)
    for name, array in vectors.items():
        assert getattr(layer, name).dtype == np.float64 if dtype == np.float64 else np.float32
        np.testing.assert_array_equal(getattr(layer, name), array)
        array[:] = 0  # the layer has copies
    assert_same_bits("y", layer(x), expected)


@pytest.mark.parametrize("converter", CONVERTERS)
def test_backend(rng, converter):
    arguments = arguments_of(converter, vectors_of(rng))
    layer = getattr(bnfast.BatchNorm2d, converter)(*arguments, backend="numpy")
    assert layer.backend == "numpy"
    with pytest.raises(bnfast.UnknownBackendError):
        getattr(bnfast.BatchNorm2d, converter)(*arguments, backend="cyton")


@pytest.mark.parametrize("converter", ["from_torch", "from_keras"])
@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("weight", "bias")])
def test_what_is_absent_stays_absent(rng, converter, absent):
    vectors = vectors_of(rng) | dict.fromkeys(absent)
    layer = getattr(bnfast.BatchNorm2d, converter)(*arguments_of(converter, vectors))
    assert {name for name in VECTORS if getattr(layer, name) is None} == set(absent)
    assert layer.affine is (len(absent) == 1)
    x = draw(rng)
    expected = F.batch_norm(
        x, vectors["running_mean"], vectors["running_var"], vectors["weight"], vectors["bias"]
    )
    assert_same_bits("y", layer(x), expected)
    assert list(layer.state_dict()) == [
        *(name for name in VECTORS if name not in absent),
        "num_batches_tracked",
    ]


@pytest.mark.parametrize("converter", CONVERTERS)
def test_a_variance_with_nan(rng, converter):
    vectors = vectors_of(rng)
    vectors["running_var"][1] = np.nan
    name = {"from_torch": "running_var", "from_keras": "moving_variance", "from_onnx": "var"}
    with pytest.raises(
        ValueError,
        match=rf"^{name[converter]} should hold numbers, got NaN in 1 of 3 channels, first in "
        "channel 1$",
    ):
        getattr(bnfast.BatchNorm2d, converter)(*arguments_of(converter, vectors))


@pytest.mark.parametrize("converter", CONVERTERS)
def test_vectors_that_do_not_fit(rng, converter):
    vectors = vectors_of(rng, running_mean=np.zeros(4, np.float32))
    name = {"from_torch": "running_mean", "from_keras": "moving_mean", "from_onnx": "mean"}
    with pytest.raises(
        ValueError,
        match=rf"^{name[converter]} should contain 3 elements not 4: expected shape \(3,\), got",
    ):
        getattr(bnfast.BatchNorm2d, converter)(*arguments_of(converter, vectors))


@pytest.mark.parametrize("converter", CONVERTERS)
def test_vectors_of_another_kind(rng, converter):
    vectors = vectors_of(rng, bias=np.array(["a", "b", "c"]))
    with pytest.raises(TypeError, match=r"^\w+ should hold real numbers, got dtype <U1$"):
        getattr(bnfast.BatchNorm2d, converter)(*arguments_of(converter, vectors))


def test_nothing_is_imported(rng):
    """Neither is a framework, nor are the converters before they are used."""
    printed = output_of(
        """
        import sys
        from types import SimpleNamespace
        import numpy as np
        import bnfast
        one = np.ones(3, np.float32)
        print("bnfast.interop.from_keras" in sys.modules)
        layer = bnfast.BatchNorm2d.from_keras(
            SimpleNamespace(epsilon=1e-3, momentum=0.99, moving_mean=one, moving_variance=one)
        )
        print("bnfast.interop.from_keras" in sys.modules)
        print({"torch", "keras", "onnx", "tensorflow"} & set(sys.modules))
        """
    )
    assert printed.split("\n") == ["False", "True", "set()"]


# ---- torch --------------------------------------------------------------------------------------


def test_the_numbers_of_a_torch_module(rng):
    module = torch_module(vectors_of(rng), eps=1e-3, momentum=None)
    layer = bnfast.BatchNorm2d.from_torch(module)
    assert (layer.eps, layer.momentum, layer.num_batches_tracked) == (1e-3, None, 17)


def test_bfloat16_tensors(rng):
    values = np.array([0.5, 1.0, 3.0])
    module = torch_module(vectors_of(rng))
    module.weight = Tensor(values, "torch.bfloat16")
    layer = bnfast.BatchNorm2d.from_torch(module)
    assert layer.weight.dtype == np.float32
    np.testing.assert_array_equal(layer.weight, values)


def test_a_torch_module_without_statistics(rng):
    module = torch_module(
        vectors_of(rng, running_mean=None, running_var=None),
        track_running_stats=False,
        num_batches_tracked=None,
    )
    layer = bnfast.BatchNorm2d.from_torch(module)
    assert layer.running_mean is layer.running_var is layer.num_batches_tracked is None
    x = draw(rng)
    expected = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
    assert_same_bits("y", layer(x), expected)


def test_a_torch_module_with_nothing_at_all():
    module = torch_module(dict.fromkeys(VECTORS), track_running_stats=False, affine=False)
    layer = bnfast.BatchNorm2d.from_torch(module)
    assert layer.state_dict() == {}
    assert layer.num_features == 3


def test_a_torch_module_that_no_longer_tracks(rng):
    """It uses its statistics in eval mode, and leaves them alone in training."""
    module = torch_module(vectors_of(rng), track_running_stats=False)
    layer = bnfast.BatchNorm2d.from_torch(module)
    before = layer.state_dict()
    x = draw(rng)
    assert_same_bits("y", layer(x), F.batch_norm(x, *[before[n] for n in _FUNCTIONAL]))
    layer.train()(x)
    np.testing.assert_array_equal(layer.running_mean, before["running_mean"])


_FUNCTIONAL = ("running_mean", "running_var", "weight", "bias")


def test_a_frozen_module_has_vectors_and_eps(rng):
    """That of torchvision."""
    vectors = vectors_of(rng)
    module = SimpleNamespace(**{name: Tensor(array) for name, array in vectors.items()}, eps=0.1)
    layer = bnfast.BatchNorm2d.from_torch(module)
    assert (layer.num_features, layer.eps, layer.num_batches_tracked) == (3, 0.1, 0)


def test_modules_of_another_kind(rng):
    instance = type("InstanceNorm2d", (SimpleNamespace,), {})
    with pytest.raises(
        TypeError,
        match=r"^expected a BatchNorm module of torch, got InstanceNorm2d, another normalisation$",
    ):
        bnfast.BatchNorm2d.from_torch(instance(**vars(torch_module(vectors_of(rng)))))
    with pytest.raises(
        TypeError,
        match=r"got SimpleNamespace, which has no bias, running_mean, running_var, eps$",
    ):
        bnfast.BatchNorm2d.from_torch(SimpleNamespace(weight=np.ones(3)))
    volume = type("BatchNorm3d", (SimpleNamespace,), {})(**vars(torch_module(vectors_of(rng))))
    with pytest.raises(
        TypeError,
        match=r"^BatchNorm2d.from_torch expected a BatchNorm2d, got a BatchNorm3d: use "
        r"bnfast.BatchNorm3d.from_torch$",
    ):
        bnfast.BatchNorm2d.from_torch(volume)
    assert bnfast.BatchNorm3d.from_torch(volume).num_features == 3


def test_a_tensor_without_numbers(rng):
    module = torch_module(vectors_of(rng))
    module.running_mean = SimpleNamespace(detach=lambda: 1 / 0)
    with pytest.raises(
        TypeError,
        match=r"^running_mean should hold real numbers, got SimpleNamespace: division by zero$",
    ):
        bnfast.BatchNorm2d.from_torch(module)


def test_half_of_the_statistics(rng):
    with pytest.raises(
        ValueError,
        match=r"^running_mean and running_var must either both be None or neither be None$",
    ):
        bnfast.BatchNorm2d.from_torch(torch_module(vectors_of(rng, running_var=None)))


# ---- Keras --------------------------------------------------------------------------------------


def test_variables_of_keras_are_unwrapped(rng):
    """Keras's own __array__ warns under NumPy 2."""
    vectors = vectors_of(rng)
    wrapped = {
        "weight": SimpleNamespace(value=Tensor(vectors["weight"])),
        "bias": SimpleNamespace(value=vectors["bias"]),
    }
    layer = bnfast.BatchNorm2d.from_keras(keras_layer(vectors | wrapped))
    np.testing.assert_array_equal(layer.weight, vectors["weight"])
    np.testing.assert_array_equal(layer.bias, vectors["bias"])


@pytest.mark.parametrize(("there", "here"), [(0.99, 0.01), (0.9, 0.1), (1, 0.0), (0.0, 1.0)])
def test_the_momentum_of_keras(rng, there, here):
    layer = bnfast.BatchNorm2d.from_keras(keras_layer(vectors_of(rng), momentum=there))
    assert layer.momentum == here


def test_keras_layers_that_cannot_be_taken(rng):
    with pytest.raises(
        TypeError, match=r"^expected a BatchNormalization layer of Keras, got list, which has no"
    ):
        bnfast.BatchNorm2d.from_keras([])
    with pytest.raises(ValueError, match=r"^SimpleNamespace has no moving_mean yet: build it"):
        bnfast.BatchNorm2d.from_keras(SimpleNamespace(epsilon=1e-3, momentum=0.99))


# ---- ONNX ---------------------------------------------------------------------------------------


def proto(name, array, **fields):
    """Return what has the fields of a TensorProto."""
    kind = {"float32": 1, "float16": 10, "float64": 11}.get(str(array.dtype), 7)
    empty = {"raw_data": b"", "float_data": [], "double_data": [], "int32_data": []}
    return SimpleNamespace(
        **{"name": name, "dims": list(array.shape), "data_type": kind, **empty, **fields}
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("raw", [True, False])
def test_tensors_of_onnx(rng, dtype, raw):
    vectors = vectors_of(rng, dtype)
    node, values = onnx_node(vectors)
    field = {np.float16: "int32_data", np.float32: "float_data", np.float64: "double_data"}[dtype]
    tensors = []
    for name, array in values.items():
        numbers = array.view(np.uint16) if dtype == np.float16 else array
        fields = {"raw_data": array.tobytes()} if raw else {field: numbers.tolist()}
        tensors.append(proto(name, array, **fields))
    for initializers in (tensors, {tensor.name: tensor for tensor in tensors}):
        layer = bnfast.BatchNorm2d.from_onnx(node, initializers)
        for name, array in vectors.items():
            np.testing.assert_array_equal(getattr(layer, name), array)


@pytest.mark.parametrize("raw", [True, False])
def test_bfloat16_tensors_of_onnx(rng, raw):
    bits = np.array([0x3F00, 0x3F80, 0x4040], np.uint16)  # 0.5, 1 and 3
    node, values = onnx_node(vectors_of(rng))
    fields = {"raw_data": bits.tobytes()} if raw else {"int32_data": bits.tolist()}
    values["w"] = proto("w", bits, data_type=16, **fields)
    layer = bnfast.BatchNorm2d.from_onnx(node, values)
    np.testing.assert_array_equal(layer.weight, [0.5, 1.0, 3.0])


def test_the_defaults_of_onnx(rng):
    node, values = onnx_node(vectors_of(rng))
    node.attribute = []
    layer = bnfast.BatchNorm2d.from_onnx(node, values)
    assert (layer.eps, layer.momentum) == (float(np.float32(1e-5)), 0.1)


def test_the_mode_of_a_node_is_ignored(rng):
    node, values = onnx_node(vectors_of(rng), training_mode=1, spatial=1)
    assert bnfast.BatchNorm2d.from_onnx(node, values).training is False


def test_onnx_nodes_that_cannot_be_taken(rng):
    node, values = onnx_node(vectors_of(rng), spatial=0)
    with pytest.raises(ValueError, match=r"^spatial=0, statistics for each pixel"):
        bnfast.BatchNorm2d.from_onnx(node, values)

    node, values = onnx_node(vectors_of(rng))
    del values["b"], values["var"]
    with pytest.raises(
        ValueError,
        match=r"^no initializer for b \(B\), var \(input_var\); there are \['mean', 'w'\]$",
    ):
        bnfast.BatchNorm2d.from_onnx(node, values)

    node.input = ["x", "w"]
    with pytest.raises(
        ValueError,
        match=r"^expected the inputs X, scale, B, input_mean, input_var, got \['x', 'w'\]$",
    ):
        bnfast.BatchNorm2d.from_onnx(node, values)

    node.op_type = "Conv"
    with pytest.raises(TypeError, match=r"^expected a BatchNormalization node of ONNX, got Conv$"):
        bnfast.BatchNorm2d.from_onnx(node, values)
    with pytest.raises(TypeError, match=r"^expected a BatchNormalization node of ONNX, got dict$"):
        bnfast.BatchNorm2d.from_onnx({}, values)


def test_onnx_tensors_that_cannot_be_taken(rng):
    node, values = onnx_node(vectors_of(rng))
    values["w"] = proto("w", np.ones(3, np.int64))
    with pytest.raises(TypeError, match=r"^w should hold real numbers, got ONNX data type 7$"):
        bnfast.BatchNorm2d.from_onnx(node, values)
    values["w"] = proto("w", np.ones(3, np.float32), data_location=1)
    with pytest.raises(ValueError, match=r"^w lies in another file: load the model with onnx.load"):
        bnfast.BatchNorm2d.from_onnx(node, values)
