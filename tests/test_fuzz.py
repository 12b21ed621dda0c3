"""Fuzzing single calls: any shape, strides, dtype, alignment, aliasing and value, on each backend.

Results are compared with the definition in long double, within the bounds of `bnfast.spec`. In
every run each test draws a fixed number of cases; ``--fuzz-seconds N`` goes on for N seconds.
``--seed N`` draws the same again.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from backends_here import AVAILABLE
from fuzzing import CACHES, DTYPES, characters, fuzz, lies, outside, shapes, vectors
from hypothesis import event
from hypothesis import strategies as st

import bnfast
import bnfast.functional as F
from bnfast import registry
from bnfast.testing import reference
from bnfast.testing.bounds import assert_gradient, assert_output, assert_same_bits, assert_sums
from bnfast.testing.cases import Inputs
from bnfast.testing.reference import rows, wide

EXAMPLES = 150
ZERO = np.zeros(0)


def backends(config):
    """Return the backends to draw from: those that can run, or those of ``--fuzz-backend``."""
    chosen = config.option.fuzz_backend
    return [name for name in AVAILABLE if not chosen or name in chosen.split(",")]


def float64(vector, default, channels):
    return np.full(channels, default) if vector is None else np.asarray(vector).astype(np.float64)


def inputs_of(**given_arrays: Any) -> Inputs:
    """Return the arguments of the checks; what they do not look at is empty."""
    names = Inputs.__dataclass_fields__
    return Inputs(**{name: ZERO for name in names} | {"eps": 0.0, "count": 1} | given_arrays)


def assert_y(backend, y, x, mean, var, weight, bias, eps, residual, relu):
    """Check y where the definition is finite within bounds, elsewhere for the same NaN or inf."""
    with np.errstate(all="ignore"):
        xhat = reference.standardize(wide(rows(x)), wide(mean), wide(var), eps)
        added = None if residual is None else wide(rows(residual))
        exact = reference.affine(xhat, wide(weight), wide(bias), added, relu=relu)
        deviations = wide(mean) / np.sqrt(wide(var) + wide(eps))
    actual = rows(y)
    usual = np.isfinite(exact) & np.isfinite(xhat)
    if residual is not None:
        usual &= np.isfinite(rows(residual).astype(np.float64))
    with np.errstate(invalid="ignore"):
        same = actual.astype(np.float64) == exact.astype(np.float64)
    same |= np.isnan(actual.astype(np.float64)) & np.isnan(exact)
    assert (same | usual).all(), "NaN and inf elsewhere than in the definition"
    clean = [np.where(usual, array, 0) for array in (actual, exact, xhat)]
    some = None if residual is None else np.where(usual, rows(residual), 0).T
    inputs = inputs_of(weight=weight, bias=bias, residual=some)
    fma = registry.load(backend).instruction_set() != "baseline"
    sound = np.isfinite(deviations)
    assert_output(
        clean[0].astype(y.dtype).T,
        clean[1],
        clean[2],
        inputs,
        np.where(sound, deviations, 0),
        fma=fma,
    )


def assert_running(running, old, momentum, batch, bound):
    """Check one running statistic against the batch's, whose error has a bound."""
    with np.errstate(all="ignore"):
        exact = (1 - momentum) * old.astype(np.longdouble) + momentum * batch
        slack = abs(momentum) * bound + 4 * 2.0**-53 * (
            abs((1 - momentum) * old) + abs(momentum * batch)
        )
        stored = exact.astype(running.dtype)
        slack = slack + np.spacing(np.abs(stored)).astype(np.float64)
        usual = np.isfinite(stored) & np.isfinite(slack)
        off = np.abs(running - exact)
    assert (off <= slack)[usual].all(), (off / slack)[usual].max()


