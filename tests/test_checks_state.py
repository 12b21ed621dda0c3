"""Bad input to backward, construction, assignment and load_state_dict: refused, nothing changed."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
from bad_calls import CAST, COMMON, MASKED, expect, read_only

import bnfast
import bnfast.functional as F
from bnfast import BackendUnavailableError, UnknownBackendError

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
    "dy_masked": (
        lambda s: {"dy": np.ma.masked_array(s.dy, s.dy > 0)},
        TypeError,
        MASKED,
    ),
    "weight_masked": (
        lambda s: {"weight": np.ma.masked_array(s.weight, s.weight > 0)},
        TypeError,
        MASKED,
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


@pytest.mark.parametrize("case", ["dy_shape", "dy_dtype", "dy_masked", "dy_integer"])
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
        ({"momentum": "a"}, TypeError, "momentum should be a number or None, got 'a'"),
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
    "nan": (
        {"running_var": np.array([1.0, np.nan, 1.0])},
        ValueError,
        "running_var should hold numbers, got NaN in 1 of 3 channels, first in channel 1",
    ),
    "nan_float16": (
        {"running_var": np.array([np.nan, np.nan, 1.0], np.float16)},
        ValueError,
        "running_var should hold numbers, got NaN in 2 of 3 channels, first in channel 0",
    ),
    "wrong_model": (
        {name: np.ones(64) for name in ("weight", "bias", "running_mean", "running_var")},
        ValueError,
        "weight should contain 3 elements not 64: expected shape (3,), got (64,)",
    ),
    "bool": (
        {"running_mean": np.ones(3, bool)},
        TypeError,
        "running_mean should hold real numbers, got dtype bool",
    ),
    "complex": (
        {"running_mean": np.ones(3, complex)},
        TypeError,
        "running_mean should hold real numbers, got dtype complex128",
    ),
    "tensor_that_cannot_be_read": (
        {"bias": SimpleNamespace(detach=lambda: [][0])},
        TypeError,
        "bias should hold real numbers, got SimpleNamespace: list index out of range",
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


@pytest.mark.parametrize("state", [[1, 2], "weight", None, np.ones(3)])
def test_load_state_dict_from_no_mapping(scene, state):
    expect(
        scene,
        lambda: scene.layer.load_state_dict(state),
        TypeError,
        "cannot load the state of BatchNorm2d: expected a mapping of names to arrays, got "
        + type(state).__name__,
    )


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


def test_prefix_in_messages_about_values(rng, scene):
    state = scene.layer.state_dict("bn.")
    for name, bad, error, message in (
        ("bn.bias", np.ones(2), ValueError, "bn.bias should contain 3 elements not 2: expected"),
        ("bn.running_var", np.full(3, np.nan), ValueError, "bn.running_var should hold numbers"),
        ("bn.weight", np.ones(3, bool), TypeError, "bn.weight should hold real numbers, got"),
    ):
        expect(
            scene,
            lambda changed=state | {name: bad}: scene.layer.load_state_dict(changed, prefix="bn."),
            error,
            re.compile("^" + re.escape(message)),
        )
