"""Outputs that exceed the caches are written past them, in whole lines, with the same bits.

Caches are assumed to be tiny, so that small arrays go that way. In place nothing is streamed: the
in-place call on a copy is what the streamed one must equal. Outputs begin anywhere in a cache line,
and nothing around them may change.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from bnfast.backends import caches

cython_openmp = pytest.importorskip(
    "bnfast.backends.cython_openmp", reason="the extension was not built"
)

LEVELS = ("baseline", "x86-64-v3", "x86-64-v4")
AROUND = 0xA5  # a byte that no result is likely to repeat over 64 bytes

# Channels-first: runs of less than a line, of a line, a little more, of lines and a rest, and so
# long that they are cut. Channels-last: rows of a few channels, which are folded, with and without
# rows left over, and into wider rows in 16 bits; whole lines; lines and a rest; more columns than a
# sum takes at once.
FORMS = [
    (9, 5, 15),
    (7, 6, 16),
    (9, 70, 17),
    (8, 67, 49),
    (3, 9, 196),
    (2, 3, 4999),
    (1025, 1),
    (4099, 3),
    (515, 64),
    (401, 67),
    (67, 1030),
    (5243, 100),
]

# A single channel, runs of a line or a little more; a last part of a few elements.
SHORT_FORMS = [(5, 1, 33), (7, 6, 16), (4, 3, 49), (3, 2, 64), (133, 67), (40, 1), (1409, 3)]

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]

# Of a core and of all: so small that slabs are single channels, and for slabs of several.
CACHES = [(2048, 4096), (65536, 65536)]


@pytest.fixture(params=CACHES, ids=["single-channels", "several"], autouse=True)
def cache_sizes(request):
    cython_openmp.assume_caches(*request.param)
    yield request.param
    cython_openmp.assume_caches(*caches.sizes())


@pytest.fixture(params=LEVELS, autouse=True)
def level(request):
    best = cython_openmp.instruction_set()
    cython_openmp.limit_instruction_set(request.param)
    if cython_openmp.instruction_set() != request.param:
        cython_openmp.limit_instruction_set(best)
        pytest.skip(f"this CPU does not run {request.param}")
    yield request.param
    cython_openmp.limit_instruction_set(best)


class Output:
    """An array that begins ``offset`` elements into a cache line, and what is around it."""

    def __init__(self, like, offset):
        self.room = np.full(like.nbytes + 256, AROUND, np.uint8)
        self.start = -self.room.ctypes.data % 64 + 64 + offset * like.itemsize
        self.end = self.start + like.nbytes
        self.array = self.room[self.start : self.end].view(like.dtype).reshape(like.shape)
        self.array[...] = np.nan

    def assert_equal(self, expected):
        """The array has these bits, and nothing around it was written to."""
        bits = f"u{expected.itemsize}"
        np.testing.assert_array_equal(self.array.view(bits), expected.view(bits))
        assert (self.room[: self.start] == AROUND).all()
        assert (self.room[self.end :] == AROUND).all()


@pytest.fixture(params=FORMS, ids=str)
def form(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def dtype(request):
    return request.param


def inputs(rng, form, dtype):
    """Random inputs of a form."""
    channels = form[1]
    return {
        "x": rng.normal(3, 2, form).astype(dtype),
        "other": rng.normal(size=form).astype(dtype),
        "mean": rng.normal(3, 1, channels),
        "var": rng.uniform(0.5, 2, channels),
        "weight": rng.uniform(0.5, 2, channels),
        "bias": rng.normal(size=channels),
    }


@pytest.fixture(params=["fits", "does-not-fit"])
def case(request, rng, form, dtype):
    """Random inputs of a form; or with channels that are too large or too small for float32."""
    given = inputs(rng, form, dtype)
    if request.param == "does-not-fit":
        given["weight"][rng.permutation(form[1])[:2]] = [2.0**101, 2.0**-120][: form[1]]
    return given


def outputs(rng, like):
    """Yield an output at each of a few offsets, and whether to add a residual and apply ReLU."""
    for add, relu in ((False, False), (False, True), (True, False), (True, True)):
        yield Output(like, int(rng.integers(64 // like.itemsize))), add, relu


def test_normalize(rng, case):
    given = case["mean"], case["var"], case["weight"], case["bias"], 1e-5
    for y, add, relu in outputs(rng, case["x"]):
        other = case["other"] if add else None
        cython_openmp.normalize(case["x"], *given, other, y=y.array, relu=relu, num_threads=2)
        ordinary = case["x"].copy()
        cython_openmp.normalize(ordinary, *given, other, y=ordinary, relu=relu, num_threads=1)
        y.assert_equal(ordinary)
        if add:
            summand = case["other"].copy()
            cython_openmp.normalize(case["x"], *given, summand, y=summand, relu=relu, num_threads=1)
            y.assert_equal(summand)


def test_train(rng, case):
    for y, add, relu in outputs(rng, case["x"]):
        given = case["weight"], case["bias"], 1e-5, case["other"] if add else None
        statistics = [np.full((2, case["mean"].size), np.nan) for _ in range(2)]
        ordinary = case["x"].copy()
        for x, out, (mean, m2), threads in (
            (case["x"], y.array, statistics[0], 2),
            (ordinary, ordinary, statistics[1], 1),
        ):
            cython_openmp.train(x, *given, y=out, mean=mean, m2=m2, relu=relu, num_threads=threads)
        y.assert_equal(ordinary)
        np.testing.assert_array_equal(*statistics)


@pytest.mark.parametrize("fused", [True, False])
def test_backward(rng, case, fused):
    for dx, add, relu in outputs(rng, case["x"]):
        mask = np.maximum(rng.normal(size=case["x"].shape), 0).astype(case["x"].dtype)
        given = case["x"], mask if relu else None, case["mean"], 1 / np.sqrt(case["var"])
        sums = rng.normal(size=(2, case["mean"].size))
        found = [sums.copy() for _ in range(2)]
        in_place = case["other"].copy()
        dresidual = Output(case["x"], int(rng.integers(64 // case["x"].itemsize)))
        passed_on = np.where(mask > 0, case["other"], 0) if relu else case["other"]
        for dy, out, further, (sum_dy, sum_dy_xhat), threads in (
            (case["other"], dx.array, dresidual.array if add else None, found[0], 2),
            (in_place, in_place, None, found[1], 1),
        ):
            wanted = {"dx": out, "dresidual": further, "relu": relu, "num_threads": threads}
            if fused:
                cython_openmp.backward(
                    dy, *given, case["weight"], sum_dy=sum_dy, sum_dy_xhat=sum_dy_xhat, **wanted
                )
            else:
                cython_openmp.backward_input(
                    dy, *given, case["weight"], sum_dy, sum_dy_xhat, dx.array.size, **wanted
                )
        dx.assert_equal(in_place)
        np.testing.assert_array_equal(*found)
        if add:
            dresidual.assert_equal(passed_on)


@pytest.mark.parametrize("form", SHORT_FORMS, ids=str, indirect=True)
def test_outputs_that_begin_anywhere_in_a_line(rng, form, dtype):
    given = inputs(rng, form, dtype)
    x, dy, mean, weight = given["x"], given["other"], given["mean"], given["weight"]
    affine = mean, given["var"], weight, given["bias"], 1e-5
    line = 1 / np.sqrt(given["var"]), weight, *rng.normal(size=(2, form[1])), x.size
    y, dx = x.copy(), dy.copy()
    cython_openmp.normalize(y, *affine, None, y=y, relu=False, num_threads=1)
    wanted = {"dresidual": None, "relu": False, "num_threads": 1}
    cython_openmp.backward_input(dx, x, None, mean, *line, dx=dx, **wanted)
    places = 64 // x.itemsize
    for offset in range(places):
        found = Output(x, offset)
        cython_openmp.normalize(x, *affine, None, y=found.array, relu=False, num_threads=2)
        found.assert_equal(y)
        found, dresidual = Output(x, offset), Output(x, int(rng.integers(places)))
        wanted = {"dresidual": dresidual.array, "relu": False, "num_threads": 2}
        cython_openmp.backward_input(dy, x, None, mean, *line, dx=found.array, **wanted)
        found.assert_equal(dx)
        dresidual.assert_equal(dy)


@pytest.mark.parametrize("which", ["all", "every-other"])
def test_x_does_not_matter_where_the_sum_of_its_products_is_zero(rng, form, dtype, which):
    given = inputs(rng, form, dtype)
    x, dy, mean = given["x"], given["other"], given["mean"]
    sum_dy, sum_dy_xhat = rng.normal(size=(2, form[1]))
    step = 1 if which == "all" else 2
    sum_dy_xhat[::step] = 0
    found = []
    for value in 1, np.nan, np.inf:
        x[:, ::step] = value
        dx = Output(dy, int(rng.integers(64 // dy.itemsize)))
        cython_openmp.backward_input(
            *(dy, x, None, mean, 1 / np.sqrt(given["var"]), given["weight"], sum_dy, sum_dy_xhat),
            dy.size,
            dx=dx.array,
            dresidual=None,
            relu=False,
            num_threads=2,
        )
        assert np.isfinite(dx.array.astype(np.float64)).all()
        found.append(dx)
    for dx in found:
        dx.assert_equal(found[0].array)
