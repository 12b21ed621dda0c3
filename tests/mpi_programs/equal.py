"""A batch cut at random is normalised and differentiated as one, in the same bits on all ranks."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).parents[1]))

from exact_forward import assert_normalised

import bnfast
from bnfast.interop import mpi
from bnfast.testing import bounds, reference
from bnfast.testing.cases import draw
from bnfast.testing.reference import rows, wide

comm = MPI.COMM_WORLD
rng = np.random.default_rng(int(sys.argv[1]))  # the same numbers on all ranks
amount = int(sys.argv[2])


def assert_same_on_all(*arrays):
    digests = comm.allgather([array.tobytes() for array in arrays])
    assert all(digest == digests[0] for digest in digests)


def assert_gradients(layer, y, dy, dx, inputs, relu):
    """Check dx, and the gradients of weight and bias, of the whole batch against the bounds."""
    exact = reference.moments(wide(rows(inputs.x)))
    count = len(exact.mean) and inputs.x.size // len(exact.mean)
    var = exact.m2 / count
    xhat = reference.standardize(wide(rows(inputs.x)), exact.mean, var, inputs.eps)
    g = reference.mask(wide(rows(dy)), rows(y) if relu else None)
    sums = reference.backward_sums(g, xhat)
    invstd = 1 / np.sqrt(var + wide(inputs.eps))
    inputs = inputs.replace(
        mean=exact.mean.astype(float),
        invstd=invstd.astype(float),
        sum_dy=sums.sum_dy.astype(float),
        sum_dy_xhat=sums.sum_dy_xhat.astype(float),
    )
    # The sums of a mean that was itself rounded: see the bound of m2 in `bnfast.spec`.
    growth = 1 + np.abs(inputs.mean * inputs.invstd)
    unit = 32 * 2.0**-53
    if layer.weight.dtype == np.float64:
        bound = unit * growth * np.maximum(sums.magnitude_dy, sums.magnitude_dy_xhat).astype(float)
        bounds.assert_within("grad_weight", layer.grad_weight, sums.sum_dy_xhat, bound)
        bounds.assert_within("grad_bias", layer.grad_bias, sums.sum_dy, unit * sums.magnitude_dy)
    exact_dx = reference.backward_input(
        g, xhat, invstd, wide(inputs.weight), sums.sum_dy, sums.sum_dy_xhat, count
    )
    bounds.assert_gradient(dx, exact_dx, g, xhat, inputs)


def check(number):
    """Compare one random batch, cut at random, on all the ranks and in this one process."""
    shape = tuple(int(n) for n in (rng.integers(2, 20), rng.integers(1, 7), rng.integers(1, 30)))
    dtype = (np.float32, np.float64)[number % 2]
    relu, with_residual = rng.integers(2, size=2)
    inputs = draw(rng, shape, dtype)
    if not with_residual:
        inputs = inputs.replace(residual=None)
    alone = bnfast.BatchNorm1d(
        shape[1],
        momentum=(0.1, None)[number % 3 == 0],
        dtype=np.float64,
        activation="relu" if relu else None,
    )
    alone.weight, alone.bias = inputs.weight, inputs.bias
    layer = mpi.convert(alone, comm)
    cuts = np.sort(rng.integers(0, shape[0] + 1, comm.size - 1))

    def own(array):
        return None if array is None else np.split(array, cuts)[comm.rank]

    for _ in range(2):
        y, whole = layer(own(inputs.x), own(inputs.residual)), alone(inputs.x, inputs.residual)
    y = np.concatenate(comm.allgather(y))
    assert_normalised(y, inputs, relu=bool(relu), training=True)
    dx = np.concatenate(comm.allgather(layer.backward(own(inputs.dy))))
    alone.backward(inputs.dy)
    assert_gradients(layer, y, inputs.dy, dx, inputs, bool(relu))
    assert_same_on_all(layer.running_mean, layer.running_var, layer.grad_weight, layer.grad_bias)
    np.testing.assert_allclose(layer.running_mean, alone.running_mean, rtol=1e-15)
    np.testing.assert_allclose(layer.running_var, alone.running_var, rtol=1e-9)
    assert layer.num_batches_tracked == alone.num_batches_tracked == 2
    assert y.dtype == whole.dtype == dx.dtype
    if with_residual:
        residuals = np.concatenate(comm.allgather(layer.grad_residual))
        np.testing.assert_array_equal(
            residuals, np.where(y > 0, inputs.dy, 0) if relu else inputs.dy
        )
    np.testing.assert_array_equal(layer.eval()(inputs.x), layer.freeze()(inputs.x))


def check_the_rest():
    """Copies stay in step, empty batches change nothing, recalibration takes all the data."""
    layer = mpi.SyncBatchNorm2d(3, comm=comm.Dup())
    x = rng.normal(3, 2, (12, 3, 5, 4)).astype(np.float32)
    part = np.array_split(x, comm.size)[comm.rank]
    layer(part)
    twin, other = copy.deepcopy(layer), pickle.loads(pickle.dumps(mpi.convert(layer)))
    np.testing.assert_array_equal(twin(part), layer(part))
    np.testing.assert_array_equal(other(part), layer(part))
    before = layer.running_mean.copy()
    assert layer(part[:0]).shape == (0, 3, 5, 4)
    assert layer.backward(part[:0]).shape == (0, 3, 5, 4)
    np.testing.assert_array_equal(layer.running_mean, before)
    alone = bnfast.BatchNorm2d(3)
    bnfast.recalibrate(alone, [alone], [x], progress=False)
    bnfast.recalibrate(layer, [layer], [part], progress=False)
    assert_same_on_all(layer.running_mean, layer.running_var)
    np.testing.assert_allclose(layer.running_var, alone.running_var, rtol=1e-6)


for number in range(amount):
    check(number)
check_the_rest()
print(f"equal in {amount} draws", flush=True)
