"""Moments: merging is exact, whatever the order and the grouping."""

from __future__ import annotations

import copy
import pickle
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from exact_forward import exact_moments

import bnfast.functional as F
from bnfast import Moments
from bnfast.moments import refined
from bnfast.recalibration import accurate_moments


@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("cuts", [[1], [5], [20, 21], [7, 14, 30]])
def test_merged_parts_are_the_whole(rng, ratio, cuts):
    rows = rng.normal(ratio, 1.0, (3, 41))
    mean, m2 = exact_moments(rows.T)
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
    for vector, old in zip((a.mean, a.m2, b.mean, b.m2), before, strict=True):
        np.testing.assert_array_equal(vector, old)


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


def assert_same(one, other):
    """Compare all bits; NaN equals NaN."""
    assert one.count == other.count
    np.testing.assert_array_equal(one.mean, other.mean)
    np.testing.assert_array_equal(one.m2, other.m2)


def in_some_grouping(rng, parts):
    """Merge parts in a random order, along a random tree."""
    parts = list(parts)
    while len(parts) > 1:
        taken = [
            parts.pop(rng.integers(len(parts))) for _ in range(rng.integers(2, len(parts) + 1))
        ]
        parts.append(taken[0].merge(*taken[1:]))
    return parts[0]


def random_part(rng, ratio, channels=5):
    """Return moments whose means are of the order of ``ratio`` deviations."""
    size = 10.0 ** rng.uniform(-3, 3)
    mean = size * (ratio + rng.normal(size=channels))
    return Moments(int(rng.integers(1, 2**40)), mean, size**2 * rng.uniform(0, 9, channels))


def nearest(fraction):
    try:
        return float(fraction)
    except OverflowError:
        return np.inf


def exactly_merged(parts):
    """Return count, mean and m2 of all the elements in rational arithmetic, rounded at the end."""
    count = sum(part.count for part in parts)
    means, m2s = [], []
    for channel in range(parts[0].mean.size):
        rows = [
            (part.count, Fraction(part.mean[channel]), Fraction(part.m2[channel])) for part in parts
        ]
        mean = sum(n * centre for n, centre, _ in rows) / count
        means.append(nearest(mean))
        m2s.append(nearest(sum(m2 + n * (centre - mean) ** 2 for n, centre, m2 in rows)))
    return count, means, m2s


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e6, 1e12])
def test_merging_in_any_grouping_gives_the_exact_result(rng, ratio):
    parts = [random_part(rng, ratio) for _ in range(rng.integers(2, 12))]
    count, mean, m2 = exactly_merged(parts)
    for _ in range(8):
        merged = in_some_grouping(rng, parts)
        assert merged.count == count
        np.testing.assert_array_equal(merged.mean, mean)
        np.testing.assert_array_equal(merged.m2, m2)


def test_sizes_far_apart_and_subnormal_numbers(rng):
    parts = [
        Moments(3, [1e300, 5e-324, -0.0, 1e200], [0.0, 5e-324, 2.0, 1e300]),
        Moments(7, [-1e-300, 1e-310, 0.0, 1e-200], [1e-300, 0.0, 3.0, 1.0]),
        Moments(1, [1.0, 1.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0]),
    ]
    count, mean, m2 = exactly_merged(parts)
    assert m2[0] == m2[3] == np.inf  # the squares of such means do not fit into float64
    for _ in range(8):
        merged = in_some_grouping(rng, parts)
        assert merged.count == count
        np.testing.assert_array_equal(merged.mean, mean)
        np.testing.assert_array_equal(merged.m2, m2)


def test_a_constant_channel_has_no_deviation(rng):
    value = rng.normal(scale=1e6, size=4)
    parts = [Moments(int(n), value, np.zeros(4)) for n in rng.integers(1, 10**9, 9)]
    merged = in_some_grouping(rng, parts)
    np.testing.assert_array_equal(merged.mean, value)
    np.testing.assert_array_equal(merged.m2, np.zeros(4))


def test_what_is_not_finite_poisons_its_channel_alone(rng):
    inf, nan = np.inf, np.nan
    parts = [
        Moments(2, [inf, nan, 1.0, inf, 2.0], [nan, 1.0, inf, nan, 3.0]),
        Moments(5, [-inf, 1.0, 1.0, 1.0, 4.0], [nan, 1.0, 2.0, 3.0, 4.0]),
        Moments(1, [1.0, 1.0, 3.0, 1.0, 6.0], [0.0, 0.0, 0.0, 0.0, 0.0]),
    ]
    with np.errstate(all="raise"):
        for _ in range(5):
            merged = in_some_grouping(rng, parts)
            np.testing.assert_array_equal(merged.mean, [nan, nan, 1.25, inf, 3.75])
            np.testing.assert_array_equal(merged.m2[:4], [nan, nan, inf, nan])
            assert merged.m2[4] == exactly_merged([_last(part) for part in parts])[2][0]


def _last(part):
    return Moments(part.count, part.mean[4:], part.m2[4:])


