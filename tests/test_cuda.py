"""The CUDA kernels pass the suite: on a GPU where asked to, else in Numba's simulator.

The simulator runs the same kernels in Python, so it gets small arrays and small blocks.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from numba import config

from bnfast import registry
from bnfast.backends.cuda_kernels import driver, launch
from bnfast.backends.cuda_kernels.geometry import Launch, plan
from bnfast.spec import STORAGE_DTYPES
from bnfast.testing import KernelConformance, guard
from bnfast.testing.bounds import assert_same_outputs
from bnfast.testing.cases import OPERATIONS, draw

SIMULATED = bool(config.ENABLE_CUDASIM)
on_simulator = pytest.mark.skipif(not SIMULATED, reason="the kernels run on a GPU here")

if SIMULATED:
    from quick_simulator import quick
else:
    from contextlib import nullcontext as quick


@pytest.fixture(autouse=True)
def quick_simulator():
    with quick():
        yield


@pytest.fixture
def assume():
    """Return `launch.assume_launch`, which is undone."""
    yield launch.assume_launch
    launch.assume_launch(None)


class TestCuda(KernelConformance):
    backend = "cuda"
    most_elements = 1100 if SIMULATED else None
    dtypes = ("float32", "float64")


class TestCudaStorage(KernelConformance):
    """The same kernels but for the way to an element and back: in the simulator few arrays do."""

    backend = "cuda"
    most_elements = 200 if SIMULATED else None
    dtypes = STORAGE_DTYPES


class TestCudaManyParts(KernelConformance):
    """Runs cut into pieces, parts of one wide row, more blocks than there is work for."""

    backend = "cuda"
    most_elements = 120 if SIMULATED else None
    dtypes = ("float32", "float64") if SIMULATED else None

    @pytest.fixture(autouse=True)
    def many_parts(self, assume):
        assume(Launch(threads=12, blocks=7, part=16, rows=1))


@on_simulator
def test_every_kernel_really_runs_in_the_simulator(rng, monkeypatch) -> None:
    from numba.cuda.simulator.kernel import FakeCUDAKernel

    ran: Counter[str] = Counter()
    right = FakeCUDAKernel.__call__

    def counted(self, *arguments):
        ran[self.fn.__name__] += 1
        return right(self, *arguments)

    monkeypatch.setattr(FakeCUDAKernel, "__call__", counted)
    for shape in ((9, 2, 17), (153, 2)):
        inputs = draw(rng, shape, np.float32)
        for operation in OPERATIONS:
            guard.run(registry.load("cuda"), operation, inputs)
    # Of six operations three sum and four are elementwise; parts are merged after each sum.
    forms = {"moments": 2, "sums": 2, "normalize": 2, "gradient": 2}
    expected = {
        f"{form}_{name}": count for form in ("rows", "columns") for name, count in forms.items()
    }
    assert ran == expected | {"merge_moments": 4, "merge_sums": 4}


SHAPES = [(9, 2, 17), (2, 3, 61), (153, 2), (11, 37), (3, 5, 1)]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_same_bits_for_any_number_of_blocks(shape, operation, rng, assume) -> None:
    inputs = draw(rng, shape, np.float32)
    results = []
    for blocks in (1, 2, 7, 100):
        assume(Launch(threads=8, blocks=blocks, part=24, rows=2))
        results.append(guard.run(registry.load("cuda"), operation, inputs, relu=True))
    for other in results[1:]:
        assert_same_outputs("another number of blocks", results[0], other)


@on_simulator
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_same_bits_by_single_elements_as_by_vectors(shape, operation, rng, monkeypatch) -> None:
    inputs = draw(rng, shape, np.float32)
    vectors: Counter[bool] = Counter()
    right = launch.Call.aligned

    def seen(self, *arrays):
        vectors[right(self, *arrays)] += 1
        return right(self, *arrays)

    monkeypatch.setattr(launch.Call, "aligned", seen)
    one = guard.run(registry.load("cuda"), operation, inputs, relu=True)
    monkeypatch.setattr(driver, "address", lambda array: 4)
    other = guard.run(registry.load("cuda"), operation, inputs, relu=True)
    assert_same_outputs("single elements against vectors", one, other)
    assert vectors[True] == vectors[False] > 0 or shape == (11, 37)  # whose rows are not aligned


@pytest.mark.parametrize("multiprocessors", [1, 132])
@pytest.mark.parametrize("threads", [8, 256])
def test_plans_cover_every_shape(rng, threads, multiprocessors) -> None:
    limits = Launch(threads=threads, blocks=8 * multiprocessors, part=16 * threads, rows=8)
    for _ in range(300):
        samples, channels, size = (int(2 ** rng.uniform(0, 14)) for _ in range(3))
        rows = plan((samples, channels, size), limits)
        _, _, _, runs, length, pieces, parts, _ = rows.sum_geometry
        assert length * pieces >= size > length * (pieces - 1)
        assert runs * parts >= samples * pieces > runs * (parts - pieces)
        *_, chunk = rows.pass_geometry
        assert chunk % 4 == 0
        assert 4 <= chunk <= 510 * size
        columns = plan((samples, channels), limits)
        for blocks, (_, _, fold, width, tiles, span, count) in (
            (columns.sum_blocks, columns.sum_geometry),
            (columns.pass_blocks, columns.pass_geometry),
        ):
            assert width <= 4 * threads
            assert width * tiles >= fold * channels > width * (tiles - 1)
            assert fold * span * count >= samples > fold * span * (count - 1)
            assert blocks % tiles == 0
            assert tiles <= blocks <= max(tiles, limits.blocks)
