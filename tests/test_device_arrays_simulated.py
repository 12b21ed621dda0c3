"""Numba's own device arrays through the whole backend, kernels included, in its simulator.

Each test is a process of its own: whether Numba simulates is settled when it is imported.
"""

from __future__ import annotations

import pytest
from fresh_python import output_of

START = """
import numpy as np
import bnfast, bnfast.functional as F
from numba import cuda
from bnfast.testing.bounds import assert_same_bits

rng = np.random.default_rng({seed})
SHAPE = (3, 4, 2, 5)
draw = lambda: rng.normal(3, 2, SHAPE).astype(np.float32)
put = cuda.to_device
Fake = type(put(np.ones(1)))
"""

LAYOUTS = {
    "contiguous": "lambda a: put(a)",
    "channels-last": ("lambda a: put(a.transpose(0, 2, 3, 1).copy()).transpose((0, 3, 1, 2))"),
    "gaps": "lambda a: put(np.repeat(a, 2, axis=3))[..., ::2]",
    "reversed": "lambda a: put(a[::-1].copy())[::-1]",
}


@pytest.fixture
def simulated(rng):
    """Return a function that runs code in the simulator and returns what it prints."""
    start = START.format(seed=rng.integers(2**32))
    return lambda code: output_of(start + code, NUMBA_ENABLE_CUDASIM="1")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer(simulated, layout):
    printed = simulated(
        f"""
lay = {LAYOUTS[layout]}
x, residual, dy = draw(), draw(), draw()
layer, twin = (bnfast.BatchNorm2d(4, backend="cuda", activation="relu") for _ in range(2))
y, expected = layer(lay(x), lay(residual)), twin(x, residual)
dx, expected_dx = layer.backward(lay(dy)), twin.backward(dy)
for array, reference in (
    (y, expected), (dx, expected_dx), (layer.grad_residual, twin.grad_residual)
):
    assert type(array) is Fake, type(array)
    np.testing.assert_allclose(array.copy_to_host(), reference, rtol=1e-6, atol=1e-6)
for name in ("running_mean", "running_var", "grad_weight", "grad_bias"):
    np.testing.assert_allclose(getattr(layer, name), getattr(twin, name), rtol=1e-6, atol=1e-6)
like = x.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2) if "last" in {layout!r} else x
print(y.strides == dx.strides == like.strides)
"""
    )
    assert printed == "True"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out(simulated, layout):
    printed = simulated(
        f"""
lay = {LAYOUTS[layout]}
x, out = draw(), lay(draw())
layer = bnfast.BatchNorm2d(4, backend="cuda").eval()
layer.running_mean, layer.weight = rng.normal(size=(2, 4))
same = layer(put(x), out=out) is out
assert_same_bits("out", out.copy_to_host(), layer(x))
x = put(x)
reference = layer(x).copy_to_host()
assert_same_bits("x", layer(x, out=x).copy_to_host(), reference)
print(same)
"""
    )
    assert printed == "True"


def test_who_takes_what(simulated):
    printed = simulated(
        """
x = draw()
print(type(bnfast.BatchNorm2d(4, backend="cuda")(x)).__name__)
print(type(bnfast.BatchNorm2d(4)(x)).__name__, bnfast.get_backend() != "cuda")
try:
    bnfast.BatchNorm2d(4, backend="cuda")(put(x), residual=x)
except TypeError as error:
    print(error)

class OnGpu:
    __cuda_array_interface__ = {}

try:
    bnfast.BatchNorm2d(4)(OnGpu())
except TypeError as error:
    print(error)
"""
    )
    assert printed.splitlines() == [
        "ndarray",
        "ndarray True",
        "residual is in host memory, but x is on cuda:0: the arrays of a call lie in one place; "
        "copy one of them to where the other is",
        "backend 'cuda' (asked for by auto, for an array on a GPU) does not read arrays of type "
        "__main__.OnGpu on the device where this one lives; copy the array to the host first, or "
        "leave the choice to backend='auto'",
    ]


def test_copies_between_any_strides(simulated):
    printed = simulated(
        """
from bnfast.backends.cuda_kernels import copying
from bnfast.backends.cuda_kernels.arrays import describe

CUTS = [lambda n: slice(n), lambda n: slice(0, 2 * n, 2), lambda n: slice(n - 1, None, -1)]

def strided(shape, dtype):
    order = rng.permutation(len(shape))
    lengths = [shape[axis] for axis in order]
    room = rng.normal(size=[2 * n for n in lengths]).astype(dtype)
    view = room[tuple(CUTS[rng.integers(3)](n) for n in lengths)]
    return room, view.transpose(np.argsort(order))

ranks = set()
for shape in [(1,), (7,), (40,), (2, 3), (1, 1, 1), (2, 1, 3, 2), (2, 3, 2, 1, 2, 2)]:
    for dtype in (np.float32, np.float64):
        for broadcast in (False, True):
            _, source = strided(shape, dtype)
            source = np.broadcast_to(source[:1], shape) if broadcast else source
            room, target = strided(shape, dtype)
            before, held = room.copy(), target.copy()
            one, other = describe(Fake(source)), describe(Fake(target))
            ranks.add(len(copying._merged(one, other)))
            copying.run(one, other, 0)
            assert_same_bits("copied", target, source)
            target[...] = held
            assert_same_bits("beside it", room, before)
print(min(ranks), max(ranks) >= 3)
"""
    )
    assert printed == "0 True"
