"""Train the example network split over the ranks, and whole; print the losses of each step.

Whole twice: as it is, and with the layers that have a matrix computed in the ranks' parts. In
float32 their roundings alone part the losses of these two by 5e-6 within ten steps.
"""

from __future__ import annotations

import functools
import itertools
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


class InParts:
    """A layer with a weight that is given its batch in the ranks' parts."""

    def __init__(self, layer):
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias

    def __call__(self, x):
        self.inputs = [x[part] for part in parts]
        return np.concatenate([self.layer(x) for x in self.inputs])

    def backward(self, dy):
        self.grad_weight = self.grad_bias = 0
        results = []
        for x, part in zip(self.inputs, parts, strict=True):
            self.layer.x = x
            results.append(self.layer.backward(dy[part]))
            self.grad_weight = self.grad_weight + self.layer.grad_weight
            self.grad_bias = self.grad_bias + self.layer.grad_bias
        return np.concatenate(results)


whole, images, labels = network(bnfast_batch_norm(None))
in_parts, *_ = network(bnfast_batch_norm(None))
in_parts.layers[::3] = map(InParts, in_parts.layers[::3])
split, *_ = network(functools.partial(SyncBatchNorm2d, activation="relu"))
bounds = [rank * 16 // comm.size for rank in range(comm.size + 1)]
parts = [slice(*pair) for pair in itertools.pairwise(bounds)]
own = parts[comm.rank]
share = (own.stop - own.start) / 16

for _ in range(10):
    expected = [one.train_step(images, labels) for one in (whole, in_parts)]
    loss, dlogits = cross_entropy(split(images[own]), labels[own])
    split.backward(dlogits * dtype.type(share))  # of the mean over all images
    for layer in (split.conv1, split.conv2, split.fc):  # those of batch norm are summed already
        for name in ("grad_weight", "grad_bias"):
            setattr(layer, name, comm.allreduce(getattr(layer, name)))
    split.sgd_step()
    loss = comm.allreduce(loss * share)
    if comm.rank == 0:
        print(loss, *expected, flush=True)
