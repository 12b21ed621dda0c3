"""The kernel contract: what a backend is, what each argument means, how exact it must be.

A backend is a *module of plain functions* that matches :class:`Kernels`. It holds arithmetic
and nothing else: a call arrives validated, with every output allocated.

Array forms
    ``x`` and everything shaped like it (``y``, ``residual``, ``dy``, ``dx``, ``dresidual``) comes
    in one of two forms, C-contiguous and aligned, told apart by ``ndim``::

        channels-first  (N, C, S)   S = H * W; one channel is N runs of S adjacent elements
        channels-last   (M, C)      M = N * H * W; one channel is a column

    The dtype is float32 or float64, native byte order. Any dimension may be 0 or 1.

16-bit storage
    To a backend that names them in ``STORAGE_DTYPES`` these arrays also come in float16 or
    bfloat16 (the dtype of the package ml_dtypes, which need not be imported to recognise it). The
    dtype is the tag: the bits of an array are ``x.view(np.uint16)``. All arrays of a call share it.

Channel vectors
    ``mean, var, weight, bias, m2, invstd, sum_dy, sum_dy_xhat`` are float64, C-contiguous, shape
    ``(C,)``, never None.

Direction
    Positional arrays are IN and are never written (they may be read-only). Keyword arrays are
    OUT: preallocated, and wholly overwritten whatever they held before.
    The only aliasing: ``y`` may be exactly ``x`` or ``residual``; ``dx`` may be exactly ``dy``.

Duties
    Kernels do not validate, do not read the environment, and do not raise for data. NaN and inf
    stay in their own channel. With no elements (n = 0) ``mean``, ``m2`` and the sums are 0.
    ``num_threads``, at least 1, is a wish: the work is cut into parts that do not depend on it and
    partial results are combined in a fixed order, so the same bits come out for any number.
    Sums are carried in float64. An element of ``normalize`` depends on its own channel's numbers
    alone, so in inference a sample's output does not depend on its batch.
    Where ``sum_dy_xhat`` is 0, as in eval mode, dx does not depend on x or mean, whatever these
    hold.
    A sum over a channel that has an infinity may be an infinity or NaN.

Optional members
    ``before_fork()`` is called before the process forks, if the module was loaded: stop what would
    not survive. ``limit_instruction_set(name)`` takes ``BNFAST_ISA`` and raises ValueError for a
    name that it does not know. ``assume_caches(core, last)`` sets the sizes in bytes that work is
    cut for, so that tests send small arrays the way of large ones. ``OPENMP`` (a bool) and
    ``CYTHON_VERSION`` (a str) are reported by `bnfast.show_config`.

    ``STORAGE_DTYPES``, a tuple, has the names of those of `STORAGE_DTYPES` that the kernels take.
    Without it they get none of these: the call is refused before, with the cast to use.

    A backend that accepts other arrays than NumPy's has two more hooks, those of `DeviceKernels`.
    Its ``describe(x)`` is called once for each array of a call, and ``view`` and ``empty`` are
    given the `bnfast.device.DeviceArray` in place of the array. ``empty`` returns an array of the
    kind that was described, and ``view`` takes that as well.

Rounding
    ``normalize`` computes ``(x - mean) * (weight / sqrt(var + eps)) + bias``, rounds it to the
    dtype of x, then adds ``residual`` and rounds again, then applies ReLU, which lets NaN pass.
    The fused calls therefore give the bits of the separate steps.

    With 16-bit storage everything, residual and ReLU included, is computed in float32 or wider and
    rounded to the storage type once, at the very end: to nearest, ties to even; beyond the largest
    number to infinity, below the smallest normal one to subnormals. NaN stays NaN, whatever its
    payload. Only the ReLU gives the bits of a separate step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from bnfast.device import DeviceArray
    from bnfast.layout import Plan

Floats: TypeAlias = NDArray[Any]
"""An array of an accepted dtype in one of the two array forms."""

Channels: TypeAlias = NDArray[np.float64]
"""A contiguous float64 vector with one number per channel."""

Y_ULPS_FLOAT32 = 2.5
"""float32: bound on the error of y, in ulps of ``output_scale``, at any mean/std up to 1e6."""

Y_ULPS_FLOAT32_WITHOUT_FMA = 3.0
"""The same where the CPU (or the instruction set in use) has no fused multiply-add."""

Y_ULPS_RESIDUAL = 1.0
"""float32: what a residual adds to that bound. The affine result is rounded before the residual is
added, and where the two cancel it can be twice as large as ``output_scale``."""

Y_UNITS_FLOAT64 = 8.0
"""float64: the error of y is at most this times 2^-53 (1 + |mean|/sqrt(var + eps)) output_scale."""

STORAGE_DTYPES = ("float16", "bfloat16")
"""The names of the dtypes that are stored in 16 bits and computed in float32 or wider."""

ULPS_16BIT = 1.0
"""float16 and bfloat16: bound on the error of y and dx, in ulps of the storage type at
``output_scale`` or ``gradient_scale``; half of it is the rounding of the exact result."""

ROUNDED_RIGHT_16BIT = 0.999
"""float16 and bfloat16: the share of elements, at least, that are the exact result correctly
rounded. The others lie so close to the middle of two numbers that float32 takes the other one."""

DX_ULPS_FLOAT32 = 4.0
"""float32: bound on the error of dx, in ulps of ``gradient_scale``."""

DX_UNITS_FLOAT64 = 16.0
"""float64: the error of dx is at most this times 2^-53 (1 + |mean| invstd) gradient_scale."""

SUM_UNITS = 32.0
"""The error of a float64 sum over a channel is at most this times 2^-53 times the sum of its
terms' magnitudes. For m2, whose mean is itself rounded, add n (SUM_UNITS 2^-53 mean)^2."""

