"""Bad input: each case gets its message before any kernel runs, and changes nothing.

A case is a call on a fresh scene: a layer that has trained, arrays, and an ``out``. After the error
every array and the layer's state must be what they were, and the layer's gradient that of the
forward call before.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import bnfast
import bnfast.functional as F
from bnfast import BackendUnavailableError, UnknownBackendError, registry
from bnfast.testing.bounds import assert_same_bits

SHAPE = (4, 3, 2, 8)
CAST = "expected an array of float32 or float64, got dtype {}; cast it first, for example "


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


@pytest.fixture
def scene(rng):
    return Scene(rng)


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
    "float16": (
        lambda s: {"x": s.x.astype(np.float16)},
        TypeError,
        CAST.format("float16") + "x.astype(np.float32)",
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
        "masked arrays are not accepted: the mask would be ignored",
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


@pytest.fixture
def absent_backend(monkeypatch):
    """A backend that is known and cannot run."""
    entry = registry.Entry("absent", "absent_kernels", "pip install absent", automatic_for=None)
    monkeypatch.setitem(registry._table, "absent", entry)


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


@pytest.mark.usefixtures("absent_backend")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", COMMON | IN_TRAINING)
def test_layer(scene, case, training):
    if case in IN_TRAINING and not training:
        arguments = IN_TRAINING[case][0](scene)
        out = np.empty_like(arguments.get("x", scene.x))
        assert layer_call(scene, {"out": out, **arguments}, training)() is out
        return
    arguments, error, message = (COMMON | IN_TRAINING)[case]
    arguments = arguments(scene)
    expect(scene, layer_call(scene, arguments, training), error, message)


def test_layer_without_running_statistics_checks_as_in_training(scene):
    scene.layer.eval()
    scene.layer.running_mean = scene.layer.running_var = None
    for arguments, error, message in IN_TRAINING.values():
        expect(scene, layer_call(scene, arguments(scene), False), error, message)


@pytest.mark.usefixtures("absent_backend")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", COMMON | IN_TRAINING)
def test_batch_norm(scene, case, training):
    arguments, error, message = (COMMON | IN_TRAINING)[case]
    arguments = arguments(scene)
    call = {"x": scene.x, "running_mean": scene.mean, "running_var": scene.var}
    call |= {"training": training, **arguments}
    if case in IN_TRAINING and not training:
        assert F.batch_norm(**call).shape == call["x"].shape
        return
    expect(scene, lambda: F.batch_norm(**call), error, message)


@pytest.mark.usefixtures("absent_backend")
@pytest.mark.parametrize("case", COMMON | IN_TRAINING)
def test_batch_norm_with_stats(scene, case):
    arguments, error, message = (COMMON | IN_TRAINING)[case]
    call = {"x": scene.x, **arguments(scene)}
    expect(scene, lambda: F.batch_norm_with_stats(**call), error, message)


@pytest.mark.usefixtures("absent_backend")
@pytest.mark.parametrize(
    "case",
    ["int32", "bool", "complex", "object", "masked", "none", "backend_unknown", "backend_absent"],
)
def test_moments(scene, case):
    arguments, error, message = COMMON[case]
    call = {"x": scene.x, **arguments(scene)}
    expect(scene, lambda: F.moments(**call), error, message)


@pytest.mark.parametrize("training", [True, False])
def test_out_of_which_nobody_can_say_whether_it_overlaps(rng, scene, training):
    """Of two arrays of 14 axes with random strides that is a knapsack; it is refused in time."""
    memory = np.empty(2**28, np.float32)  # virtual: the call never gets to it

    def tangled(start):
        strides = [4 * int(step) for step in rng.integers(2**20, 2**24, 14)]
        return as_strided(memory[start:], (2,) * 14, strides)

    x, out = tangled(0), tangled(12_345)
    with pytest.raises(np.exceptions.TooHardError):
        np.shares_memory(x, out, max_work=100_000)
    expect(
        scene,
        lambda: F.batch_norm(x, np.ones(2), np.ones(2), training=training, out=out),
        ValueError,
        "out overlaps x without being x itself",
    )


# ---- dimensions and channels --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "shape", "accepted"),
    [
        (bnfast.BatchNorm1d, (3,), "2D or 3D"),
        (bnfast.BatchNorm1d, (2, 3, 4, 5), "2D or 3D"),
        (bnfast.BatchNorm2d, (2, 3), "4D"),
        (bnfast.BatchNorm2d, (3, 4, 5), "4D"),
        (bnfast.BatchNorm2d, (1, 2, 3, 4, 5), "4D"),
        (bnfast.BatchNorm3d, (2, 3, 4, 5), "5D"),
        (bnfast.BatchNorm3d, (), "5D"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_dimensions_of_a_layer(scene, cls, shape, accepted, training):
    scene.layer = cls(3).train(training)
    before = scene.layer.state_dict()
    with pytest.raises(ValueError, match="input") as caught:
        scene.layer(np.ones(shape, np.float32))
    assert str(caught.value) == (
        f"expected {accepted} input (got {len(shape)}D input): axis 0 is the batch, axis 1 the "
        f"channels, got shape {shape}"
    )
    for name, value in scene.layer.state_dict().items():
        np.testing.assert_array_equal(value, before[name], name)


@pytest.mark.parametrize("shape", [(), (3,), (0,)])
def test_dimensions_of_the_functions(shape):
    x = np.ones(shape, np.float32)
    message = (
        f"expected at least 2D input (got {len(shape)}D input): axis 0 is the batch, axis 1 the "
        f"channels, got shape {shape}"
    )
    vector = np.ones(3)
    for call in (
        lambda: F.batch_norm(x, vector, vector),
        lambda: F.batch_norm_with_stats(x),
        lambda: F.batch_norm_backward(x, x, None, vector, vector),
        lambda: F.moments(x),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call()


@pytest.mark.parametrize("training", [True, False])
def test_channels_of_a_layer(scene, training):
    scene.layer.train(training)
    expect(
        scene,
        lambda: scene.layer(scene.x[:, :2]),
        ValueError,
        "running_mean should contain 2 elements not 3: expected input with 3 channels on axis 1, "
        "got shape (4, 2, 2, 8)",
    )


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("training", [True, False])
def test_vectors_of_the_functions(scene, name, training):
    given = {
        "running_mean": scene.mean,
        "running_var": scene.var,
        "weight": scene.weight,
        "bias": scene.bias,
        "training": training,
        "out": scene.out,
    }
    for bad, error, message in (
        (
            np.ones(4, np.float32),
            ValueError,
            f"{name} should contain 3 elements not 4: expected shape (3,), got (4,)",
        ),
        (
            np.ones((1, 3), np.float32),
            ValueError,
            f"{name} should contain 3 elements not 3: expected shape (3,), got (1, 3)",
        ),
        (np.ones(3, bool), TypeError, f"{name} should hold real numbers, got dtype bool"),
        (
            np.ones(3, np.complex64),
            TypeError,
            f"{name} should hold real numbers, got dtype complex64",
        ),
        (np.ones(3, object), TypeError, f"{name} should hold real numbers, got dtype object"),
    ):
        call = {**given, name: bad}
        expect(scene, lambda call=call: F.batch_norm(scene.x, **call), error, message)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics_that_cannot_be_updated(scene, name):
    good = {"running_mean": scene.mean, "running_var": scene.var, "training": True}
    for bad, error, message in (
        ([0.0, 1.0, 2.0], TypeError, f"{name} should be an array: training updates it in place"),
        (
            np.ones(3, int),
            TypeError,
            f"{name} should be floating, got int64: training updates it in place",
        ),
        (
            read_only(scene.mean),
            ValueError,
            f"{name} is read-only: training updates it in place",
        ),
    ):
        call = {**good, name: bad}
        expect(scene, lambda call=call: F.batch_norm(scene.x, **call), error, message)
        assert F.batch_norm(scene.x, **(call | {"training": False})).shape == SHAPE


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_one_running_statistic_without_the_other(scene, name):
    both = {"running_mean": scene.mean, "running_var": scene.var, name: None}
    expect(
        scene,
        lambda: F.batch_norm(scene.x, **both),
        ValueError,
        f"{name} must be defined in evaluation mode: pass it, or training=True to use the "
        "statistics of this batch",
    )
    message = "running_mean and running_var must either both be None or neither be None"
    call = {**both, "training": True}
    expect(scene, lambda: F.batch_norm(scene.x, **call), ValueError, message)
    setattr(scene.layer, name, None)
    for training in (True, False):
        scene.layer.train(training)
        expect(scene, lambda: scene.layer(scene.x, out=scene.out), ValueError, message)
    scene.layer.train().track_running_stats = False
    assert scene.layer(scene.x).shape == SHAPE


@pytest.mark.parametrize("momentum", ["much", object(), 1j])
def test_momentum(scene, momentum):
    scene.layer.momentum = momentum
    before = scene.snapshot()
    with pytest.raises((TypeError, ValueError), match=r"float|complex"):
        scene.layer(scene.x, out=scene.out)
    with pytest.raises((TypeError, ValueError), match=r"float|complex"):
        F.batch_norm(scene.x, scene.mean, scene.var, training=True, momentum=momentum)
    for name, value in scene.snapshot().items():
        np.testing.assert_array_equal(value, before[name], name)


# ---- backward -----------------------------------------------------------------------------------


BACKWARD = {
    "dy_shape": (
        lambda s: {"dy": s.dy[:1]},
        ValueError,
        "dy should have the shape of x, (4, 3, 2, 8), got (1, 3, 2, 8)",
    ),
    "dy_dtype": (
        lambda s: {"dy": s.dy.astype(np.float64)},
        TypeError,
        "dy should have the dtype of x, float32, got float64",
    ),
    "dy_integer": (
        lambda s: {"dy": s.dy.astype(int)},
        TypeError,
        "dy should have the dtype of x, float32, got int64",
    ),
    "x_integer": (
        lambda s: {"x": s.x.astype(int)},
        TypeError,
        CAST.format("int64") + "x.astype(np.float32)",
    ),
    "y_missing": (
        lambda s: {"activation": "relu"},
        ValueError,
        'activation="relu" needs y, the output of the forward call',
    ),
    "y_shape": (
        lambda s: {"activation": "relu", "y": s.y[1:]},
        ValueError,
        "y should have the shape of x, (4, 3, 2, 8), got (3, 3, 2, 8)",
    ),
    "activation": (
        lambda s: {"activation": "tanh", "y": s.y},
        ValueError,
        "unknown activation 'tanh': expected None or \"relu\"",
    ),
    "mean": (
        lambda s: {"mean": np.ones(2)},
        ValueError,
        "mean should contain 3 elements not 2: expected shape (3,), got (2,)",
    ),
    "invstd": (
        lambda s: {"invstd": np.ones((3, 1))},
        ValueError,
        "invstd should contain 3 elements not 3: expected shape (3,), got (3, 1)",
    ),
    "mean_missing": (
        lambda s: {"mean": None},
        TypeError,
        "mean should hold real numbers, got dtype object",
    ),
    "weight": (
        lambda s: {"weight": np.ones(4)},
        ValueError,
        "weight should contain 3 elements not 4: expected shape (3,), got (4,)",
    ),
    "out_shape": (
        lambda s: {"out": s.out[1:]},
        ValueError,
        "out should have the shape of x, (4, 3, 2, 8), got (3, 3, 2, 8)",
    ),
    "out_read_only": (
        lambda s: {"out": read_only(s.out)},
        ValueError,
        "out is read-only",
    ),
    "out_is_x": (
        lambda s: {"out": s.x},
        ValueError,
        "out overlaps x",
    ),
    "out_is_y": (
        lambda s: {"activation": "relu", "y": s.y, "out": s.y},
        ValueError,
        "out overlaps y",
    ),
    "out_overlaps_dy": (
        lambda s: {"x": s.y, "dy": s.x, "out": s.overlapping},
        ValueError,
        "out overlaps dy without being dy itself",
    ),
    "backend": (
        lambda s: {"backend": "cyton"},
        UnknownBackendError,
        re.compile(r"^unknown backend 'cyton' \(asked for by the argument backend=\)"),
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", BACKWARD)
def test_batch_norm_backward(scene, case, training):
    arguments, error, message = BACKWARD[case]
    call = {
        "dy": scene.dy,
        "x": scene.x,
        "weight": scene.weight,
        "mean": scene.mean,
        "invstd": scene.var,
        "training": training,
        "out": scene.out,
        **arguments(scene),
    }
    expect(scene, lambda: F.batch_norm_backward(**call), error, message)


@pytest.mark.parametrize("case", ["dy_shape", "dy_dtype", "dy_integer"])
def test_backward_of_a_layer(scene, case):
    arguments, error, message = BACKWARD[case]
    expect(scene, lambda: scene.layer.backward(**arguments(scene)), error, message)


# ---- construction and state ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_features": -1}, ValueError, "num_features should not be negative, got -1"),
        (
            {"num_features": 2.0},
            TypeError,
            "'float' object cannot be interpreted as an integer",
        ),
        ({"eps": -1.0}, ValueError, COMMON["eps_negative"][2].replace("1e-05", "1.0")),
        ({"eps": np.nan}, ValueError, COMMON["eps_nan"][2]),
        ({"activation": "gelu"}, ValueError, COMMON["activation"][2]),
        ({"dtype": np.float16}, TypeError, "dtype should be float32 or float64, got float16"),
        ({"dtype": int}, TypeError, "dtype should be float32 or float64, got int64"),
        (
            {"backend": "absent"},
            BackendUnavailableError,
            COMMON["backend_absent"][2],
        ),
        ({"backend": "cyton"}, UnknownBackendError, COMMON["backend_unknown"][2]),
    ],
)
@pytest.mark.usefixtures("absent_backend")
def test_construction(arguments, error, message):
    with pytest.raises(error) as caught:
        bnfast.BatchNorm2d(**{"num_features": 3, **arguments})
    if isinstance(message, re.Pattern):
        assert message.search(str(caught.value))
    else:
        assert str(caught.value) == message


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_assignment(scene, name):
    for bad, error, message in (
        (
            np.ones(4),
            ValueError,
            f"{name} should contain 3 elements not 4: expected shape (3,), got (4,)",
        ),
        (
            1.0,
            ValueError,
            f"{name} should contain 3 elements not 1: expected shape (3,), got ()",
        ),
        (
            np.ones(3, bool),
            TypeError,
            f"{name} should hold real numbers, got dtype bool",
        ),
        (
            ["a", "b", "c"],
            TypeError,
            f"{name} should hold real numbers, got dtype <U1",
        ),
    ):
        expect(scene, lambda bad=bad: setattr(scene.layer, name, bad), error, message)


OWN = "['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']"
STATES = {
    "missing": (
        {"weight": None},
        ValueError,
        f"cannot load the state of BatchNorm2d: missing keys ['weight']; expected {OWN}",
    ),
    "unexpected": (
        {"gamma": np.ones(3)},
        ValueError,
        f"cannot load the state of BatchNorm2d: unexpected keys ['gamma']; expected {OWN}",
    ),
    "missing_and_unexpected": (
        {"bias": None, "running_var": None, "beta": np.ones(3)},
        ValueError,
        "cannot load the state of BatchNorm2d: missing keys ['bias', 'running_var'], "
        f"unexpected keys ['beta']; expected {OWN}",
    ),
    "shape": (
        {"running_var": np.ones(4)},
        ValueError,
        "running_var should contain 3 elements not 4: expected shape (3,), got (4,)",
    ),
    "dtype": (
        {"running_var": np.ones(3, object)},
        TypeError,
        "running_var should hold real numbers, got dtype object",
    ),
    **{
        f"counter_{name}": (
            {"num_batches_tracked": value},
            ValueError,
            f"num_batches_tracked should be one non-negative integer, got {value!r}",
        )
        for name, value in {
            "negative": np.array(-1),
            "two": np.array([1, 2]),
            "none": np.array([], int),
            "fraction": np.array(2.5),
            "nan": np.array(np.nan),
            "inf": np.array(np.inf),
            "bool": np.array(True),
            "text": np.array("7"),
        }.items()
    },
}


@pytest.mark.parametrize("case", STATES)
def test_load_state_dict(rng, scene, case):
    changes, error, message = STATES[case]
    state = {name: rng.normal(size=3) for name in ("weight", "bias", "running_mean", "running_var")}
    state |= {"num_batches_tracked": np.array(9)}
    state = {name: value for name, value in (state | changes).items() if value is not None}
    expect(scene, lambda: scene.layer.load_state_dict(state), error, message)
    if "missing" not in case and "unexpected" not in case:
        call = lambda: scene.layer.load_state_dict(state, strict=False)  # noqa: E731
        expect(scene, call, error, message)


def test_load_state_dict_from_a_file_with_objects(scene, tmp_path):
    """NumPy refuses to unpickle, and nothing is loaded, though other keys come first."""
    state = scene.layer.state_dict() | {"running_var": np.array([None] * 3)}
    state["weight"] = np.full(3, 9.0)
    np.savez(tmp_path / "state.npz", **state)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as file:
        expect(
            scene,
            lambda: scene.layer.load_state_dict(file),
            ValueError,
            "Object arrays cannot be loaded when allow_pickle=False",
        )


def test_prefix_in_messages(scene):
    state = {"bn.weight": np.ones(3), "bn.extra": np.ones(3), "weight": np.ones(3)}
    own = OWN.replace("'weight", "'bn.weight").replace("'bias", "'bn.bias")
    own = own.replace("'running", "'bn.running").replace("'num", "'bn.num")
    expect(
        scene,
        lambda: scene.layer.load_state_dict(state, prefix="bn."),
        ValueError,
        "cannot load the state of BatchNorm2d: missing keys ['bn.bias', 'bn.running_mean', "
        f"'bn.running_var'], unexpected keys ['bn.extra']; expected {own}",
    )


# ---- arrays on a device -------------------------------------------------------------------------


class OnDevice(SimpleNamespace):
    """The metadata of an array on a GPU, which no host backend reads."""

    dtype, ndim, shape, strides = np.dtype(np.float32), 4, SHAPE, (192, 64, 32, 4)

    def __dlpack_device__(self):
        return (2, 0)


def test_an_array_on_a_device_is_not_copied_to_the_host(scene):
    expected = re.compile("does not read arrays of type")
    call = layer_call(scene, {"x": OnDevice(), "backend": "numpy"}, True)
    expect(scene, call, TypeError, expected)
    options = {"backend": "numpy"}
    expect(scene, lambda: F.moments(OnDevice(), **options), TypeError, expected)
