"""bnfast's own backends pass the suite that it ships, and the suite's definition stands."""

from __future__ import annotations

import decimal
import platform
from typing import ClassVar

import numpy as np
import pytest

from bnfast import registry
from bnfast.backends import caches
from bnfast.errors import BackendUnavailableError
from bnfast.testing import KernelConformance, reference
from bnfast.testing.cases import draw
from bnfast.testing.reference import rows


def has_fma(backend: str) -> bool:
    """Return whether a backend with a baseline build uses fused multiply-add here."""
    try:
        chosen = registry.load(backend).instruction_set()
    except BackendUnavailableError:
        return True
    return chosen != "baseline" or platform.machine().lower() not in ("x86_64", "amd64")


class TestNumpy(KernelConformance):
    backend = "numpy"


class TestCython(KernelConformance):
    backend = "cython"
    fma = has_fma("cython")


class SmallCaches(KernelConformance):
    """A backend as if the caches were tiny: every array is large."""

    @pytest.fixture(autouse=True)
    def small_caches(self, kernels):
        kernels.assume_caches(2048, 4096)
        yield
        kernels.assume_caches(*caches.sizes())


class LowerLevel(SmallCaches):
    """The same on a lower instruction set."""

    level: ClassVar[str]

    @pytest.fixture(autouse=True)
    def lower_level(self, kernels):
        highest = kernels.instruction_set()
        kernels.limit_instruction_set(self.level)
        if kernels.instruction_set() != self.level:
            kernels.limit_instruction_set(highest)
            pytest.skip(f"this CPU has {highest} at most")
        yield
        kernels.limit_instruction_set(highest)


class TestCythonSmallCaches(SmallCaches):
    backend = "cython"
    fma = has_fma("cython")


class TestCythonV3SmallCaches(LowerLevel):
    backend = "cython"
    level = "x86-64-v3"


class TestCythonBaselineSmallCaches(LowerLevel):
    backend = "cython"
    level = "baseline"
    fma = platform.machine().lower() not in ("x86_64", "amd64")


class TestNumba(KernelConformance):
    backend = "numba"


class TestNumbaSmallCaches(SmallCaches):
    backend = "numba"


@pytest.mark.skipif(
    np.finfo(np.longdouble).nmant <= 52, reason="long double is float64 here: Decimal is in use"
)
@pytest.mark.parametrize("shape", [(3, 4, 17), (51, 4)])
def test_definition_is_the_same_in_decimal_as_in_long_double(shape, rng, monkeypatch) -> None:
    inputs = draw(rng, shape, np.float64)
    assert inputs.residual is not None

    def everything(wide) -> list[np.ndarray]:
        monkeypatch.setattr(reference, "wide", wide)
        x, dy, residual = (wide(rows(a)) for a in (inputs.x, inputs.dy, inputs.residual))
        weight, bias, sum_dy = (wide(v) for v in (inputs.weight, inputs.bias, inputs.sum_dy))
        moments = reference.moments(x)
        xhat = reference.standardize(x, moments.mean, moments.m2 / inputs.count, inputs.eps)
        g = reference.mask(dy, rows(inputs.y))
        sums = reference.backward_sums(g, xhat)
        y = reference.affine(xhat, weight, bias, residual, relu=True)
        dx = reference.backward_input(g, xhat, bias, weight, sum_dy, sums.sum_dy_xhat, inputs.count)
        return [*moments, xhat, *sums, y, dx]

    with decimal.localcontext(reference.DECIMAL_CONTEXT):
        for one, other in zip(
            everything(reference.longdouble), everything(reference.decimal), strict=True
        ):
            difference = np.abs(one - reference.longdouble(other.astype(str)))
            # 2^-64 each rounding, up to 1e6 times as much where the mean is subtracted.
            assert (difference <= 1e-11 * np.maximum(np.abs(one).max(), 1)).all()


def test_definition_of_relu_at_infinity():
    one, infinity = np.ones(1), reference.wide(np.array([[-np.inf, np.inf, np.nan]]))
    y = reference.affine(infinity, one, 0 * one, None, relu=True).astype(np.float64)
    np.testing.assert_array_equal(y, [[0.0, np.inf, np.nan]])
