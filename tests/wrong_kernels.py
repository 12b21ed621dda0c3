"""Kernels that are wrong on purpose, each with the tests that must catch it.

Each is a copy of the NumPy backend in which one function is replaced. A replacement gets the right
function and the arguments of the call by name, and gives the wrong result with them. As the copy's
own functions call each other, a wrong ``moments`` makes ``train`` consistently wrong too.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import inspect
import platform
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

Arguments = dict[str, Any]
Change = Callable[[Callable[..., None], Arguments], Any]


class Wrong(NamedTuple):
    """A wrong backend, the tests that must fail on it, and the exception they must fail with."""

    kernels: ModuleType
    caught_by: tuple[str, ...]
    error: str


WRONG: dict[str, Wrong] = {}


def reference_with(name: str, changes: dict[str, Change]) -> ModuleType:
    """Return a copy of the NumPy backend with the given functions replaced."""
    origin = importlib.util.find_spec("bnfast.backends.numpy_reference")
    assert origin is not None
    spec = importlib.util.spec_from_file_location(name, origin.origin)
    assert spec is not None
    assert spec.loader is not None
    kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels)
    for function, change in changes.items():
        setattr(kernels, function, _replaced(getattr(kernels, function), change))
    return kernels


def _replaced(right: Callable[..., None], change: Change) -> Callable[..., Any]:
    signature = inspect.signature(right)

    @functools.wraps(right)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return change(right, dict(signature.bind(*args, **kwargs).arguments))

    return replacement


def wrong(
    function: str, *caught_by: str, error: str = "AssertionError"
) -> Callable[[Change], Change]:
    """Enter a replacement of ``function`` under its own name."""

    def enter(change: Change) -> Change:
        name = change.__name__
        WRONG[name] = Wrong(reference_with(name, {function: change}), caught_by, error)
        return change

    return enter


def channels(x: np.ndarray) -> np.ndarray:
    """Return a view with the channels in front and the elements of one run last."""
    return x.transpose(1, 0, 2) if x.ndim == 3 else x.T[:, None, :]


def count(x: np.ndarray) -> int:
    """Return the number of elements per channel, at least 1."""
    return max(x.size // max(x.shape[1], 1), 1)


def poke(array: np.ndarray, index: int, value: float) -> None:
    """Write to memory that Python would not let us write to."""
    kind = {4: ctypes.c_float, 8: ctypes.c_double}[array.itemsize]
    kind.from_address(array.ctypes.data + index * array.itemsize).value = value


# Formulas


@wrong("normalize", "test_normalize", "test_train", "test_eps")
def eps_missing(right, a):
    right(**a | {"eps": 0.0})


@wrong("normalize", "test_normalize", "test_train", "test_eps")
def eps_outside_the_sqrt(right, a):
    right(**a | {"var": np.square(np.sqrt(a["var"]) + a["eps"]), "eps": 0.0})


@wrong("train", "test_train", "test_train_has_the_bits_of_moments_then_normalize")
def unbiased_variance_normalizes(right, a):
    right(**a)
    scale = np.sqrt((count(a["x"]) - 1) / count(a["x"])) or 1.0
    right(**a | {"weight": a["weight"] * scale})


@wrong("moments", "test_moments", "test_moments_of_parts_merge_into_those_of_the_whole")
def m2_is_the_variance(right, a):
    right(**a)
    a["m2"] /= count(a["x"])


@wrong("normalize", "test_normalize", "test_train_large")
def one_channel_shifted(right, a):
    right(**a | {"weight": np.roll(a["weight"], 1)})


@wrong("normalize", "test_normalize", "test_mean_over_std")
def negative_weight_loses_its_sign(right, a):
    right(**a | {"weight": np.abs(a["weight"])})


@wrong("normalize", "test_zero_weight_gives_the_bias", "test_normalize")
def zero_weight_taken_for_none(right, a):
    right(**a | {"weight": np.where(a["weight"] == 0, 1.0, a["weight"])})


@wrong("train", "test_train", "test_train_has_the_bits_of_moments_then_normalize")
def residual_ignored_in_train(right, a):
    right(**a | {"residual": None})


@wrong("normalize", "test_normalize", "test_residual_and_relu_have_the_bits_of_separate_steps")
def relu_before_residual(right, a):
    right(**a | {"residual": None, "y": (affine := np.empty_like(a["y"]))})
    a["y"][...] = affine if a["residual"] is None else affine + a["residual"]


@wrong("backward_input", "test_backward_input", "test_backward")
def xhat_term_missing_in_dx(right, a):
    right(**a | {"sum_dy_xhat": np.zeros_like(a["sum_dy_xhat"])})


@wrong(
    "backward_input",
    "test_backward_input",
    "test_gradients_are_those_of_train_by_finite_differences",
)
def dy_term_missing_in_dx(right, a):
    right(**a | {"sum_dy": np.zeros_like(a["sum_dy"])})


@wrong("backward_sums", "test_backward_sums", "test_backward")
def sum_dy_xhat_without_invstd(right, a):
    right(**a | {"invstd": np.ones_like(a["invstd"])})


@wrong("backward_input", "test_backward_input", "test_dresidual_is_optional")
def dx_without_weight(right, a):
    has_residual = a["dresidual"] is not None
    right(**a | {"weight": np.ones_like(a["weight"]) if has_residual else a["weight"]})


@wrong("backward_input", "test_backward_input", "test_backward")
def dresidual_not_masked(right, a):
    right(**a)
    if a["dresidual"] is not None:
        a["dresidual"][...] = a["dy"]


@wrong("backward_sums", "test_backward_sums", "test_backward")
def sums_not_masked(right, a):
    right(**a | {"y": None})


@wrong("backward_sums", "test_backward_sums", "test_gradient_is_masked_where_y_is_not_positive")
def mask_lets_zero_pass(right, a):
    right(**a | {"y": None if a["y"] is None else np.where(a["y"] == 0, 1, a["y"])})


@wrong("backward_sums", "test_gradient_is_masked_where_y_is_not_positive")
def mask_by_multiplication(right, a):
    with np.errstate(invalid="ignore"):
        masked = a["dy"] if a["y"] is None else a["dy"] * (a["y"] > 0)
    right(**a | {"dy": masked, "y": None})


@wrong(
    "backward_input",
    "test_count_may_exceed_the_elements_of_x",
    "test_backward_of_parts_is_that_of_the_whole",
)
def count_ignored(right, a):
    right(**a | {"count": count(a["x"])})


@wrong("backward_input", "test_count_may_exceed_the_elements_of_x")
def count_in_32_bits(right, a):
    right(**a | {"count": int(np.int64(a["count"]).astype(np.int32)) or 1})


@wrong("backward_input", "test_backward_input_in_eval_mode", "test_backward_input")
def sums_computed_again(right, a):
    own = {name: np.empty_like(a[name]) for name in ("sum_dy", "sum_dy_xhat")}
    g = np.where(a["y"] > 0, a["dy"], 0) if a["y"] is not None else a["dy"]
    per_channel = channels(g).astype(np.float64)
    own["sum_dy"][:] = per_channel.sum(axis=(1, 2))
    xhat = (channels(a["x"]) - a["mean"][:, None, None]) * a["invstd"][:, None, None]
    own["sum_dy_xhat"][:] = (per_channel * xhat).sum(axis=(1, 2))
    right(**a | own)


# Accuracy


@wrong("normalize", "test_mean_over_std")
def mean_rounded_to_float32(right, a):
    right(**a | {"mean": a["mean"].astype(np.float32).astype(np.float64)})


@wrong("backward_input", "test_backward_mean_over_std", "test_backward_input")
def mean_rounded_to_float32_in_dx(right, a):
    right(**a | {"mean": a["mean"].astype(np.float32).astype(np.float64)})


@wrong("moments", "test_moments", "test_mean_over_std")
def square_of_the_mean_subtracted(right, a):
    right(**a)
    x = channels(a["x"]).astype(np.float64)
    with np.errstate(all="ignore"):
        a["m2"][:] = np.square(x).sum(axis=(1, 2)) - np.square(a["mean"]) * count(a["x"])


@wrong("moments", "test_moments", "test_constant_channel")
def accumulated_in_float32(right, a):
    x = channels(a["x"])
    with np.errstate(all="ignore"):
        a["mean"][:] = x.sum(axis=(1, 2), dtype=np.float32) / np.float32(count(a["x"]))
        deviation = x - a["mean"][:, None, None]
        a["m2"][:] = np.square(deviation).sum(axis=(1, 2), dtype=np.float32)


@wrong("moments", "test_moments_where_outliers_come_first")
def summed_about_the_first_element(right, a):
    right(**a)
    x = channels(a["x"]).astype(np.float64)
    if x.size:
        with np.errstate(all="ignore"):
            deviation = x - x[:, :1, :1]
            total = deviation.sum(axis=(1, 2))
            squares = np.square(deviation).sum(axis=(1, 2))
            a["m2"][:] = squares - np.square(total) / count(a["x"])


@wrong("backward_sums", "test_sums_where_every_sample_is_the_same")
def summed_in_one_chain(right, a):
    right(**a)
    g = channels(a["dy"] if a["y"] is None else np.where(a["y"] > 0, a["dy"], 0))
    if g.size:
        with np.errstate(all="ignore"):
            in_order = g.reshape(len(g), -1).astype(np.float64)
            a["sum_dy"][:] = np.add.accumulate(in_order, axis=1)[:, -1]


@wrong("moments", "test_magnitude_of_x")
def squared_in_float32(right, a):
    right(**a)
    if a["x"].dtype == np.float32:
        with np.errstate(all="ignore"):
            deviation = (channels(a["x"]) - a["mean"][:, None, None]).astype(np.float32)
            a["m2"][~np.isfinite(np.square(deviation).sum(axis=(1, 2)))] = np.inf


@wrong("normalize", "test_mean_over_std", "test_normalize")
def folded_into_one_multiplication(right, a):
    x = channels(a["x"])
    with np.errstate(all="ignore"):
        scale = a["weight"] / np.sqrt(a["var"] + a["eps"])
        shift = (a["bias"] - a["mean"] * scale).astype(x.dtype)[:, None, None]
        y = x * scale.astype(x.dtype)[:, None, None] + shift
        y = y if a["residual"] is None else y + channels(a["residual"])
        channels(a["y"])[...] = np.maximum(y, 0) if a["relu"] else y


@wrong("normalize", "test_residual_and_relu_have_the_bits_of_separate_steps")
def rounded_once_with_the_residual(right, a):
    wide = {name: a[name].astype(np.float64) for name in ("x", "residual") if a[name] is not None}
    right(**a | wide | {"y": (y := np.empty(a["y"].shape))})
    a["y"][...] = y


@wrong("normalize", "test_subnormal_weight")
def subnormals_flushed(right, a):
    right(**a)
    a["y"][np.abs(a["y"]) < np.finfo(a["y"].dtype).tiny] = 0


@wrong("normalize", "test_tiny_x_without_eps")
def var_clamped_to_normal_float32(right, a):
    right(**a | {"var": np.maximum(a["var"], np.finfo(np.float32).tiny)})


@wrong("normalize", "test_magnitude_of_x")
def subtracted_in_float32(right, a):
    right(**a)
    with np.errstate(all="ignore"):
        deviation = channels(a["x"]) - a["mean"].astype(a["x"].dtype)[:, None, None]
    channels(a["y"])[np.isinf(deviation)] = np.inf


# Blocks and edges


@wrong("moments", "test_moments", "test_train")
def last_block_lost(right, a):
    length = a["x"].shape[-1 if a["x"].ndim == 3 else 0]
    whole = max(length - length % 1024, min(length, 1024))
    part = a["x"][..., :whole] if a["x"].ndim == 3 else a["x"][:whole]
    right(**a | {"x": part})


@wrong("backward_sums", "test_backward_sums", "test_backward")
def tail_of_a_row_ignored(right, a):
    if a["x"].ndim == 3 and (tail := a["x"].shape[2] % 16):
        dy = a["dy"].copy()
        dy[..., -tail:] = 0
        a = a | {"dy": dy}
    right(**a)


@wrong("backward_sums", "test_backward_sums", "test_backward")
def tail_of_the_channels_ignored(right, a):
    right(**a)
    if a["x"].ndim == 2 and (tail := a["x"].shape[1] % 16):
        a["sum_dy"][-tail:] = 0


@wrong("moments", "test_moments", "test_train_large")
def second_part_lost(right, a):
    parts = a["x"].reshape(-1) if a["x"].shape[1] == 1 else a["x"]
    right(**a | {"x": parts[: 2**16].reshape(-1, 1) if parts.ndim == 1 else parts})


@wrong("normalize", "test_normalize_large", "test_train_large")
def index_in_16_bits(right, a):
    right(**a | {"y": (y := np.empty_like(a["y"]))})
    written = a["y"].shape[0] if a["y"].ndim == 2 else a["y"].shape[2]
    written = min(written, 2**16)
    part = slice(written) if a["y"].ndim == 2 else (..., slice(written))
    a["y"][part] = y[part]


@wrong("normalize", "test_normalize", "test_out_is_wholly_overwritten")
def output_only_partly_written(right, a):
    right(**a | {"y": (y := np.empty_like(a["y"]))})
    a["y"].reshape(-1)[:-1] = y.reshape(-1)[:-1]


@wrong("backward_sums", "test_backward_sums", "test_out_is_wholly_overwritten")
def sums_added_to_what_was_there(right, a):
    before = a["sum_dy"].copy()
    right(**a)
    a["sum_dy"] += before


@wrong("moments", "test_empty")
def moments_of_nothing_left_unwritten(right, a):
    if a["x"].size:
        right(**a)


@wrong("normalize", "test_normalize", "test_train")
def writes_past_the_end(right, a):
    right(**a)
    poke(a["y"], a["y"].size, 0.0)


@wrong("moments", "test_moments")
def reads_past_the_end(right, a):
    right(**a)
    if a["x"].ndim == 3:
        beyond = np.lib.stride_tricks.as_strided(a["x"].reshape(-1), (a["x"].size + 1,))[-1]
        a["mean"][-1:] += 1e-9 * beyond


@wrong("normalize", "test_inputs_are_left_alone", "test_normalize")
def input_modified(right, a):
    right(**a)
    if a["x"].size and a["x"] is not a["y"]:
        poke(a["x"], a["x"].size // 2, -1.0)


# NaN and inf


@wrong("normalize", "test_relu_of_infinities")
def relu_by_multiplication(right, a):
    relu = a["relu"]
    right(**(a | {"relu": False}))
    if relu:
        with np.errstate(all="ignore"):
            a["y"][...] = a["y"] * (a["y"] > 0)


@wrong("normalize", "test_relu_of_minus_zero_is_zero")
def relu_keeps_minus_zero(right, a):
    right(**a | {"relu": False})
    if a["relu"]:
        a["y"][a["y"] < 0] = 0


@wrong("normalize", "test_relu_passes_nan")
def relu_swallows_nan(right, a):
    right(**a | {"relu": False})
    if a["relu"]:
        np.fmax(a["y"], 0, out=a["y"])


@wrong("normalize", "test_nan_and_inf_stay_in_their_channel")
def nan_leaks_to_the_next_channel(right, a):
    right(**a)
    first, second = channels(a["y"])[:-1], channels(a["y"])[1:]
    second[np.isnan(first)] = np.nan


@wrong("moments", "test_nan_and_inf_poison_the_whole_of_their_channel_in_training")
def nan_ignored_in_the_mean(right, a):
    right(**a | {"x": np.nan_to_num(a["x"], nan=0.0, posinf=0.0, neginf=0.0)})


@wrong("normalize", "test_data_raises_nothing", error="FloatingPointError")
def division_by_zero_raises(right, a):
    np.divide(a["weight"], np.sqrt(a["var"] + a["eps"]))
    right(**a)


# The processor's floating-point mode, through glibc; its control word on x86 has the two bits


def _environment_of_the_processor() -> ctypes.Array[ctypes.c_uint32]:
    environment = (ctypes.c_uint32 * 8)()
    ctypes.CDLL(None).fegetenv(environment)
    return environment


def restore_floating_point() -> None:
    """Undo what `flush_to_zero_left_on` did."""
    if ON_GLIBC_X86:
        environment = _environment_of_the_processor()
        environment[7] &= ~FLUSH_TO_ZERO & 0xFFFFFFFF
        ctypes.CDLL(None).fesetenv(environment)


ON_GLIBC_X86 = platform.machine() == "x86_64" and platform.libc_ver()[0] == "glibc"
FLUSH_TO_ZERO = 0x8040


@wrong("moments", "test_subnormals_still_work_after_a_call")
def flush_to_zero_left_on(right, a):
    right(**a)
    environment = _environment_of_the_processor()
    environment[7] |= FLUSH_TO_ZERO
    ctypes.CDLL(None).fesetenv(environment)


if not ON_GLIBC_X86:
    del WRONG["flush_to_zero_left_on"]


# Bits


@wrong("moments", "test_same_bits_for_any_number_of_threads")
def last_bit_depends_on_threads(right, a):
    right(**a)
    if a["num_threads"] > 2:
        a["m2"][:] = np.nextafter(a["m2"], np.inf)


@wrong("backward_input", "test_same_bits_for_any_number_of_threads")
def seventh_thread_loses_its_part(right, a):
    right(**a)
    part = a["dx"].size // a["num_threads"]
    a["dx"].reshape(-1)[6 * part : 7 * part] = 0


@wrong("normalize", "test_same_bits_wherever_arrays_lie")
def last_bit_depends_on_alignment(right, a):
    right(**a)
    if a["x"].ctypes.data % 16:
        a["y"][...] = np.nextafter(a["y"], a["y"].dtype.type(np.inf))


@wrong("normalize", "test_sample_is_independent_of_its_batch")
def last_bit_depends_on_the_batch(right, a):
    right(**a)
    if a["x"].shape[0] == 1:
        a["y"][...] = np.nextafter(a["y"], a["y"].dtype.type(np.inf))


@wrong("train", "test_train_has_the_bits_of_moments_then_normalize")
def fused_differs_in_the_last_bit(right, a):
    right(**a)
    a["y"][...] = np.nextafter(a["y"], a["y"].dtype.type(np.inf))


@wrong("normalize", "test_same_bits_in_place")
def residual_read_after_y_is_written(right, a):
    right(**a | {"residual": None, "relu": False})
    if a["residual"] is not None:
        a["y"] += a["residual"]
    if a["relu"]:
        np.maximum(a["y"], 0, out=a["y"])


@wrong("backward_input", "test_same_bits_in_place")
def dy_read_after_dx_is_written(right, a):
    right(**a | {"dresidual": None})
    if a["dresidual"] is not None:
        g = a["dy"] if a["y"] is None else np.where(a["y"] > 0, a["dy"], 0)
        a["dresidual"][...] = g


# The module itself


@wrong("unavailable", "test_unavailable_is_none_or_one_sentence")
def unavailable_is_a_boolean(right, a):
    return False


@wrong("instruction_set", "test_instruction_set_is_a_name")
def instruction_set_unknown(right, a):
    return None


@wrong("accepts", "test_accepts_only_arrays")
def accepts_anything(right, a):
    return True


@wrong("view", "test_view_has_the_planned_form")
def view_copies_always(right, a):
    return right(**a).copy()


@wrong("empty", "test_empty_has_the_planned_layout")
def output_always_in_c_order(right, a):
    return np.empty(a["plan"].shape, a["plan"].dtype)


def _moments_with_positional_outputs(x, mean, m2, num_threads):
    raise NotImplementedError


WRONG["outputs_are_positional"] = Wrong(
    reference_with("outputs_are_positional", {}),
    ("test_signature_is_that_of_the_protocol",),
    "AssertionError",
)
WRONG["outputs_are_positional"].kernels.moments = _moments_with_positional_outputs
