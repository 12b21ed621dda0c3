"""C-sized work: packing, moving running statistics."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from bnfast import channels


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