@pytest.mark.parametrize("channels", [0, 1])
def test_few_channels(channels):
    part = Moments(3, np.ones(channels), np.ones(channels))
    assert part.merge(part) == Moments(6, np.ones(channels), np.full(channels, 2.0))


@pytest.mark.skipif(
    np.finfo(np.longdouble).nmant < 63, reason="long double has no more digits than float64 here"
)
@pytest.mark.parametrize("ratio", [0, 1, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_moments_of_few_elements_are_the_exact_ones(rng, dtype, ratio):
    x = rng.normal(ratio % 60000, 1, (7, 4, 30)).astype(dtype)
    found = accurate_moments(x)
    exact = exact_moments(x.astype(float))
    assert (abs([found.mean, found.m2] - exact) <= np.spacing(abs(exact))).all()


@pytest.mark.parametrize(
    ("shape", "value"),
    [
        ((5, 3), np.nan),
        ((5, 3), np.inf),
        ((5, 3, 2), 1e300),
        ((5, 3, 2), 1e-200),
        ((4, 0, 5), 0.0),
        ((4, 0), 0.0),
        ((0, 3), 0.0),
    ],
)
def test_moments_of_few_elements_at_the_edges(rng, shape, value):
    x = rng.uniform(1, 2, shape)
    x[:1] *= value
    with np.errstate(all="raise"):
        found, kernels = accurate_moments(x), F.moments(x)
    assert found.count == kernels.count
    np.testing.assert_allclose(found.mean, kernels.mean, rtol=1e-15)
    np.testing.assert_allclose(found.m2, kernels.m2, rtol=1e-15)


def test_a_refined_mean(rng):
    """A mean of more digits than float64 has takes part in a merge with all of them."""
    n, head, tail = 12, np.array([1e15]), np.array([0.03])
    part = refined(Moments(n, head, np.array([2.0])), tail)
    other = Moments(3, np.array([1e15 - 7]), np.array([1.0]))
    merged = part.merge(other)
    centre = Fraction(head[0]) + Fraction(tail[0])
    mean = (n * centre + 3 * Fraction(1e15 - 7)) / 15
    m2 = 3 + n * (centre - mean) ** 2 + 3 * (Fraction(1e15 - 7) - mean) ** 2
    assert part.mean == head
    assert (merged.mean[0], merged.m2[0]) == (float(mean), float(m2))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_merge_as_the_originals_do(rng, protocol):
    parts = [random_part(rng, 1e6) for _ in range(4)]
    merged = parts[0].merge(parts[1])
    twin = pickle.loads(pickle.dumps(merged, protocol))
    assert twin == merged
    assert_same(twin.merge(parts[2], parts[3]), merged.merge(parts[2]).merge(parts[3]))
    assert_same(copy.deepcopy(merged).merge(parts[2]), merged.merge(parts[2]))


def test_equality(rng):
    part = Moments(4, [1.0, 2.0], [3.0, 4.0])
    assert part == Moments(4, np.array([1, 2], np.float32), [3, 4])
    for other in (
        Moments(5, [1.0, 2.0], [3.0, 4.0]),
        Moments(4, [1.0, 2.5], [3.0, 4.0]),
        Moments(4, [1.0, 2.0], [3.0, 4.5]),
        Moments(4, [1.0], [3.0]),
        (4, [1.0, 2.0], [3.0, 4.0]),
    ):
        assert part != other
    assert Moments(4, [np.nan], [1.0]) != Moments(4, [np.nan], [1.0])
    with pytest.raises(TypeError, match="unhashable"):
        hash(part)


def test_the_vectors_are_copies_that_cannot_be_written(rng):
    mean, m2 = rng.normal(size=3), rng.uniform(1, 2, 3)
    part = Moments(4, mean, m2)
    kept = mean.copy()
    mean[:] = 0
    np.testing.assert_array_equal(part.mean, kept)
    for vector in (part.mean, part.m2, part.merge(part).mean, F.moments(np.ones((2, 3))).m2):
        assert vector.dtype == np.float64
        with pytest.raises(ValueError, match="read-only"):
            vector[0] = 1
    with pytest.raises(AttributeError):
        part.count = 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, [1.0], [1.0]), ValueError, "count should not be negative, got -1"),
        ((2.0, [1.0], [1.0]), TypeError, "'float' object cannot be interpreted as an integer"),
        ((2, 1.0, [1.0]), ValueError, "mean should have shape (C,), got ()"),
        (
            (2, [1.0, 2.0], [1.0]),
            ValueError,
            "m2 should contain 2 elements not 1: expected shape (2,), got (1,)",
        ),
        ((2, ["a"], [1.0]), TypeError, "mean should hold real numbers, got dtype <U1"),
        ((2, [1.0], [-2.0]), ValueError, "m2 should not be negative, got -2.0"),
    ],
)
def test_what_cannot_be_moments(arguments, error, message):
    with pytest.raises(error) as caught:
        Moments(*arguments)
    assert str(caught.value) == message


def test_merging_with_something_else():
    part = Moments(4, [1.0], [3.0])
    with pytest.raises(TypeError, match=r"^expected Moments to merge with, got tuple$"):
        part.merge(part, (4, [1.0], [3.0]))
