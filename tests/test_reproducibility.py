"""What docs/reproducibility.md promises, through the public API: where the same bits come out.

The kernels alone are held to it by `bnfast.testing.determinism`, on more shapes.
"""

from __future__ import annotations

import numpy as np
import pytest
from backends_here import AVAILABLE, over_backends
from fresh_python import output_of
from strided import WRITABLE, permuted

import bnfast
import bnfast.functional as F
from bnfast import registry
from bnfast.testing.bounds import assert_same_bits, assert_same_outputs
from bnfast.testing.cases import ALL_DTYPES, over

LAYOUTS = {"NCHW": (0, 1, 2, 3), "channels-last": (0, 2, 3, 1)}
SHAPES = ((3, 5, 7, 9), (6, 64, 14, 14), (2, 3, 130, 70), (300, 17, 1, 1), (1, 130, 5, 5))
EVERY_WAY = ("axes0132", "axes0231", "axes1023", "axes3210", "backwards", "stepped3", "cut_out")
LEVELS = ("x86-64-v3", "x86-64-v4")

over_dtypes = over("dtype", ALL_DTYPES)
over_layouts = pytest.mark.parametrize("layout", LAYOUTS)


class Problem:
    """Arrays of one shape and dtype, and a layer's numbers."""

    def __init__(self, rng, shape, dtype):
        channels = shape[1]
        self.x, self.residual, self.dy = (
            (rng.normal(center, 2, shape)).astype(dtype) for center in (3, 0, 0.3)
        )
        self.weight, self.bias = rng.normal(size=(2, channels))
        self.mean, self.var = rng.normal(3, 1, channels), rng.uniform(1, 3, channels)

    def infer(self, backend, lay=lambda a: a, **options):
        """Return y, and dx, of inference."""
        x, residual, dy = (lay(a) for a in (self.x, self.residual, self.dy))
        y = F.batch_norm(
            x, self.mean, self.var, self.weight, self.bias,
            residual=residual, activation="relu", backend=backend, **options,
        )  # fmt: skip
        gradients = F.batch_norm_backward(
            dy, x, self.weight, self.mean, 1 / np.sqrt(self.var),
            training=False, activation="relu", y=y, backend=backend,
        )  # fmt: skip
        return {"y": y, "dx": gradients.dx}

    def train(self, backend, lay=lambda a: a):
        """Return everything that a step of training leaves."""
        layer = bnfast.BatchNorm2d(
            len(self.weight), dtype=np.float64, activation="relu", backend=backend
        )
        layer.weight, layer.bias = self.weight, self.bias
        y = layer(lay(self.x), lay(self.residual))
        dx = layer.backward(lay(self.dy))
        names = ("running_mean", "running_var", "grad_weight", "grad_bias", "grad_residual")
        return {"y": y, "dx": dx} | {name: getattr(layer, name) for name in names}


@over_backends
@over_dtypes
@over_layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_number_of_threads(rng, shape, layout, dtype, backend):
    problem, lay = Problem(rng, shape, dtype), permuted(LAYOUTS[layout])
    with bnfast.use_num_threads(1):
        one = problem.train(backend, lay), problem.infer(backend, lay)
    for threads in (2, 3, 7):
        with bnfast.use_num_threads(threads):
            other = problem.train(backend, lay), problem.infer(backend, lay)
        for alone, many in zip(one, other, strict=True):
            assert_same_outputs(f"{threads} threads", many, alone)


@over_backends
@over_dtypes
@over_layouts
@pytest.mark.parametrize("training", [True, False])
def test_in_or_out_of_place_and_wherever_arrays_lie(rng, training, layout, dtype, backend):
    problem, lay = Problem(rng, (3, 19, 11, 13), dtype), permuted(LAYOUTS[layout])

    def call(move, out):
        mean, var = problem.mean.copy(), problem.var.copy()
        x, residual = move(lay(problem.x)), move(lay(problem.residual))
        target = {"new": None, "x": x, "residual": residual}[out]
        y = F.batch_norm(
            x, mean, var, problem.weight, problem.bias, training,
            residual=residual, out=target, backend=backend,
        )  # fmt: skip
        return {"y": y, "mean": mean, "var": var}

    expected = call(lambda a: a, "new")
    for by in (0, 1, 3, 8):
        for out in ("new", "x", "residual"):
            found = call(lambda a, by=by: moved(a, by), out)
            assert_same_outputs(f"moved by {by} elements, into {out}", found, expected)