@st.composite
def forward_cases(draw, names):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(shapes())
    channels = shape[1]
    case = {
        "backend": draw(st.sampled_from(names)),
        "caches": draw(st.sampled_from(CACHES)),
        "threads": draw(st.integers(1, 4)),
        "training": draw(st.booleans()),
        "activation": draw(st.sampled_from((None, "relu"))),
        "eps": draw(st.sampled_from((1e-5, 1e-3, 1e-12, 1.0))),
        "momentum": draw(st.sampled_from((0.1, 0.0, 1.0, -0.5, 0.9))),
        "weight": draw(vectors(channels, -2, 2)),
        "bias": draw(vectors(channels, -2, 2)),
        "mean": draw(vectors(channels, -3, 3)),
        "var": draw(vectors(channels, 0.25, 4)),
    }
    x = draw(characters(dtype)).values(shape, dtype)
    case["x"] = draw(lies(len(shape), dtype)).lay(x)
    case["residual"] = None
    if draw(st.booleans()):
        values = draw(characters(dtype)).values(shape, dtype)
        case["residual"] = draw(lies(len(shape), dtype)).lay(values)
    into = draw(st.sampled_from(("new", "x", "residual", "other", "other")))
    native = {
        name: case[name]
        for name in ("x", "residual")
        if case[name] is not None and case[name].flags.writeable and case[name].dtype.isnative
    }
    case["out"] = None
    if into in native:
        case["out"] = native[into]
    elif into == "other":
        case["out"] = draw(lies(len(shape), dtype, out=True)).lay(np.zeros(shape, dtype))
    return case


def check_forward(case):
    event(f"{case['backend']} {case['x'].dtype} training={case['training']}")
    x, residual, out = case["x"].copy(), case["residual"], case["out"]
    residual = None if residual is None else residual.copy()
    channels = x.shape[1]
    count = math.prod(x.shape) // channels if channels else math.prod(x.shape[:1] + x.shape[2:])
    training = case["training"]
    weight, bias = (
        float64(case[name], 1.0 - (name == "bias"), channels) for name in ("weight", "bias")
    )
    mean, var = (None if case[name] is None else case[name].copy() for name in ("mean", "var"))
    if (mean is None) != (var is None) or (mean is None and not training):
        mean, var = np.zeros(channels), np.ones(channels)
    if training and mean is not None:
        kept = np.float32 if mean.dtype.kind == "i" else mean.dtype
        mean, var = mean.astype(kept), var.astype(kept)
    old_mean, old_var = (None, None) if mean is None else (mean.copy(), var.copy())
    around = None if out is None else outside(out)
    before = {n: case[n].tobytes() for n in ("x", "residual") if case[n] is not None}

    def call():
        return F.batch_norm(
            case["x"],
            mean,
            var,
            case["weight"],
            case["bias"],
            training,
            case["momentum"],
            case["eps"],
            residual=case["residual"],
            activation=case["activation"],
            out=out,
            backend=case["backend"],
        )

    with bnfast.use_num_threads(case["threads"]):
        if training and count == 1:
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                call()
            assert all(case[name].tobytes() == data for name, data in before.items())
            return
        y = call()
    assert y is out if out is not None else y.dtype == x.dtype.newbyteorder("=")
    assert y.shape == x.shape
    if out is not None:
        assert outside(out) == around, "wrote outside of out"
    for name, data in before.items():
        if case[name] is not out and not (out is not None and np.shares_memory(case[name], out)):
            assert case[name].tobytes() == data, f"{name} was changed"
    native = x.astype(x.dtype.newbyteorder("="))
    used_mean, used_var = old_mean, old_var
    if training:
        with np.errstate(all="ignore"):
            exact = reference.moments(wide(rows(native)))
        used_mean, used_var = exact.mean, exact.m2 / max(count, 1)
        if old_mean is not None and count == 0:
            assert np.array_equal(mean, old_mean)
            assert np.array_equal(var, old_var)
        elif old_mean is not None:
            check_running_statistics(case, native, exact, count, (mean, var), (old_mean, old_var))
    else:
        used_mean, used_var = used_mean.astype(np.float64), used_var.astype(np.float64)
    relu = case["activation"] == "relu"
    added = None if residual is None else residual.astype(residual.dtype.newbyteorder("="))
    assert_y(
        case["backend"], y, native, used_mean, used_var, weight, bias, case["eps"], added, relu
    )


