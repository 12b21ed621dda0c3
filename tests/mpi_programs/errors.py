"""Whatever is wrong on one rank is the same error on all, nothing has changed, and work goes on."""

from __future__ import annotations

import sys
import time

import numpy as np
from mpi4py import MPI

from bnfast.interop.mpi import SyncBatchNorm2d

comm = MPI.COMM_WORLD
rng = np.random.default_rng(int(sys.argv[1]) + comm.rank)
last = comm.size - 1
odd = comm.rank == last
x = rng.normal(3, 2, (comm.rank + 2, 6, 5, 4)).astype(np.float32)
dy = rng.normal(size=x.shape).astype(np.float32)
layer, other = SyncBatchNorm2d(6), SyncBatchNorm2d(6)
layer(x)
other(x)

CASES = {
    "channels": (
        lambda: layer(x[:, :3] if odd else x),
        ValueError,
        f"refused on rank {last}: running_mean should contain 3 elements not 6",
    ),
    "dtype": (lambda: layer(x.astype(float) if odd else x), TypeError, f"rank {last}: float64"),
    "integers": (lambda: layer(x.astype(int) if odd else x), TypeError, "got dtype int64"),
    "dimensions": (lambda: layer(x[0] if odd else x), ValueError, "expected 4D input"),
    "residual": (
        lambda: layer(x, x[:1] if odd else x),
        ValueError,
        "residual should have the shape",
    ),
    "gradient": (lambda: layer.backward(dy[:, :2] if odd else dy), ValueError, "dy should have"),
    "everywhere": (lambda: layer(x[0]), ValueError, "got 3D input"),
    "direction": (
        lambda: layer.backward(dy) if odd else layer(x),
        RuntimeError,
        f"rank {last}: backward of layer 0",
    ),
    "order": (
        lambda: other(x) if odd else layer(x),
        RuntimeError,
        f"rank {last}: forward of layer 1",
    ),
    "one value": (lambda: layer(x[: int(odd), :, :1, :1]), ValueError, "more than 1 value"),
    "layers": (lambda: SyncBatchNorm2d(3 if odd else 6)(x), ValueError, "disagree on num_features"),
    "parameters": (
        lambda: SyncBatchNorm2d(6, dtype=float if odd else np.float32)(x),
        ValueError,
        "disagree on the dtype of parameters",
    ),
}

for name, (call, kind, words) in CASES.items():
    before = layer.state_dict(), layer.num_batches_tracked
    start = time.monotonic()
    try:
        call()
        raised = (None, "nothing was raised")
    except Exception as error:
        raised = (type(error), str(error))
    took = time.monotonic() - start
    everywhere = comm.allgather(raised)
    assert all(one == everywhere[0] for one in everywhere), (name, everywhere)
    assert raised[0] is kind, (name, raised)
    assert words in raised[1], (name, raised)
    assert took < 10, (name, took)
    for key, value in before[0].items():
        np.testing.assert_array_equal(layer.state_dict()[key], value, name)
    layer(x)
    layer.backward(dy)
print("all errors alike", flush=True)
