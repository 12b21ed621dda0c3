"""Which arrays of a call lie on recycled memory: all large ones, on every host backend."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from backends_here import over_backends
from lending import address

import bnfast
import bnfast.functional as F
from bnfast import memory
from bnfast.backends import host_arrays
from bnfast.layout import plan

SHAPE = (2, 8, 128, 132)  # 1.03 MiB of float32
LAYOUTS = {
    "channels-first": np.ascontiguousarray,
    "channels-last": lambda x: np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
}
over_layouts = pytest.mark.parametrize("lay", LAYOUTS.values(), ids=LAYOUTS)


@pytest.fixture(autouse=True)
def allocated(bound, monkeypatch):
    """Return the sizes of the blocks that had to be allocated, from an empty cache on."""
    sizes = []
    allocate = memory._allocate

    def counted(size):
        sizes.append(size)
        return allocate(size)

    monkeypatch.setattr(memory, "_allocate", counted)
    return sizes


def check_ordinary(y, like):
    assert type(y) is np.ndarray
    assert (y.shape, y.strides, y.dtype) == (like.shape, like.strides, like.dtype)
    assert address(y) % 64 == 0
    assert y.flags.writeable


@over_layouts
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("training", [False, True])
@over_backends
def test_a_loop_over_a_layer_allocates_once(allocated, rng, backend, training, dtype, lay):
    layer = bnfast.BatchNorm2d(SHAPE[1], backend=backend).train(training)
    x = lay(rng.normal(size=SHAPE).astype(dtype))
    addresses = set()
    for _ in range(5):
        y = layer(x)
        check_ordinary(y, x)
        addresses.add(address(y))
        del y
    assert len(addresses) == len(allocated) == 1


@over_layouts
@over_backends
def test_two_blocks_alternate_while_the_last_output_is_kept(allocated, rng, backend, lay):
    layer = bnfast.BatchNorm2d(SHAPE[1], backend=backend).eval()
    x = lay(rng.normal(size=SHAPE).astype(np.float32))
    addresses = Counter()
    y = None
    for _ in range(6):
        last, y = y, layer(x)
        addresses[address(y)] += 1
        if last is not None:
            assert np.array_equal(last, y)
    del last
    assert len(addresses) == len(allocated) == 3  # last, y, and the output on its way
    y = None
    for _ in range(6):
        y = layer(x)
    assert len(allocated) == 3


@over_layouts
@over_backends
def test_outputs_in_use_are_not_written_over(rng, backend, lay):
    layer = bnfast.BatchNorm2d(SHAPE[1], backend=backend).eval()
    inputs = [lay(rng.normal(size=SHAPE).astype(np.float32)) for _ in range(3)]
    expected = [layer(x, out=np.empty_like(x)) for x in inputs]
    for _ in range(2):  # the second time on blocks that held other values
        outputs = [layer(x)[:, 1:] for x in inputs]
        assert all(
            np.array_equal(y, right[:, 1:]) for y, right in zip(outputs, expected, strict=True)
        )
        inputs.reverse()
        expected.reverse()
        del outputs


@over_layouts
@pytest.mark.parametrize("training", [False, True])
@over_backends
def test_a_loop_over_backward_allocates_once(allocated, rng, backend, training, lay):
    x, dy = (lay(rng.normal(size=SHAPE).astype(np.float32)) for _ in range(2))
    y, mean, invstd = F.batch_norm_with_stats(
        x, activation="relu", out=np.empty_like(x), backend=backend
    )
    assert allocated == []
    for _ in range(4):
        gradients = F.batch_norm_backward(
            dy,
            x,
            None,
            mean,
            invstd,
            training=training,
            activation="relu",
            y=y,
            residual=True,
            backend=backend,
        )
        check_ordinary(gradients.dx, x)
        check_ordinary(gradients.dresidual, x)
        del gradients
    assert len(allocated) == 2  # dx and dresidual


@over_backends
def test_a_loop_over_training_steps_allocates_only_at_first(allocated, rng, backend):
    layer = bnfast.BatchNorm2d(SHAPE[1], activation="relu", backend=backend)
    x = rng.normal(size=SHAPE).astype(np.float32)
    counts = []
    for _ in range(5):
        dx = layer.backward(layer(x, residual=x))
        counts.append(len(allocated))
        del dx
    assert counts[1:] == [counts[1]] * 4


@over_backends
def test_the_copy_of_a_strided_input_is_recycled(allocated, rng, backend):
    layer = bnfast.BatchNorm2d(SHAPE[1], backend=backend).eval()
    x = rng.normal(size=(*SHAPE[:-1], 2 * SHAPE[-1])).astype(np.float32)[..., ::2]
    for _ in range(3):
        layer(x)
    assert len(allocated) == 2  # the copy and the output


@over_backends
def test_nothing_is_allocated_for_out(allocated, rng, backend):
    layer = bnfast.BatchNorm2d(SHAPE[1], backend=backend)
    x = rng.normal(size=SHAPE).astype(np.float32)
    layer(x, out=np.empty_like(x))
    layer.eval()(x, out=x)
    assert allocated == []


@pytest.mark.parametrize(("elements", "blocks"), [(2**18 - 1, 0), (2**18, 1)])
def test_small_arrays_come_from_numpy(allocated, elements, blocks):
    x = np.zeros((1, 1, elements), np.float32)
    y = host_arrays.empty(plan(x.shape, x.strides, x.dtype), like=x)
    assert len(allocated) == blocks
    assert y.flags.owndata == (blocks == 0)
