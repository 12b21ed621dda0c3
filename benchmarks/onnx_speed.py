"""Time inside batch norm in ONNX's reference evaluator: onnx's operator against bnfast's.

    python benchmarks/onnx_speed.py [--repeat 15] [MODEL ...]

On ONNX's light models and on the classifier of docs/examples/onnx_text_direction.py, node by node,
on the arrays that each has in a run, both operators in turns; the medians count. Needs onnx,
onnxruntime, Pillow and rapidocr-onnxruntime.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "examples"))

import onnx_light_models
import onnx_text_direction

from bnfast.interop.onnx import profile

CLASSIFIER = "text direction"


def models(names: list[str]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield each model's name, the model, and an input."""
    for name in onnx_light_models.RTOL:
        if not names or name in names:
            yield name, *onnx_light_models.load(name)[:2]
    if not names or CLASSIFIER in names:
        image = onnx_text_direction.draw(np.random.default_rng(0), rotated=False)
        x = onnx_text_direction.as_input(image)
        yield CLASSIFIER, onnx_text_direction.model_file(), {"x": x}


def main() -> None:
    """Print a row for each model, and the geometric mean."""
    parser = argparse.ArgumentParser(description="onnx's batch norm against bnfast's.")
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--repeat", type=int, default=15)
    options = parser.parse_args()
    gains = []
    print("| model | batch norms | onnx, ms | bnfast, ms | times faster | slowest, fastest node |")
    print("|---|---|---|---|---|---|")
    for name, model, inputs in models(options.models):
        report = profile(model, inputs, repeat=options.repeat, progress=False)
        nodes = [row.speedup for row in report.rows if row.speedup is not None]
        gains.append(report.stock / report.bnfast)
        print(
            f"| {name} | {len(nodes)} | {report.stock * 1e3:.2f} | {report.bnfast * 1e3:.2f} "
            f"| {gains[-1]:.1f} | {min(nodes):.1f}, {max(nodes):.1f} |"
        )
    print(f"\ngeometric mean over the models: {statistics.geometric_mean(gains):.1f}")


if __name__ == "__main__":
    main()