def check_running_statistics(case, x, exact, count, new, old):
    with np.errstate(all="ignore"):
        magnitude = np.abs(wide(rows(x))).sum(axis=1).astype(np.float64)
        m2 = exact.m2.astype(np.float64)
        units = bnfast.spec.SUM_UNITS * 2.0**-53
        relative = units if x.dtype == np.float64 else bnfast.spec.M2_RELATIVE_FLOAT32
        mean_bound = units * magnitude / count + (relative * np.sqrt(m2 / count))
        m2_bound = relative * m2 + count * (units * exact.mean.astype(np.float64)) ** 2
    assert_running(new[0], old[0], case["momentum"], exact.mean, mean_bound)
    unbiased = exact.m2 / (count - 1)
    assert_running(new[1], old[1], case["momentum"], unbiased, m2_bound / (count - 1))


def test_forward(request):
    cases = forward_cases(backends(request.config))
    fuzz(check_forward, cases, request.config, EXAMPLES)


@st.composite
def backward_cases(draw, names):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(shapes())
    case = {
        "backend": draw(st.sampled_from(names)),
        "caches": draw(st.sampled_from(CACHES)),
        "threads": draw(st.integers(1, 4)),
        "training": draw(st.booleans()),
        "relu": draw(st.booleans()),
        "weight": draw(vectors(shape[1], -2, 2)),
        "eps": draw(st.sampled_from((1e-5, 1e-3, 1.0))),
        "want_residual": draw(st.booleans()),
    }
    for name in ("x", "dy", "y"):
        values = draw(characters(dtype, specials=name != "x")).values(shape, dtype)
        case[name] = draw(lies(len(shape), dtype)).lay(values)
    case["out"] = None
    if draw(st.booleans()):
        case["out"] = draw(lies(len(shape), dtype, out=True)).lay(np.zeros(shape, dtype))
    elif draw(st.booleans()) and case["dy"].flags.writeable and case["dy"].dtype.isnative:
        case["out"] = case["dy"]
    return case


def check_backward(case):
    event(f"{case['backend']} {case['x'].dtype} training={case['training']}")
    x, dy, y = (case[n].astype(case[n].dtype.newbyteorder("=")) for n in ("x", "dy", "y"))
    channels = x.shape[1]
    count = x.size // channels if channels else 0
    weight = float64(case["weight"], 1.0, channels)
    exact = reference.moments(wide(rows(x)))
    mean = exact.mean.astype(np.float64)
    var = (exact.m2 / max(count, 1)).astype(np.float64)
    invstd = 1 / np.sqrt(var + case["eps"])
    around = None if case["out"] is None else outside(case["out"])
    before = {name: case[name].tobytes() for name in ("x", "dy", "y")}
    with bnfast.use_num_threads(case["threads"]):
        result = F.batch_norm_backward(
            case["dy"],
            case["x"],
            case["weight"],
            mean,
            invstd,
            training=case["training"],
            activation="relu" if case["relu"] else None,
            y=case["y"] if case["relu"] else None,
            residual=case["want_residual"],
            out=case["out"],
            backend=case["backend"],
        )
    if case["out"] is not None:
        assert result.dx is case["out"]
        assert outside(case["out"]) == around, "wrote outside of out"
    for name, data in before.items():
        assert case[name] is case["out"] or case[name].tobytes() == data, f"{name} was changed"
    with np.errstate(all="ignore"):
        g = reference.mask(wide(rows(dy)), rows(y) if case["relu"] else None)
        xhat = (wide(rows(x)) - wide(mean)[:, None]) * wide(invstd)[:, None]
        sums = reference.backward_sums(g, xhat)
    usual = np.isfinite(sums.sum_dy) & np.isfinite(sums.sum_dy_xhat)
    # Beside an inf the sum may be NaN as well.
    assert np.array_equal(np.isfinite(result.dbias), np.isfinite(sums.sum_dy))
    kept = {"sum_dy": result.dbias[usual], "sum_dy_xhat": result.dweight[usual]}
    assert_sums(kept, reference.Sums(*(term[usual] for term in sums)))
    inputs = inputs_of(
        mean=mean[usual],
        invstd=invstd[usual],
        weight=weight[usual],
        sum_dy=kept["sum_dy"] if case["training"] else np.zeros(usual.sum()),
        sum_dy_xhat=kept["sum_dy_xhat"] if case["training"] else np.zeros(usual.sum()),
        count=max(count, 1) if case["training"] else 1,
    )
    terms = g[usual], xhat[usual]
    exact_dx = reference.backward_input(
        *terms,
        wide(inputs.invstd),
        wide(inputs.weight),
        wide(inputs.sum_dy),
        wide(inputs.sum_dy_xhat),
        inputs.count,
    )
    if usual.any():
        dx = np.moveaxis(result.dx, 1, 0)[usual]
        assert_gradient(np.moveaxis(dx, 0, 1), exact_dx, *terms, inputs)
    if case["want_residual"]:
        masked = np.where(reference.positive(y), dy, dy.dtype.type(0)) if case["relu"] else dy
        zero = dy.dtype.type(0)
        assert_same_bits("dresidual", result.dresidual + zero, masked + zero)


