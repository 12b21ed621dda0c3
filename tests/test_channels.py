"""C-sized work: packing, merging moments, moving running statistics."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

import bnfast.functional as F
from bnfast import Moments, channels


def exact(rows):
    """Return the moments of rows of float64 by rational arithmetic."""
    mean = [sum(map(Fraction, row), Fraction()) / len(row) for row in rows]
    m2 = [
        sum(((Fraction(value) - centre) ** 2 for value in row), Fraction())
        for row, centre in zip(rows, mean, strict=True)
    ]
    return np.array([float(v) for v in mean]), np.array([float(v) for v in m2])


@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("cuts", [[1], [5], [20, 21], [7, 14, 30]])
def test_merged_parts_are_the_whole(rng, ratio, cuts):
    rows = rng.normal(ratio, 1.0, (3, 41))
    mean, m2 = exact(rows)
    parts = [F.moments(part.T) for part in np.split(rows, cuts, axis=1)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert merged.count == 41
    assert type(merged.count) is int
    # Each merge rounds the mean a few times, and m2 takes the difference of two rounded means.
    unit = 2.0**-53
    assert (np.abs(merged.mean - mean) <= 8 * unit * np.abs(mean)).all()
    assert (np.abs(merged.m2 - m2) <= 64 * unit * (m2 + np.sqrt(41 * m2) * np.abs(mean))).all()


def test_merging_is_symmetric_and_has_a_neutral_element(rng):
    a, b = F.moments(rng.normal(size=(5, 3))), F.moments(rng.normal(size=(9, 3)))
    nothing = F.moments(np.empty((0, 3)))
    assert nothing.count == 0
    assert a.merge(nothing) is a
    assert nothing.merge(a) is a
    one, other = a.merge(b), b.merge(a)
    # The mean of such numbers may be close to 0; they themselves are of the order of 1.
    np.testing.assert_allclose(one.mean, other.mean, rtol=0, atol=1e-15)
    np.testing.assert_allclose(one.m2, other.m2, rtol=1e-14)


def test_merging_leaves_both_parts_alone(rng):
    a, b = F.moments(rng.normal(size=(5, 3))), F.moments(rng.normal(size=(9, 3)))
    before = [vector.copy() for vector in (a.mean, a.m2, b.mean, b.m2)]
    a.merge(b)
    for vector, copy in zip((a.mean, a.m2, b.mean, b.m2), before, strict=True):
        np.testing.assert_array_equal(vector, copy)


def test_merging_other_channels():
    a, b = F.moments(np.ones((2, 3))), F.moments(np.ones((2, 4)))
    with pytest.raises(
        ValueError, match=r"^cannot merge moments of 3 channels with moments of 4 channels$"
    ):
        a.merge(b)


def test_counts_beyond_32_bits():
    """Two halves of 2^33 numbers each, at -1 and 1: mean 0, variance 1."""
    half = 2**33
    parts = [Moments(half, np.array([value]), np.zeros(1)) for value in (-1.0, 1.0)]
    merged = parts[0].merge(parts[1])
    assert (merged.count, merged.mean[0], merged.m2[0]) == (2**34, 0.0, 2.0**34)


def test_pack():
    for vector, expected in (
        (None, [3.0, 3.0]),
        (np.arange(6, dtype=np.float32)[::-3], [5.0, 2.0]),
        (np.arange(6.0)[::-3], [5.0, 2.0]),
        (np.arange(6, dtype=">f8")[::3], [0.0, 3.0]),
        ([7, 8], [7.0, 8.0]),
    ):
        packed = channels.pack(vector, 3.0, 2, "weight")
        assert packed.dtype == np.float64
        assert packed.dtype.isnative
        assert packed.flags.c_contiguous
        np.testing.assert_array_equal(packed, expected)


def test_a_vector_that_is_ready_is_not_copied(rng):
    ready = rng.normal(size=5)
    assert channels.as_channels(ready, 5, "mean") is ready
    read_only = ready.copy()
    read_only.flags.writeable = False
    for other in (
        ready[::-1],
        ready.astype(">f8"),
        ready.astype(np.float32),
        list(ready),
        read_only,
    ):
        packed = channels.as_channels(other, 5, "mean")
        assert packed.dtype == np.float64
        assert packed.flags.carray
        np.testing.assert_array_equal(packed, np.asarray(other, np.float64))
    with pytest.raises(ValueError, match="mean should contain 4 elements not 5"):
        channels.as_channels(ready, 4, "mean")


def test_real_dtypes():
    for name in "e f d g b B i I q Q".split():
        channels.check_vector(np.empty(3, name), 3, "weight")
    for name in "? F D O S1 U1 V2 M8[s] m8[s]".split():
        with pytest.raises(TypeError, match=r"^weight should hold real numbers, got dtype"):
            channels.check_vector(np.empty(3, name), 3, "weight")
    bfloat16 = SimpleNamespace(kind="V", name="bfloat16")
    channels.check_vector(SimpleNamespace(dtype=bfloat16, shape=(3,)), 3, "weight")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("factor", [0.0, 0.1, 0.5, 1.0, -1.0, 2.5])
def test_update_running(rng, dtype, factor):
    mean, var = rng.uniform(0.5, 2, (2, 4)).astype(dtype)
    statistics = np.array([mean, var, rng.normal(size=4), rng.uniform(1, 9, 4)])
    old_mean, old_var, batch_mean, batch_m2 = statistics.astype(np.longdouble)
    channels.update_running(statistics, 11, factor, mean, var)
    long = np.longdouble(factor)
    for new, old, fresh in ((mean, old_mean, batch_mean), (var, old_var, batch_m2 / 10)):
        expected = (1 - long) * old + long * fresh
        size = np.abs((1 - long) * old) + np.abs(long * fresh)
        assert new.dtype == dtype
        assert (np.abs(new - expected) <= (np.finfo(dtype).eps / 2 + 2.0**-50) * size).all()


def test_update_running_skips_what_is_not_there():
    statistics = np.array([[0.0], [0.0], [1.0], [1.0]])
    mean, var = np.zeros(1), np.zeros(1)
    channels.update_running(statistics, 2, 1.0, mean, None)
    channels.update_running(statistics, 2, 1.0, None, var)
    assert (mean[0], var[0]) == (1.0, 1.0)


def test_update_running_is_silent_and_leaves_the_warnings_of_numpy_alone():
    """What does not fit becomes an infinity; inf - inf is NaN; neither is worth a warning."""
    statistics = np.array([[0.0, -np.inf], [1.0, 1.0], [1e300, np.inf], [1.0, 1.0]])
    mean, var = np.zeros(2, np.float32), np.zeros(2, np.float32)
    with np.errstate(all="raise"):
        channels.update_running(statistics, 2, 0.5, mean, var)
        with pytest.raises(FloatingPointError):
            np.ones(1) / np.zeros(1)
    np.testing.assert_array_equal(mean, [np.inf, np.nan])


def test_invstd_is_silent_where_there_is_no_variance():
    with np.errstate(all="raise"):
        result = channels.invstd(np.array([0.0, -2.0, 8.0]), 2, 0.0)
    np.testing.assert_array_equal(result, [np.inf, np.nan, 0.5])


@pytest.mark.parametrize("count", [0, 1, 2, 1000, 2**40])
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1.0, np.float32(1e-5), np.float16(1e-5)])
def test_invstd(rng, count, eps):
    m2 = rng.uniform(0, 4, 5) * count
    exact = 1 / np.sqrt(m2.astype(np.longdouble) / max(count, 1) + np.longdouble(eps))
    # Four roundings, of which the root halves three.
    assert (np.abs(channels.invstd(m2, count, eps) / exact - 1) <= 2.5 * 2.0**-53).all()
