"""ONNX's light models that have batch norm: right results, and where the time of batch norm goes.

ResNet-50, DenseNet-121, Inception v2 and ShuffleNet of opset 9 come with the package onnx, with the
outputs that ONNX's test suite expects. Their weights are constants made by nodes, to be small.

    pip install bnfast[onnx]
    python onnx_light_models.py                       # all four: about a minute
    python onnx_light_models.py shufflenet --nodes    # one, with a row for each node
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
from onnx import numpy_helper

from bnfast.interop.onnx import ReferenceEvaluator, profile

FOLDER = Path(onnx.backend.test.__file__).parent / "data" / "light"
RTOL = {"resnet50": 1e-3, "densenet121": 2e-3, "inception_v2": 1e-3, "shufflenet": 1e-3}
ATOL = 1e-7
"""The tolerances of ONNX's test suite."""


def load(name: str) -> tuple[onnx.ModelProto, dict[str, np.ndarray], np.ndarray]:
    """Return a model, the input that the suite feeds it with, and the output that it expects."""
    model = onnx.load(FOLDER / f"light_{name}.onnx")
    known = {tensor.name for tensor in model.graph.initializer}
    (given,) = [value for value in model.graph.input if value.name not in known]
    shape = [dimension.dim_value for dimension in given.type.tensor_type.shape.dim]
    size = int(np.prod(shape))
    x = (np.arange(size) / size).astype(np.float32).reshape(shape)
    expected = numpy_helper.to_array(onnx.load_tensor(FOLDER / f"light_{name}_output_0.pb"))
    return model, {given.name: x}, expected


def main() -> None:
    """Run the models, compare and time."""
    parser = argparse.ArgumentParser(description="ONNX's light models with batch norm.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(RTOL))
    parser.add_argument("--nodes", action="store_true", help="print a row for each batch norm")
    parser.add_argument("--repeat", type=int, default=5, help="how often each node is timed")
    options = parser.parse_args()
    if unknown := sorted(set(options.models) - set(RTOL)):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(RTOL)}")
    gains = []
    for name in options.models or RTOL:
        model, inputs, expected = load(name)
        (found,) = ReferenceEvaluator(model).run(None, inputs)
        np.testing.assert_allclose(found, expected, rtol=RTOL[name], atol=ATOL)
        report = profile(model, inputs, repeat=options.repeat)
        if options.nodes:
            print(report)
        gains.append(report.stock / report.bnfast)
        print(
            f"{name}: as expected; {len(report.rows)} batch norms take {report.stock * 1e3:.2f} ms "
            f"in onnx's operator, {report.bnfast * 1e3:.2f} ms in bnfast's: {gains[-1]:.1f} times"
        )
    print(f"geometric mean: {statistics.geometric_mean(gains):.1f} times")


if __name__ == "__main__":
    main()
