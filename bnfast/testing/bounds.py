"""The error bounds of `bnfast.spec` as assertions that say where a result is off and by how much.

Exact values and bounds are laid out in rows, as in `bnfast.testing.reference`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfast import spec
from bnfast.testing.cases import Inputs
from bnfast.testing.guard import Outputs
from bnfast.testing.reference import FORMATS, Moments, Sums, Wide, rows, wide

UNIT = 2.0**-53


def assert_within(what: str, actual: NDArray[Any], exact: Wide, bound: NDArray[Any]) -> None:
    """Raise unless ``|actual - exact| <= bound`` everywhere; NaN is never within."""
    error = np.abs(wide(actual) - exact).astype(np.float64)
    outside = ~(error <= bound)
    if not outside.any():
        return
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        times = np.where(outside, np.nan_to_num(error / bound, nan=np.inf), 0.0)
    worst = np.unravel_index(np.argmax(times), times.shape)
    raise AssertionError(
        f"{what}: {outside.sum()} of {outside.size} values are outside the bound; the worst, at "
        f"(channel, element) {tuple(map(int, worst))}, is {actual[worst]!r} instead of "
        f"{float(exact[worst])!r}, an error of {times[worst]:.4g} times the bound"
    )


def assert_same_bits(what: str, one: NDArray[Any], other: NDArray[Any]) -> None:
    """Raise unless two arrays hold the same bits. Any NaN is as good as any other."""
    assert one.shape == other.shape, what
    assert one.dtype == other.dtype, what
    bits = f"u{one.dtype.itemsize}"
    equal = np.ascontiguousarray(one).view(bits) == np.ascontiguousarray(other).view(bits)
    differ = ~(equal | (np.isnan(one) & np.isnan(other)))
    if differ.any():
        first = tuple(map(int, np.argwhere(differ)[0]))
        raise AssertionError(
            f"{what}: {differ.sum()} of {differ.size} values differ in their bits; the first, at "
            f"{first}, is {one[first]!r} against {other[first]!r}"
        )


def assert_same_outputs(what: str, one: Outputs, other: Outputs) -> None:
    """Raise unless two calls gave the same bits in every output."""
    assert one.keys() == other.keys(), what
    for name in one:
        assert_same_bits(f"{what}: {name}", one[name], other[name])


def assert_moments(outputs: Outputs, exact: Moments, x: Wide, dtype: np.dtype[np.generic]) -> None:
    """Check ``mean`` and ``m2``, of an array of ``dtype``, against the bounds of `spec`."""
    count = max(x.shape[1], 1)
    magnitude = np.abs(x).sum(axis=1).astype(np.float64)
    bound = spec.SUM_UNITS * UNIT * magnitude / count
    units = spec.SUM_UNITS * UNIT
    narrow = dtype != np.float64
    relative = spec.M2_RELATIVE_FLOAT32 if narrow else units
    mean, m2 = (vector.astype(np.float64) for vector in exact)
    if narrow:
        bound += relative * np.sqrt(m2 / count)
    assert_within("mean", outputs["mean"], exact.mean, bound)
    assert_within("m2", outputs["m2"], exact.m2, relative * m2 + count * (units * mean) ** 2)


def assert_output(
    y: NDArray[Any], exact: Wide, xhat: Wide, inputs: Inputs, deviations: Wide, *, fma: bool
) -> None:
    """Check ``y`` against the bound of its dtype.

    ``deviations`` is ``mean / sqrt(var + eps)`` of each channel.
    """
    residual = 0.0 if inputs.residual is None else rows(inputs.residual).astype(np.float64)
    scale = spec.output_scale(
        xhat.astype(np.float64),
        inputs.weight[:, None],
        inputs.bias[:, None],
        residual,
        exact.astype(np.float64),
    )
    if y.dtype.name in FORMATS:
        assert_stored("y", rows(y), exact, scale)
        return
    if y.dtype == np.float32:
        ulps = spec.Y_ULPS_FLOAT32 if fma else spec.Y_ULPS_FLOAT32_WITHOUT_FMA
        ulps += spec.Y_ULPS_RESIDUAL if inputs.residual is not None else 0.0
        bound = ulps * _float32_ulp(scale)
    else:
        growth = 1.0 + np.abs(deviations.astype(np.float64))[:, None]
        bound = spec.Y_UNITS_FLOAT64 * UNIT * growth * scale
    assert_within("y", rows(y), exact, bound)


def assert_sums(outputs: Outputs, exact: Sums) -> None:
    """Check ``sum_dy`` and ``sum_dy_xhat`` against `spec.SUM_UNITS`."""
    for name, value, magnitude in (
        ("sum_dy", exact.sum_dy, exact.magnitude_dy),
        ("sum_dy_xhat", exact.sum_dy_xhat, exact.magnitude_dy_xhat),
    ):
        bound = spec.SUM_UNITS * UNIT * magnitude.astype(np.float64)
        assert_within(name, outputs[name], value, bound)


def assert_gradient(dx: NDArray[Any], exact: Wide, g: Wide, xhat: Wide, inputs: Inputs) -> None:
    """Check ``dx`` against the bound of its dtype, for the sums and the count of ``inputs``."""
    scale = spec.gradient_scale(
        g.astype(np.float64),
        xhat.astype(np.float64),
        inputs.invstd[:, None],
        inputs.weight[:, None],
        inputs.sum_dy[:, None] / inputs.count,
        inputs.sum_dy_xhat[:, None] / inputs.count,
    )
    if dx.dtype.name in FORMATS:
        assert_stored("dx", rows(dx), exact, scale)
        return
    if dx.dtype == np.float32:
        bound = spec.DX_ULPS_FLOAT32 * _float32_ulp(scale)
    else:
        growth = 1.0 + np.abs(inputs.mean * inputs.invstd)[:, None]
        bound = spec.DX_UNITS_FLOAT64 * UNIT * growth * scale
    assert_within("dx", rows(dx), exact, bound)


def assert_stored(what: str, actual: NDArray[Any], exact: Wide, scale: NDArray[Any]) -> None:
    """Check an array of a 16-bit dtype against the bound of `spec`."""
    storage = FORMATS[actual.dtype.name]
    values = storage.limited(actual.astype(np.float64))
    expected = wide(storage.limited(exact.astype(np.float64)))
    assert_within(what, values, expected, spec.ULPS_16BIT * storage.spacing(scale))


def _float32_ulp(scale: NDArray[Any]) -> NDArray[Any]:
    return np.spacing(scale.astype(np.float32)).astype(np.float64)
