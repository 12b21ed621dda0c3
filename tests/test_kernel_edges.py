"""Where the kernels' work is cut does not show: not by caches, threads, lengths or neighbours."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from bnfast.backends import caches
from bnfast.spec import M2_RELATIVE_FLOAT32

cython_openmp = pytest.importorskip(
    "bnfast.backends.cython_openmp", reason="the extension was not built"
)

# Cut into slabs, tiles, pieces, panels and spans in every way, and into nothing at all.
FORMS = [
    (6, 70, 49),
    (40, 130, 7),
    (3, 5, 2049),
    (1, 2, 40001),
    (300, 65, 1),
    (6001, 3),
    (1290, 67),
    (70, 1100),
    (5, 0, 3),
    (0, 4),
]


@pytest.fixture
def assumed():
    """Yield the function that sets the sizes of the caches; set them back afterwards."""
    yield cython_openmp.assume_caches
    cython_openmp.assume_caches(*caches.sizes())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_same_bits_for_any_caches_and_threads(rng, assumed, form, dtype):
    x, dy, residual = rng.normal(30, 2, (3, *form)).astype(dtype)
    mean, bias = rng.normal(30, 1, (2, form[1]))
    var, weight = rng.uniform(0.5, 2, (2, form[1]))
    invstd = 1 / np.sqrt(var)

    def everything(core, last, num_threads):
        assumed(core, last)
        given = {"relu": True, "num_threads": num_threads}
        normalized, trained, dx, dresidual = np.full((4, *form), np.nan, dtype)
        statistics = np.full((6, form[1]), np.nan)
        cython_openmp.normalize(x, mean, var, weight, bias, 1e-5, residual, y=normalized, **given)
        cython_openmp.train(
            x,
            weight,
            bias,
            1e-5,
            residual,
            y=trained,
            mean=statistics[0],
            m2=statistics[1],
            **given,
        )
        cython_openmp.moments(x, mean=statistics[2], m2=statistics[3], num_threads=num_threads)
        cython_openmp.backward(
            dy, x, normalized, mean, invstd, weight,
            dx=dx, dresidual=dresidual, sum_dy=statistics[4], sum_dy_xhat=statistics[5], **given,
        )  # fmt: skip
        return normalized, trained, dx, dresidual, statistics

    expected = everything(1 << 30, 1 << 40, 1)
    for num_threads in (1, 2, 3, 8):
        # The last one just holds the arrays of a forward call.
        for core, last in ((1, 1), (4096, 1 << 40), (1 << 16, 1 << 17), (4096, 3 * x.nbytes)):
            for found, wanted in zip(everything(core, last, num_threads), expected, strict=True):
                np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_blocks_of_rows_are_merged(rng, name):
    """Parts of so many rows are several blocks, whose means differ; those of float64 are others."""
    dtype = ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)
    x = (rng.normal(5, 1, (33000, 256)) + np.linspace(0, 4, 33000)[:, None]).astype(dtype)
    (mean, m2), (expected, expected_m2) = np.empty((2, 2, 256))
    cython_openmp.moments(x, mean=mean, m2=m2, num_threads=2)
    cython_openmp.moments(x.astype(float), mean=expected, m2=expected_m2, num_threads=2)
    spread = np.sqrt(expected_m2 / 33000)
    assert (abs(mean - expected) <= M2_RELATIVE_FLOAT32 * spread).all()
    assert (abs(m2 - expected_m2) <= 2 * M2_RELATIVE_FLOAT32 * expected_m2).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_of_a_run_whose_last_part_is_one_element(rng, dtype):
    # 1039 parts of whole steps, since they are cut evenly: the last one is left with one element.
    n = 16384 * 1038 + 1
    x = rng.integers(0, 8, n, np.uint8).astype(dtype).reshape(1, 1, n)
    dy = x[:, :, ::-1].copy()
    x[..., -1], dy[..., -1] = 64, 32
    sums = np.empty((2, 1))
    mean, m2 = np.empty((2, 1))
    given = np.zeros(1), np.ones(1)
    cython_openmp.backward_sums(
        dy, x, None, *given, sum_dy=sums[0], sum_dy_xhat=sums[1], relu=False, num_threads=2
    )
    cython_openmp.moments(x, mean=mean, m2=m2, num_threads=2)
    # Whole numbers below 2^53, which no order of additions rounds.
    total, square = (int(np.sum(a, dtype=np.float64)) for a in (x, x * x))
    assert sums.tolist() == [[np.sum(dy, dtype=np.float64)], [np.sum(dy * x, dtype=np.float64)]]
    exact = square - total * total / n
    assert abs(mean[0] - total / n) <= M2_RELATIVE_FLOAT32 * (exact / n) ** 0.5
    assert abs(m2[0] - exact) <= M2_RELATIVE_FLOAT32 * exact


@pytest.mark.parametrize("cache", [4096, 1 << 40])
@pytest.mark.parametrize("form", [(5, 20, 49), (5, 20, 3), (7, 100, 17), (43, 20), (43, 100)])
def test_channels_that_float32_cannot_hold_change_no_others(rng, assumed, form, cache):
    assumed(2048, cache)
    x, dy, residual = rng.normal(3, 2, (3, *form)).astype(np.float32)
    mean, bias = rng.normal(3, 1, (2, form[1]))
    var, weight = rng.uniform(0.5, 2, (2, form[1]))
    invstd = 1 / np.sqrt(var)
    far = np.zeros(form[1], bool)
    far[rng.permutation(form[1])[:3]] = True
    large, near = np.where(far, 2.0**110, weight), [slice(None)] * len(form)
    near[1] = ~far

    def results(weight):
        y, dx = np.full((2, *form), np.nan, np.float32)
        sums = np.empty((2, form[1]))
        given = {"relu": True, "num_threads": 2}
        cython_openmp.normalize(x, mean, var, weight, bias, 1e-5, residual, y=y, **given)
        cython_openmp.backward(
            dy, x, residual, mean, invstd, weight,
            dx=dx, dresidual=None, sum_dy=sums[0], sum_dy_xhat=sums[1], **given,
        )  # fmt: skip
        return y, dx

    for found, wanted in zip(results(large), results(weight), strict=True):
        np.testing.assert_array_equal(found[tuple(near)], wanted[tuple(near)])
    y = results(large)[0]
    far_x, shape = x[:, far].astype(np.float64), [1, -1, 1][: len(form)]
    scale = (large / np.sqrt(var + 1e-5))[far].reshape(shape)
    affine = (far_x - mean[far].reshape(shape)) * scale + bias[far].reshape(shape)
    expected = np.maximum(affine.astype(np.float32) + residual[:, far], np.float32(0))
    np.testing.assert_array_equal(y[:, far], expected)