M2_RELATIVE_FLOAT32 = 2.0**-40
"""x of float32 or less: the relative error of m2 may be this large, and that of the mean this times
sqrt(m2 / n), which no float32 result can show. It leaves kernels free to sum the deviations and
their squares about a first guess of the mean, in one pass."""


class Kernels(Protocol):
    """The functions of a backend module. mypy accepts the module itself as a ``Kernels``."""

    def unavailable(self) -> str | None:
        """Return None, or one sentence saying why the backend cannot run and what to install."""

    def instruction_set(self) -> str:
        """Return the name of the instruction set that the kernels use here, for reports."""

    def accepts(self, x: object) -> bool:
        """Return whether ``x`` is an array that this backend reads where it lies."""

    def view(self, x: Any, plan: Plan) -> Floats:
        """Return ``x`` in the form that ``plan`` names: a view where it can be, else one copy."""

    def empty(self, plan: Plan, like: Any) -> Any:
        """Return a new, uninitialised array of ``plan.shape`` in the memory order of ``plan``."""

    def moments(self, x: Floats, *, mean: Channels, m2: Channels, num_threads: int) -> None:
        """Compute the mean and the sum of squared deviations from it, per channel."""

    def normalize(
        self,
        x: Floats,
        mean: Channels,
        var: Channels,
        weight: Channels,
        bias: Channels,
        eps: float,
        residual: Floats | None,
        *,
        y: Floats,
        relu: bool,
        num_threads: int,
    ) -> None:
        """Compute y = act((x - mean) * (weight / sqrt(var + eps)) + bias + residual)."""

    def train(
        self,
        x: Floats,
        weight: Channels,
        bias: Channels,
        eps: float,
        residual: Floats | None,
        *,
        y: Floats,
        mean: Channels,
        m2: Channels,
        relu: bool,
        num_threads: int,
    ) -> None:
        """``moments``, then ``normalize`` with var = m2 / n, fused to read memory once."""

    def backward_sums(
        self,
        dy: Floats,
        x: Floats,
        y: Floats | None,
        mean: Channels,
        invstd: Channels,
        *,
        sum_dy: Channels,
        sum_dy_xhat: Channels,
        relu: bool,
        num_threads: int,
    ) -> None:
        """Sum g and g * xhat per channel: xhat = (x - mean) * invstd, g = dy where y > 0, else 0.

        Without ``relu``, ``y`` is None and g = dy.
        """

    def backward_input(
        self,
        dy: Floats,
        x: Floats,
        y: Floats | None,
        mean: Channels,
        invstd: Channels,
        weight: Channels,
        sum_dy: Channels,
        sum_dy_xhat: Channels,
        count: int,
        *,
        dx: Floats,
        dresidual: Floats | None,
        relu: bool,
        num_threads: int,
    ) -> None:
        """Compute dx = weight * invstd * (g - (sum_dy + xhat * sum_dy_xhat) / count).

        ``count`` is the number of elements per channel behind the sums (it may exceed those of x,
        when batches were merged). In eval mode the sums are zero. ``dresidual``, if not None, is g.
        """

    def backward(
        self,
        dy: Floats,
        x: Floats,
        y: Floats | None,
        mean: Channels,
        invstd: Channels,
        weight: Channels,
        *,
        dx: Floats,
        dresidual: Floats | None,
        sum_dy: Channels,
        sum_dy_xhat: Channels,
        relu: bool,
        num_threads: int,
    ) -> None:
        """``backward_sums``, then ``backward_input`` with count = n, fused to read memory once."""


class DeviceKernels(Kernels, Protocol):
    """The functions of a backend that accepts other arrays than NumPy's."""

    def describe(self, x: Any) -> DeviceArray:
        """Return what policy needs to know of ``x``; raise TypeError or ValueError to refuse it."""

    def assign(self, out: DeviceArray, y: Any) -> None:
        """Copy ``y``, which `empty` returned, to ``out``, whatever its memory order."""


def output_scale(
    xhat: Floats, weight: Floats, bias: Floats, residual: Floats | float, y: Floats
) -> Floats:
    """Return t = max(|weight| max(1, |xhat|), |bias|, |residual|, |y|), elementwise.

    The arguments broadcast against each other. Errors of ``y`` are counted in ulps of t: where the
    terms cancel, y itself can be arbitrarily smaller than the numbers it was made from.
    """
    t = np.abs(weight) * np.maximum(1.0, np.abs(xhat))
    for term in (bias, residual, y):
        t = np.maximum(t, np.abs(term))
    return t


def gradient_scale(
    g: Floats,
    xhat: Floats,
    invstd: Floats,
    weight: Floats,
    mean_dy: Floats,
    mean_dy_xhat: Floats,
) -> Floats:
    """Return the sum of the magnitudes of the three terms of dx, elementwise.

    ``mean_dy`` and ``mean_dy_xhat`` are the two sums divided by the count. As in `output_scale`,
    xhat counts as at least 1 in magnitude: that is the size of its own rounding.
    """
    spread = np.abs(mean_dy_xhat) * np.maximum(1.0, np.abs(xhat))
    scale: Floats = np.abs(weight * invstd) * (np.abs(g) + np.abs(mean_dy) + spread)
    return scale
