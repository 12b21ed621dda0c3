"""Bad input to a call: each case gets its message before any kernel runs, and changes nothing."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
from bad_calls import COMMON, IN_TRAINING, MASKED, SHAPE, expect, layer_call, read_only

import bnfast
import bnfast.functional as F


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


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("training", [True, False])
def test_masked_parameters(scene, name, training):
    masked = {name: np.ma.masked_array(scene.weight, scene.weight > 0)}
    vectors = (scene.mean, scene.var)
    for call in (
        lambda: F.batch_norm(scene.x, *vectors, training=training, **masked),
        lambda: F.batch_norm_with_stats(scene.x, **masked),
        lambda: setattr(scene.layer, name, masked[name]),
        lambda: scene.layer.load_state_dict(masked, strict=False),
    ):
        expect(scene, call, TypeError, MASKED)


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
