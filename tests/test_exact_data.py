"""oneDNN's benchdnn cases, with no tolerance on mean and variance: see `exact_data`.

Ordinarily each shape is run with a batch of one, in some of its cases, drawn afresh; with
``--slow`` in most of them, and in larger batches. The closing lines say how many cases there were.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pytest
from backends_here import over_backends
from exact_data import LAYOUTS, Checker, draw, sample
from numba import config
from published_shapes import BATCHES, EDGES, LARGE_EDGES, networks

import bnfast
import bnfast.functional as F
from bnfast import registry
from bnfast.testing.cases import ALL_DTYPES

if config.ENABLE_CUDASIM:
    from quick_simulator import quick
else:
    quick = nullcontext

SHAPES = networks(1) + EDGES
SMALL_SHAPES = [shape for shape in SHAPES if math.prod(shape) <= 1200]
"""What a simulator gets."""

MOST_ELEMENTS = 1 << 24
"""Of an array, since the exact result takes ten arrays of 16 bytes an element."""

LARGE_SHAPES = {
    f"batches of {batch}": [s for s in networks(batch) if math.prod(s) <= MOST_ELEMENTS]
    for batch in BATCHES[1:]
}
LARGE_SHAPES["edges"] = [s for s in LARGE_EDGES if math.prod(s) <= MOST_ELEMENTS]


@pytest.fixture
def amount(request):
    """Return how many cases of a shape to run."""
    return 64 if request.config.option.slow else 5


@pytest.fixture
def run(rng, record_property):
    """Return a function that runs cases of a shape, spread over dtypes and layouts."""

    def run_cases(shape, backend, count):
        kernels = registry.load(backend)
        taken = {"float32", "float64", *getattr(kernels, "STORAGE_DTYPES", ())}
        dtypes = [dtype for dtype in ALL_DTYPES if getattr(dtype, "__name__", "") in taken]
        grounds = [(dtype, layout) for dtype in dtypes for layout in LAYOUTS]
        rng.shuffle(grounds)
        for (dtype, layout), share in zip(grounds, _shares(count, len(grounds)), strict=True):
            if share:
                fma = kernels.instruction_set() != "baseline"
                checker = Checker(draw(rng, shape, dtype), shape, layout, backend, fma=fma)
                checker.check_moments()
                cases = list(sample(rng, shape, share))
                for case in cases:
                    checker.check(case)
                record_property(f"benchdnn-style cases on {backend}", len(cases))

    return run_cases


def _shares(count, parts):
    return [count // parts + (i < count % parts) for i in range(parts)]


@over_backends
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_published_shapes(run, amount, shape, backend):
    run(shape, backend, amount)


@over_backends
def test_means_of_few_rows(rng, backend):
    """Rows of few channels are laid side by side: of 224, 14 to a column, whose means differ."""
    for _ in range(300):
        data = draw(rng, (32, 27, 7), np.float16)
        x = np.ascontiguousarray(np.moveaxis(data.inputs.x, 1, -1))
        found = F.moments(np.moveaxis(x, -1, 1), backend=backend)
        np.testing.assert_array_equal(found.mean, data.inputs.mean)


@pytest.mark.slow
@over_backends
@pytest.mark.parametrize("shapes", LARGE_SHAPES)
def test_published_shapes_in_large_batches(run, shapes, backend):
    for shape in LARGE_SHAPES[shapes]:
        run(shape, backend, 2)


@pytest.mark.skipif(
    not bnfast.list_backends()["cuda"].available,
    reason=str(bnfast.list_backends()["cuda"].reason),
)
@pytest.mark.parametrize("shape", SMALL_SHAPES if config.ENABLE_CUDASIM else SHAPES, ids=str)
def test_published_shapes_on_cuda(run, amount, shape):
    with quick():
        run(shape, "cuda", amount)
