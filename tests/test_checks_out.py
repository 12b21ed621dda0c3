"""An ``out`` or another array that a call refuses, and those that look alike and are fine."""

from __future__ import annotations

import numpy as np
import pytest
from bad_calls import SHAPE, expect
from numpy.lib.stride_tricks import as_strided

import bnfast
import bnfast.functional as F
from bnfast.testing.bounds import assert_same_bits


@pytest.mark.parametrize("training", [True, False])
def test_out_of_which_nobody_can_say_whether_it_overlaps(rng, scene, training):
    """Of two arrays of 14 axes with random strides that is a knapsack; it is refused in time."""
    memory = np.empty(2**28, np.float32)  # virtual: the call never gets to it

    def tangled(start):
        while True:
            steps = rng.integers(2**20, 2**24, 14)
            places = np.zeros(1, np.int64)
            for step in steps:
                places = np.concatenate([places, places + step])
            if np.unique(places).size == places.size:  # no two elements in one place
                return as_strided(memory[start:], (2,) * 14, [4 * int(step) for step in steps])

    def too_hard(x, out):
        try:
            np.shares_memory(x, out, max_work=100_000)
        except np.exceptions.TooHardError:
            return True
        return False

    pairs = ((tangled(0), tangled(12_345)) for _ in range(50))  # a few of them are easy
    x, out = next(pair for pair in pairs if too_hard(*pair))
    expect(
        scene,
        lambda: F.batch_norm(x, np.ones(2), np.ones(2), training=training, out=out),
        ValueError,
        "out overlaps x without being x itself",
    )


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("places", [slice(0, 3), slice(5, 14, 4), slice(-1, -4, -1)])
def test_out_that_holds_running_statistics(scene, name, places):
    running = {"running_mean": scene.mean, "running_var": scene.var}
    running[name] = scene.out.reshape(-1)[places]
    expect(
        scene,
        lambda: F.batch_norm(scene.x, **running, training=True, out=scene.out),
        ValueError,
        f"out overlaps {name}",
    )


@pytest.mark.parametrize("name", ["mean", "invstd"])
def test_dx_that_holds_the_statistics(rng, scene, name):
    """Vectors of float64 are not copied on their way to the kernels."""
    x, dy, out = rng.normal(3, 2, (3, *SHAPE))
    statistics = {"mean": np.zeros(3), "invstd": np.ones(3), name: out.reshape(-1)[5:8]}
    expect(
        scene,
        lambda: F.batch_norm_backward(dy, x, None, **statistics, out=out),
        ValueError,
        f"out overlaps {name}",
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("axis", range(4))
def test_out_with_repeated_elements(scene, axis, training):
    steps = [0 if i == axis else step for i, step in enumerate(scene.out.strides)]
    out = as_strided(scene.out, SHAPE, steps)
    assert out.flags.writeable
    vectors = (scene.mean, scene.var)
    scene.layer.train(training)
    for call in (
        lambda: scene.layer(scene.x, out=out),
        lambda: F.batch_norm(scene.x, *vectors, training=training, out=out),
        lambda: F.batch_norm_with_stats(scene.x, out=out),
        lambda: F.batch_norm_backward(
            scene.dy, scene.x, None, *vectors, training=training, out=out
        ),
    ):
        expect(scene, call, ValueError, "out has elements that share their memory")


@pytest.mark.parametrize("training", [True, False])
def test_out_is_x_with_another_stride_along_an_axis_of_one(rng, training):
    a, residual = rng.normal(3, 2, (2, *SHAPE)).astype(np.float32)
    one, same = a[:1], a[0][None]
    assert one.strides != same.strides
    rest = a[1:].copy()
    apart, layer = (bnfast.BatchNorm2d(3).train(training) for _ in range(2))
    x = one.copy()
    expected = apart(x, residual[:1])
    assert layer(one, residual[:1], out=same) is same
    assert_same_bits("out=x", one, expected)
    assert_same_bits("the other samples", a[1:], rest)
    if training:
        with pytest.raises(RuntimeError, match="its input was overwritten by out=x"):
            layer.backward(x)
    layer(x, residual[:1], out=residual[0][None])
    assert_same_bits("out=residual", residual[:1], expected)


@pytest.mark.parametrize("training", [True, False])
def test_dx_in_dy_with_another_stride_along_an_axis_of_one(rng, training):
    x, dy = rng.normal(3, 2, (2, *SHAPE)).astype(np.float32)
    vectors = (np.array([1.0, -2.0, 3.0]), np.zeros(3), np.ones(3))
    expected = F.batch_norm_backward(dy[:1].copy(), x[:1], *vectors, training=training).dx
    F.batch_norm_backward(dy[:1], x[:1], *vectors, training=training, out=dy[0][None])
    assert_same_bits("dx", dy[:1], expected)
