"""Kernels that are wrong with float16 and bfloat16 alone; they join those of `wrong_kernels`."""

from __future__ import annotations

import numpy as np
from wrong_kernels import wrong


def digits_kept(x: np.ndarray) -> int | None:
    """Return the binary digits of a 16-bit dtype; None for another."""
    return {"float16": 11, "bfloat16": 8}.get(x.dtype.name)


def in_float64(right, a):
    """Call ``right`` with a y of float64, and return that."""
    wide = {name: a[name].astype(np.float64) for name in ("x", "residual") if a[name] is not None}
    right(**a | wide | {"y": (y := np.empty(a["y"].shape))})
    return y


def store(a, y):
    """Put ``y`` where the result goes."""
    with np.errstate(all="ignore"):
        a["y"][...] = y


@wrong(
    "normalize",
    "test_residual_is_added_before_the_only_rounding",
    "test_nearly_all_results_are_rounded_right",
)
def rounded_before_the_residual(right, a):
    right(**a)
    if digits_kept(a["y"]) and a["residual"] is not None:
        right(**a | {"residual": None, "relu": False, "y": (affine := np.empty_like(a["y"]))})
        with np.errstate(all="ignore"):
            added = affine.astype(np.float32) + a["residual"].astype(np.float32)
        store(a, np.maximum(added, 0) if a["relu"] else added)


@wrong("normalize", "test_rounds_to_nearest_even", "test_nearly_all_results_are_rounded_right")
def truncated(right, a):
    right(**a)
    if digits := digits_kept(a["y"]):
        with np.errstate(all="ignore"):
            mantissa, exponent = np.frexp(in_float64(right, a))
            y = np.ldexp(np.trunc(np.ldexp(mantissa, digits)), exponent - digits)
        store(a, y)


@wrong("normalize", "test_rounds_to_nearest_even")
def ties_away_from_zero(right, a):
    right(**a)
    if digits := digits_kept(a["y"]):
        with np.errstate(all="ignore"):
            mantissa, exponent = np.frexp(in_float64(right, a))
            scaled = np.ldexp(mantissa, digits)
            rounded = np.copysign(np.floor(np.abs(scaled) + 0.5), scaled)
            y = np.ldexp(rounded, exponent - digits)
        store(a, y)


@wrong("normalize", "test_rounds_to_nearest_even")
def largest_number_in_place_of_infinity(right, a):
    right(**a)
    if digits_kept(a["y"]):
        overflown = np.isinf(a["y"].astype(np.float64)) & np.isfinite(in_float64(right, a))
        bits = a["y"].view(np.uint16)
        bits[overflown] -= 1


@wrong("normalize", "test_every_number_passes")
def nan_rounded_as_a_number(right, a):
    right(**a)
    if digits_kept(a["y"]):
        with np.errstate(all="ignore"):
            a["y"][np.isnan(a["y"].astype(np.float64))] = np.inf


def carry_to_zero(result, vector):
    """Make 0 of the channels where a vector is the NaN all of whose bits are set but the first."""
    if digits_kept(result):
        np.moveaxis(result, 1, 0)[vector.view(np.uint64) == 0x7FFFFFFFFFFFFFFF] = 0


@wrong("normalize", "test_any_nan_is_a_nan")
def nan_of_all_bits_in_bias_carried_to_zero(right, a):
    right(**a)
    carry_to_zero(a["y"], a["bias"])


@wrong("train", "test_any_nan_is_a_nan")
def nan_of_all_bits_in_an_element_read_as_zero(right, a):
    if digits_kept(a["x"]):
        x = a["x"].copy()
        x[x.view(np.uint16) == 0x7FFF] = 0
        a = a | {"x": x}
    right(**a)


@wrong("backward_input", "test_any_nan_is_a_nan")
def nan_of_all_bits_in_weight_carried_to_zero(right, a):
    right(**a)
    carry_to_zero(a["dx"], a["weight"])


@wrong("normalize", "test_every_number_passes")
def subnormals_read_as_zero(right, a):
    if digits_kept(a["x"]):
        bits = a["x"].view(np.uint16)
        normal = bits % 2**15 >= 2 ** (digits_kept(a["x"]) - 1)
        a = a | {"x": np.where(normal, bits, 0).astype(np.uint16).view(a["x"].dtype)}
    right(**a)


@wrong("backward_input", "test_nearly_all_gradients_are_rounded_right")
def gradient_in_16_bits(right, a):
    right(**a)
    if digits_kept(a["dx"]):
        bits = a["dx"].view(np.uint16)
        bits &= 0xFFFE
