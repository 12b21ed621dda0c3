"""The method of oneDNN's benchdnn: inputs whose mean and variance are exact in any order of sums.

Elements come in pairs, mean + d and mean - d, of numbers with few digits. So every sum of elements,
of deviations and of their squares is exact in float64, whatever is added to what first, and what is
asked of an implementation is equality. dy has few digits as well, and the sums over it are exact.

The more elements, the fewer digits: the sum of squares m2 stays below 2^24 (in squares of a unit in
the last place). Where float32 does not hold m2 / n it then lies farther from the middle of two
float32 numbers than 2^-25 / n of itself: a variance that float64 has rounded a few times, or summed
in parts, still is the same in float32, and whatever is not the same there is wrong.

A pair lies side by side in one sample. An odd sample has one element more, which is the mean.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from published_shapes import Shape

import bnfast.functional as F
from bnfast import spec
from bnfast.testing import reference
from bnfast.testing.bounds import UNIT, assert_gradient, assert_output, assert_sums, assert_within
from bnfast.testing.cases import Inputs
from bnfast.testing.reference import rows, wide

EPS = 0.0625
"""benchdnn's, a power of two."""

# Binary digits of the mean, and of a deviation at most, in units of the last place.
DIGITS = {"float64": (24, 11), "float32": (19, 11), "float16": (9, 8), "bfloat16": (6, 5)}

LAYOUTS = ("channels-first", "channels-last")


class Case(NamedTuple):
    """One call."""

    backward: bool
    training: bool
    scale: bool
    shift: bool
    residual: bool
    relu: bool
    in_place: bool

    def __str__(self) -> str:
        """Return the names of what is set."""
        return " ".join(name for name, value in self._asdict().items() if value) or "inference"


CASES = [Case(*flags) for flags in itertools.product((False, True), repeat=len(Case._fields))]


def cases_for(shape: Shape) -> list[Case]:
    """Return the cases that a shape has: one value per channel has no variance to train with."""
    one_value = math.prod(shape) == shape[1]
    return [case for case in CASES if not (one_value and case.training and not case.backward)]


def sample(rng: np.random.Generator, shape: Shape, count: int) -> Iterator[Case]:
    """Draw some of the cases of a shape, no two alike."""
    cases = cases_for(shape)
    for i in rng.permutation(len(cases))[:count]:
        yield cases[i]


class Data(NamedTuple):
    """Inputs in the form (N, C, S), in a scale of its own for each channel, and their statistics.

    ``inputs.mean`` is exact. ``m2`` is the sum of squared deviations, exact; ``inputs.var`` and
    ``inputs.invstd`` are made of it. The sums are those of ``dy`` unmasked.
    """

    inputs: Inputs
    m2: NDArray[np.float64]
    deviations: NDArray[np.float64]


