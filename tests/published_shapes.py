"""Shapes of the batch normalisations in oneDNN's benchdnn: what its inputs for bnorm list.

Every shape is without the batch: ``(C, ...)``. The networks are run with several batch sizes, the
edge shapes come with their own.
"""

from __future__ import annotations

from typing import TypeAlias

Shape: TypeAlias = tuple[int, ...]


def _square(planes: dict[int, tuple[int, ...]]) -> list[Shape]:
    """Return shapes of square planes, from the channels for each height."""
    return [(c, size, size) for size, channels in planes.items() for c in channels]


RESNET_50 = _square(
    {112: (64,), 56: (256, 64), 28: (512, 128), 14: (1024, 256), 7: (2048, 512)},
)

GOOGLENET_V2 = _square(
    {
        112: (64,),
        56: (64, 192),
        28: (64, 96, 32, 128),
        14: (160, 96, 224, 64, 128, 192, 256),
        7: (192, 256, 352, 320, 160, 224, 128),
        4: (128,),
        2: (128,),
    }
)

GOOGLENET_V3 = _square(
    {
        149: (32,),
        147: (32, 64),
        73: (80,),
        71: (192,),
        35: (64, 48, 96, 32),
        17: (384, 96, 192, 128, 160),
        8: (320, 192, 384, 448),
    }
)

# Each layer of a dense block adds 32 channels; before its 3x3 convolution there are 128.
DENSENET_121 = _square(
    {
        112: (64,),
        56: tuple(range(64, 257, 32)),
        28: tuple(range(128, 513, 32)),
        14: (128, *range(256, 1025, 32)),
        7: (128, *range(512, 1025, 32)),
    }
)

NETWORKS = {
    "resnet_50": RESNET_50,
    "googlenet_v2": GOOGLENET_V2,
    "googlenet_v3": GOOGLENET_V3,
    "densenet_121": DENSENET_121,
}

BATCHES = (1, 17, 64)
"""benchdnn runs the networks with these."""

EDGES: list[Shape] = [
    # 1-D
    (1, 32, 30),
    (32, 128, 10),
    (32, 27, 7),
    (9, 128, 1),
    (2, 32, 32),
    (5, 33, 27),
    # 2-D; one value per channel; channels beside a power of two; few values, whose terms cancel
    (1, 1, 1, 1),
    (1, 3, 1, 1),
    (1, 256, 28, 28),
    (1, 257, 28, 28),
    (1, 1024, 28, 17),
    (2, 128, 2, 2),
    (2, 256, 28, 28),
    (4, 200, 17, 16),
    # 3-D
    (2, 16, 12, 12, 12),
    (1, 19, 4, 6, 6),
    # where an implementation once failed
    (2, 251, 28, 28),
    (2, 64, 56, 56),
    (8, 322, 16, 16),
    (12, 4, 8, 8),
    (1, 24, 14, 14),
]

LARGE_EDGES: list[Shape] = [
    (2, 64, 224, 224),
    (88, 600, 16, 16),
    (88, 800, 16, 16),
    (88, 900, 16, 16),
    (88, 980, 16, 16),
]
"""More of the last kind. Left out is (3072, 64, 112, 112): an array of it takes 10 GB."""


def networks(batch: int) -> list[Shape]:
    """Return every shape of the networks once, with a batch size."""
    distinct = dict.fromkeys(shape for shapes in NETWORKS.values() for shape in shapes)
    return [(batch, *shape) for shape in distinct]