def moved(array, elements):
    """Return a copy that begins so many elements behind the beginning of a page."""
    order = np.argsort(array.strides, kind="stable")[::-1]
    memory = np.empty(array.nbytes + 8192, np.uint8)
    start = -memory.ctypes.data % 4096 + elements * array.itemsize
    flat = memory[start : start + array.nbytes].view(array.dtype)
    copy = flat.reshape([array.shape[axis] for axis in order]).transpose(np.argsort(order))
    copy[...] = array
    return copy


@over_backends
@over_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inference_in_every_layout(rng, shape, dtype, backend):
    problem = Problem(rng, shape, dtype)
    expected = problem.infer(backend)
    for name in EVERY_WAY:
        assert_same_outputs(name, problem.infer(backend, WRITABLE[name]), expected)


@over_dtypes
@over_layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inference_on_cython_and_numba(rng, shape, layout, dtype):
    both_round_alike()
    problem, lay = Problem(rng, shape, dtype), permuted(LAYOUTS[layout])
    assert_same_outputs("numba", problem.infer("numba", lay), problem.infer("cython", lay))


def both_round_alike():
    """Skip where one of the two compiled backends has fused multiply-add, and the other not."""
    if not {"cython", "numba"} <= set(AVAILABLE):
        pytest.skip("cython and numba are not both here")
    from bnfast.backends.numba_kernels.lanes import cpu_features

    cython = registry.load("cython").instruction_set() != "baseline"
    if cython != ("+fma" in cpu_features()):
        pytest.skip("one of cython and numba has fused multiply-add here, the other has not")


@over_backends
@over_dtypes
@over_layouts
def test_a_sample_alone_as_in_any_batch(rng, layout, dtype, backend):
    """Whatever the others are: large, small, NaN; however many; in whatever order."""
    problem, lay = Problem(rng, (9, 6, 15, 17), dtype), permuted(LAYOUTS[layout])

    def infer(x, residual):
        return F.batch_norm(
            lay(x), problem.mean, problem.var, problem.weight, problem.bias,
            residual=lay(residual), activation="relu", backend=backend,
        )  # fmt: skip

    whole = infer(problem.x, problem.residual)
    order = rng.permutation(9)
    shuffled = infer(problem.x[order], problem.residual[order])
    assert_same_bits("in another order", shuffled, whole[order])
    for n in (0, 4, 8):
        alone = infer(problem.x[n : n + 1], problem.residual[n : n + 1])
        assert_same_bits("alone", alone, whole[n : n + 1])
        others = np.full((40, *problem.x.shape[1:]), np.nan).astype(dtype)
        others[n], residual = problem.x[n], np.resize(problem.residual, others.shape)
        residual[n] = problem.residual[n]
        assert_same_bits("among NaN", infer(others, residual)[n], whole[n])


@pytest.fixture
def on_level():
    """Return a function that computes something on a level of x86-64, with Cython."""
    if "cython" not in AVAILABLE:
        pytest.skip(str(bnfast.list_backends()["cython"].reason))
    kernels = registry.load("cython")
    highest = kernels.instruction_set()
    if highest != LEVELS[-1]:
        pytest.skip(f"this CPU has {highest} at most")

    def compute(level, call):
        kernels.limit_instruction_set(level)
        return call()

    yield compute
    kernels.limit_instruction_set(highest)