def draw(rng: np.random.Generator, shape: Shape, dtype: Any) -> Data:
    """Draw data for a shape (N, C, ...)."""
    samples, channels, size = shape[0], shape[1], math.prod(shape[2:])
    count = samples * size
    digits, few = DIGITS[np.dtype(dtype).name]
    few = min(few, (24 - math.ceil(math.log2(count))) // 2)
    unit = 2.0 ** rng.integers(-8, 9, channels) if digits > 9 else np.ones(channels)
    half = rng.integers(-(2**few), 2**few + 1, (samples, channels, size // 2)).astype(np.float64)
    deviations = np.zeros((samples, channels, size))
    deviations[..., 0 : size // 2 * 2 : 2] = half
    deviations[..., 1::2] = -half
    # Not 0: near that float64 is finer than a sum of numbers of any other size can be.
    mean = rng.integers(2 ** (digits - 1), 2**digits, channels) * rng.choice([-1.0, 1.0], channels)
    m2 = np.square(deviations).sum(axis=(0, 2)) * unit**2
    mean, deviations = mean * unit, deviations * unit[:, None]
    exact = deviations + mean[:, None]
    x = exact.astype(dtype)
    assert (x.astype(np.float64) == exact).all()
    var = m2 / count
    dy = (rng.integers(-8, 9, x.shape) / 4.0).astype(dtype)
    return Data(
        Inputs(
            x=x,
            residual=(rng.integers(-64, 65, x.shape) / 8.0).astype(dtype),
            dy=dy,
            y=np.maximum(rng.integers(-8, 9, x.shape), 0).astype(dtype),
            mean=mean,
            var=var,
            invstd=1.0 / np.sqrt(var + EPS),
            weight=rng.uniform(0.5, 2.0, channels) * rng.choice([-1.0, 1.0], channels),
            bias=rng.uniform(-4.0, 4.0, channels),
            sum_dy=np.zeros(channels),
            sum_dy_xhat=np.zeros(channels),
            eps=EPS,
            count=count,
        ),
        m2,
        deviations,
    )


class Checker:
    """Runs cases of one shape, dtype and layout on a backend, and compares them.

    Parameters
    ----------
    data
        What to run on.
    shape, layout
        How the arrays are handed over: as (N, C, ...), in memory as one of `LAYOUTS`.
    backend
        Its name.
    fma
        As for `bnfast.testing.bounds.assert_output`.
    """

    def __init__(self, data: Data, shape: Shape, layout: str, backend: str, *, fma: bool) -> None:
        self.data, self.shape, self.layout = data, shape, layout
        self.backend, self.fma = backend, fma
        inputs = data.inputs
        self.xhat = wide(rows(data.deviations)) / np.sqrt(wide(inputs.var) + wide(EPS))[:, None]

    def check(self, case: Case) -> None:
        """Run a case; raise AssertionError, naming it, where it is not what it should be."""
        try:
            (self._backward if case.backward else self._forward)(case)
        except AssertionError as error:
            where = f"{self.shape} {self.data.inputs.x.dtype} {self.layout} on {self.backend}"
            raise AssertionError(f"{where}, {case}: {error}") from error

    def check_moments(self) -> None:
        """Compare the statistics alone."""
        x, n = self._laid(self.data.inputs.x), self.data.inputs.count
        found = F.moments(x, backend=self.backend)
        self._same("mean", found.mean, self.data.inputs.mean)
        self._same_variance("m2 / n", found.m2 / n, self.data.m2 / n)
        if self.layout == LAYOUTS[0]:
            self._same("m2", found.m2, self.data.m2)
        else:  # parts end between the two of a pair, and their means are no numbers of few digits
            bound = spec.SUM_UNITS * UNIT * self.data.m2
            assert_within("m2", found.m2, wide(self.data.m2), bound)

    def _forward(self, case: Case) -> None:
        inputs = self._given(case)
        x = self._laid(inputs.x)
        residual = None if inputs.residual is None else self._laid(inputs.residual)
        mean, var = inputs.mean.copy(), inputs.var.copy()
        if case.training:
            mean[:], var[:] = np.nan_to_num(np.inf), -1.0  # momentum 1 drops what was there
        y = F.batch_norm(
            x,
            mean,
            var,
            inputs.weight if case.scale else None,
            inputs.bias if case.shift else None,
            training=case.training,
            momentum=1.0,
            eps=EPS,
            residual=residual,
            activation="relu" if case.relu else None,
            out=x if case.in_place else None,
            backend=self.backend,
        )
        if case.training:
            self._same("running_mean", mean, inputs.mean)
            self._same_variance("running_var", var, self.data.m2 / (inputs.count - 1))
        added = None if inputs.residual is None else wide(rows(inputs.residual))
        weight, bias = wide(inputs.weight), wide(inputs.bias)
        exact = reference.affine(self.xhat, weight, bias, added, relu=case.relu)
        ratio = wide(inputs.mean) / np.sqrt(wide(inputs.var) + wide(EPS))
        assert_output(self._form(y), exact, self.xhat, inputs, ratio, fma=self.fma)

    def _backward(self, case: Case) -> None:
        inputs = self._given(case)
        dy = self._laid(inputs.dy)
        gradients = F.batch_norm_backward(
            dy,
            self._laid(inputs.x),
            inputs.weight if case.scale else None,
            inputs.mean,
            inputs.invstd,
            training=case.training,
            activation="relu" if case.relu else None,
            y=self._laid(inputs.y) if case.relu else None,
            residual=case.residual,
            out=dy if case.in_place else None,
            backend=self.backend,
        )
        y = rows(inputs.y).astype(np.float64) if case.relu else None
        g = rows(inputs.dy).astype(np.float64)
        g = g if y is None else np.where(y > 0, g, 0.0)
        self._same("dbias", gradients.dbias, g.sum(axis=1))
        invstd = wide(inputs.invstd)
        xhat = wide(rows(self.data.deviations)) * invstd[:, None]
        sums = reference.backward_sums(wide(g), xhat)
        found = {"sum_dy": gradients.dbias, "sum_dy_xhat": gradients.dweight}
        assert_sums(found, sums)
        if case.training:
            inputs = inputs.replace(**{name: v.astype(np.float64) for name, v in found.items()})
        totals = (wide(inputs.sum_dy), wide(inputs.sum_dy_xhat))
        exact = reference.backward_input(
            wide(g), xhat, invstd, wide(inputs.weight), *totals, inputs.count
        )
        assert_gradient(self._form(gradients.dx), exact, wide(g), xhat, inputs)
        if case.residual:
            self._same("dresidual", rows(self._form(gradients.dresidual)).astype(np.float64), g)

    def _given(self, case: Case) -> Inputs:
        """Return what a case computes with."""
        inputs = self.data.inputs
        given: dict[str, Any] = {}
        if not case.scale:
            given["weight"] = np.ones(len(inputs.weight))
        if not case.shift:
            given["bias"] = np.zeros(len(inputs.bias))
        if not case.residual:
            given["residual"] = None
        return inputs.replace(**given)

    def _laid(self, form: NDArray[Any]) -> NDArray[Any]:
        """Return an array of the form (N, C, S) as a fresh one of the case's shape and layout."""
        array = form.reshape(self.shape)
        if self.layout == LAYOUTS[0]:
            return array.copy()
        return np.moveaxis(np.moveaxis(array, 1, -1).copy("C"), -1, 1)

    def _form(self, array: NDArray[Any]) -> NDArray[Any]:
        return np.ascontiguousarray(array).reshape(self.data.inputs.x.shape)

    def _same(self, what: str, found: NDArray[Any], exact: NDArray[Any]) -> None:
        np.testing.assert_array_equal(found, exact, err_msg=what)

    def _same_variance(self, what: str, found: NDArray[Any], exact: NDArray[Any]) -> None:
        """Compare two variances as float32, in which benchdnn has them, and a layer by default."""
        self._same(what, found.astype(np.float32), exact.astype(np.float32))
