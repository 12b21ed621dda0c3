"""BNFAST_ISA: what each value makes of the Cython backend, in a process of its own."""

from __future__ import annotations

import decimal

import numpy as np
import pytest
from fresh_python import error_of, output_of, run

import bnfast
from bnfast.testing import reference
from bnfast.testing.bounds import assert_output
from bnfast.testing.cases import draw
from bnfast.testing.reference import rows, wide

pytestmark = pytest.mark.skipif(
    not bnfast.list_backends()["cython"].available,
    reason=str(bnfast.list_backends()["cython"].reason),
)

LEVELS = ("baseline", "x86-64-v3", "x86-64-v4")
IN_USE = """
from bnfast import registry
print(registry.load("cython").instruction_set())
"""
LAYER = """
import os
import numpy as np
import bnfast
with np.load(os.environ["GIVEN"]) as file:
    given = dict(file)
x = given["x"].transpose(given["axes"])
layer = bnfast.BatchNorm2d(x.shape[1], dtype=np.float64, backend="cython")
state = {name: given[name] for name in ("weight", "bias", "running_mean", "running_var")}
layer.load_state_dict(state)
np.savez(os.environ["MADE"], eval=layer.eval()(x), train=layer.train()(x))
print(bnfast.show_config("dict")["backends"]["cython"]["instruction_set"])
"""


@pytest.fixture(scope="module")
def highest():
    """Return the highest instruction set of this CPU, which no variable limits."""
    return output_of(IN_USE)


def test_unknown_name_is_a_line_of_the_report():
    finished = run("-m", "bnfast", BNFAST_ISA="foo")
    assert (finished.returncode, finished.stderr) == (0, "")
    told = " ".join(finished.stdout.split())
    reason = f"the environment variable BNFAST_ISA: expected one of {', '.join(LEVELS)}, got 'foo'"
    assert f"cython no: {reason}" in told
    assert "in use cython" not in told


def test_unknown_name_refuses_the_backend_that_is_named():
    error = error_of("import bnfast; bnfast.BatchNorm2d(3, backend='cython')", BNFAST_ISA="foo")
    raised = error[error.index("bnfast.errors.BackendUnavailableError: ") :]
    assert "(asked for by the argument backend=) cannot run here" in raised
    assert "cython: the environment variable BNFAST_ISA: expected one of" in raised


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 3, 1, 2)], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", LEVELS[:2])
def test_a_layer_on_a_lower_instruction_set(rng, tmp_path, highest, name, dtype, axes):
    if LEVELS.index(name) > LEVELS.index(highest):
        pytest.skip(f"this CPU has {highest} at most")
    inputs = draw(rng, (3, 8, 1025), dtype).replace(residual=None)
    x = inputs.x.reshape(3, 8, 25, 41)
    given, made = tmp_path / "given.npz", tmp_path / "made.npz"
    np.savez(
        given,
        x=x.transpose(np.argsort(axes)),
        axes=axes,
        weight=inputs.weight,
        bias=inputs.bias,
        running_mean=inputs.mean,
        running_var=inputs.var,
    )
    assert output_of(LAYER, BNFAST_ISA=name, GIVEN=str(given), MADE=str(made)) == name
    with decimal.localcontext(reference.DECIMAL_CONTEXT):
        in_rows = wide(rows(x))
        batch = reference.moments(in_rows)
        statistics = {
            "eval": (wide(inputs.mean), wide(inputs.var)),
            "train": (batch.mean, batch.m2 / in_rows.shape[1]),
        }
        for mode, (mean, var) in statistics.items():
            xhat = reference.standardize(in_rows, mean, var, inputs.eps)
            weight, bias = wide(inputs.weight), wide(inputs.bias)
            exact = reference.affine(xhat, weight, bias, None, relu=False)
            deviations = mean / np.sqrt(var + wide(inputs.eps))
            with np.load(made) as results:
                y = results[mode]
            assert y.dtype == dtype
            assert_output(y, exact, xhat, inputs, deviations, fma=name != "baseline")