@over_dtypes
@over_layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inference_with_avx2_and_avx512(rng, on_level, shape, layout, dtype):
    problem, lay = Problem(rng, shape, dtype), permuted(LAYOUTS[layout])
    one, other = (on_level(level, lambda: problem.infer("cython", lay)) for level in LEVELS)
    assert_same_outputs("AVX-512 against AVX2", other, one)


@over_dtypes
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] > 1], ids=str)
def test_training_in_channels_last_with_avx2_and_avx512(rng, on_level, shape, dtype):
    problem, lay = Problem(rng, shape, dtype), permuted(LAYOUTS["channels-last"])
    one, other = (on_level(level, lambda: problem.train("cython", lay)) for level in LEVELS)
    assert_same_outputs("AVX-512 against AVX2", other, one)


NUMBA_RESULTS = """
import os
import numpy as np
import bnfast, bnfast.functional as F
with np.load(os.environ["GIVEN"]) as file:
    given = dict(file)
made = {}
for dtype in (np.float32, np.float64):
    x, dy = (given[name].astype(dtype) for name in ("x", "dy"))
    last, dy_last = (np.moveaxis(np.moveaxis(a, 1, -1).copy(), -1, 1) for a in (x, dy))
    vectors = [given[name] for name in ("mean", "var", "weight", "bias")]
    made[f"inference {dtype.__name__}"] = F.batch_norm(x, *vectors, backend="numba")
    y, mean, invstd = F.batch_norm_with_stats(last, *vectors[2:], backend="numba")
    gradients = F.batch_norm_backward(dy_last, last, vectors[2], mean, invstd, backend="numba")
    for i, array in enumerate((y, mean, invstd, *gradients[:3])):
        made[f"training {dtype.__name__} {i}"] = array
np.savez(os.environ["MADE"], **made)
print(bnfast.show_config("dict")["backends"]["numba"]["instruction_set"])
"""
AVX2 = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+sse4.2,+avx,+avx2,+fma,+bmi,+bmi2,+f16c,+popcnt,+lzcnt",
}


@pytest.mark.slow
def test_numba_compiled_for_avx2_and_for_avx512(rng, tmp_path):
    """Inference in NCHW, whose statistics are given, and training in channels-last."""
    if "numba" not in AVAILABLE or registry.load("numba").instruction_set() != "avx512f":
        pytest.skip("Numba does not compile for AVX-512 here")
    problem, files = Problem(rng, (3, 37, 20, 21), np.float32), {}
    names = ("x", "dy", "mean", "var", "weight", "bias")
    np.savez(tmp_path / "given.npz", **{name: getattr(problem, name) for name in names})
    for level, environment in (("avx512f", {}), ("avx2", AVX2)):
        paths = {"GIVEN": str(tmp_path / "given.npz"), "MADE": str(tmp_path / f"{level}.npz")}
        assert output_of(NUMBA_RESULTS, **environment, **paths) == level
        with np.load(paths["MADE"]) as file:
            files[level] = dict(file)
    assert_same_outputs("AVX-512 against AVX2", files["avx512f"], files["avx2"])


@over("dtype", tuple(dtype for dtype in ALL_DTYPES if dtype is not np.float64))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_in_float32_hardly_ever_shows_the_order_of_sums(rng, shape, dtype):
    """Statistics differ in the last places of float64: 1 in some 10^8 float32 factors shows it."""
    both_round_alike()
    problem = Problem(rng, shape, dtype)
    expected = problem.train("cython")
    for backend in ("cython", "numba"):
        for layout, axes in LAYOUTS.items():
            found = problem.train(backend, permuted(axes))
            for name in ("y", "dx", "grad_residual"):
                differ = (found[name] != expected[name]).any(axis=(0, 2, 3)).sum()
                assert differ <= 1, f"{name} of {differ} channels differs: {backend}, {layout}"


@over_dtypes
@over_layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_on_numpy_in_every_layout(rng, shape, layout, dtype):
    problem = Problem(rng, shape, dtype)
    lay = permuted(LAYOUTS[layout])
    assert_same_outputs(layout, problem.train("numpy", lay), problem.train("numpy"))
