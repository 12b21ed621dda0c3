"""Train the example network on two halves of its batch, and on the whole; print both losses."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples"))

import simple_cnn
from simple_cnn import Draws, SimpleCNN, bnfast_batch_norm, cross_entropy

from bnfast.interop.mpi import SyncBatchNorm2d

comm = MPI.COMM_WORLD
dtype = np.dtype(sys.argv[1])


def network(batch_norm):
    draws = Draws(simple_cnn.SEED)
    images, labels = draws.normal(16, 3, 32, 32), draws.integers(10, 16)
    return SimpleCNN(draws, batch_norm, dtype=dtype), images.astype(dtype), labels


whole, images, labels = network(bnfast_batch_norm(None))
split, *_ = network(functools.partial(SyncBatchNorm2d, activation="relu"))
own = slice(comm.rank * 16 // comm.size, (comm.rank + 1) * 16 // comm.size)
share = (own.stop - own.start) / 16

for _ in range(10):
    expected = whole.train_step(images, labels)
    loss, dlogits = cross_entropy(split(images[own]), labels[own])
    split.backward(dlogits * dtype.type(share))  # of the mean over all images
    for layer in (split.conv1, split.conv2, split.fc):  # those of batch norm are summed already
        for name in ("grad_weight", "grad_bias"):
            setattr(layer, name, comm.allreduce(getattr(layer, name)))
    split.sgd_step()
    loss = comm.allreduce(loss * share)
    if comm.rank == 0:
        print(loss, expected, flush=True)