def test_backward(request):
    cases = backward_cases(backends(request.config))
    fuzz(check_backward, cases, request.config, EXAMPLES)


@st.composite
def overlapping_cases(draw, names):
    """Draw views of one small buffer, in which they overlap in any way."""
    dtype = draw(st.sampled_from(DTYPES))
    size = np.dtype(dtype).itemsize
    buffer = np.random.default_rng(draw(st.integers(0, 99))).normal(size=96).astype(dtype)
    shape = draw(st.tuples(*[st.integers(1, 3)] * 3))
    views = {}
    for name in ("x", "residual", "out"):
        strides = [draw(st.sampled_from((-9, -3, -1, 0, 1, 2, 3, 6, 9))) for _ in shape]
        low = sum(min(0, step * (n - 1)) for step, n in zip(strides, shape, strict=True))
        high = sum(max(0, step * (n - 1)) for step, n in zip(strides, shape, strict=True))
        first = draw(st.integers(-low, max(-low, 95 - high)))
        views[name] = np.ndarray(
            shape, dtype, buffer, first * size, [step * size for step in strides]
        )
    if draw(st.booleans()):
        views["residual"] = None
    if draw(st.integers(0, 3)) == 3:
        views["out"] = views["x"]
    return {
        **views,
        "buffer": buffer,
        "training": draw(st.booleans()),
        "backend": draw(st.sampled_from(names)),
        "caches": draw(st.sampled_from(CACHES)),
    }


def check_overlapping(case):
    x, residual, out = case["x"], case["residual"], case["out"]
    before = case["buffer"].copy()

    def call(x, residual, out):
        channels = x.shape[1]
        running = (np.zeros(channels), np.ones(channels)) if not case["training"] else (None, None)
        return F.batch_norm(
            x,
            *running,
            training=case["training"],
            residual=residual,
            out=out,
            backend=case["backend"],
        )

    refusal, y = None, None
    try:
        y = call(x, residual, out)
    except ValueError as error:
        refusal = str(error)
    event(str(refusal)[:30])
    if refusal is not None:
        assert case["buffer"].tobytes() == before.tobytes(), "a refused call wrote"
        assert any(word in refusal for word in ("overlap", "share", "more than 1"))
        return
    written = case["buffer"].copy()
    case["buffer"][...] = before
    # The same with x where it is, as its order in memory decides the order of sums.
    expected = call(x, residual, None)
    assert_same_bits("with overlaps against apart", written_view(y, case, written), expected)
    untouched = np.ones(96, bool)
    mark = np.ndarray(
        y.shape,
        bool,
        untouched,
        (y.ctypes.data - case["buffer"].ctypes.data) // y.itemsize,
        [step // y.itemsize for step in y.strides],
    )
    mark[...] = False
    assert written[untouched].tobytes() == before[untouched].tobytes()


def written_view(y, case, written):
    offset = y.ctypes.data - case["buffer"].ctypes.data
    return np.ndarray(y.shape, y.dtype, written, offset, y.strides)


def test_overlapping(request):
    cases = overlapping_cases(backends(request.config))
    fuzz(check_overlapping, cases, request.config, 2 * EXAMPLES)
