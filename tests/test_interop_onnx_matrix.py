"""ONNX's BatchNormalization: opset x rank x types x mode x outputs, more than a thousand models.

Each model runs in the drop-in evaluator and in onnx's own with ``new_ops``. All outputs are held
against the text of the standard in float64, and inference against onnxruntime where that takes the
model. Which models it takes is written down, so that none is left out unnoticed.
"""

from __future__ import annotations

# ruff: noqa: E402  (what follows needs onnx)
import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import onnx_models
from onnx.reference import ReferenceEvaluator as Stock
from onnx_models import Case, same_bits, standard, tolerance
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidGraph
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NotImplemented_

from bnfast.interop.onnx import BatchNormalization, ReferenceEvaluator

MATRIX = onnx_models.matrix()


def test_the_matrix_is_large_and_onnxruntime_takes_part_of_it():
    assert len(MATRIX) >= 300
    assert len({case.opset for case in MATRIX}) == 10
    assert sum(map(onnx_models.onnxruntime_takes, MATRIX)) >= 200


@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_outputs_are_those_of_the_standard_and_of_onnxruntime(case: Case, rng) -> None:
    model, arrays = case.model(), case.arrays(rng)
    names = [name for name in case.outputs if name]
    found = dict(zip(names, ReferenceEvaluator(model).run(None, arrays), strict=True))
    with_new_ops = Stock(model, new_ops=[BatchNormalization]).run(None, arrays)
    expected = standard(case, arrays)
    kind = case.statistics if case.opset >= 14 else case.x
    for name, other in zip(names, with_new_ops, strict=True):
        array = found[name]
        assert same_bits(array, other)
        dtype = onnx_models.dtype_of(case.x if name == "y" else kind)
        assert array.dtype == dtype, name
        assert array.shape == expected[name].shape, name
        error = np.abs(array.astype(np.float64) - expected[name])
        assert (error <= tolerance(expected[name], dtype, largest(name, arrays, expected))).all(), (
            name
        )
    if onnx_models.onnxruntime_takes(case):
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        (theirs,) = session.run(None, arrays)
        size = largest("y", arrays, expected)
        # It folds the layer into a * x + b, and in float16 rounds more than once.
        step = {"f16": 2.0**-10, "f32": 2.0**-21, "f64": 2.0**-50}[case.x]
        assert theirs.dtype == found["y"].dtype
        assert (
            np.abs(theirs.astype(np.float64) - found["y"].astype(np.float64)).max()
            <= 4 * step * size
        )
    elif not case.training:
        with pytest.raises((NotImplemented_, InvalidGraph)):
            onnxruntime.InferenceSession(
                model.SerializeToString(), providers=["CPUExecutionProvider"]
            )


def largest(name: str, arrays, expected) -> float:
    """Return the largest number that an output is made from."""
    x, bias = arrays["x"].astype(np.float64), arrays["bias"].astype(np.float64)
    if name == "y":
        return 2 * np.abs(expected["y"]).max() + np.abs(bias).max()
    return np.square(x).max() if name.endswith("var") else np.abs(x).max()
