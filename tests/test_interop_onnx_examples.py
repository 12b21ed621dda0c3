"""The examples about ONNX, run as a reader would, and the real models that they take."""

from __future__ import annotations

# ruff: noqa: E402  (what follows needs onnx)
import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
if importlib.util.find_spec("rapidocr_onnxruntime") is None:
    pytest.skip("rapidocr-onnxruntime is not installed", allow_module_level=True)

from bnfast.interop.onnx import ReferenceEvaluator

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


light_models = load_example("onnx_light_models")
text_direction = load_example("onnx_text_direction")


def run_main(module, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    module.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["onnx_light_models", "onnx_text_direction"])
def test_an_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 100


def test_fifty_images_of_text(monkeypatch, capsys, tmp_path):
    file = tmp_path / "picture.png"
    printed = run_main(text_direction, monkeypatch, capsys, "--picture", str(file))
    rows = np.array(re.findall(r"^ *\d+ +[ny] +(\S+) +(\S+) +(\S+)$", printed, re.MULTILINE), float)
    assert len(rows) == 50
    found = dict(re.findall(r"^(onnx|bnfast): off by (\S+) at most", printed, re.MULTILINE))
    often = dict(re.findall(r"^(onnx|bnfast): .* by 0.01 or more on (\d+)$", printed, re.MULTILINE))
    assert float(found["bnfast"]) <= 1e-5
    assert float(found["onnx"]) > 0.1
    assert int(often["bnfast"]) == 0
    assert int(often["onnx"]) == (np.abs(rows[:, 0] - rows[:, 2]) >= 0.01).sum() > 25
    rotated = np.arange(50) % 2 == 1
    assert ((rows[:, 1] > 0.5) == rotated).sum() >= 35  # it is a classifier, not noise
    with Image.open(file) as image:
        assert image.size[1] > 50 * text_direction.HEIGHT


FUSED = {
    "resnet50": {"BatchNormalization+Relu": 33, "BatchNormalization+Sum+Relu": 16},
    "shufflenet": {"BatchNormalization+Relu": 17, "BatchNormalization+Sum+Relu": 13},
}


@pytest.mark.parametrize("name", light_models.RTOL)
def test_a_light_model_has_the_outputs_that_onnx_expects(name):
    """With what lies between, as the weights are such that the last Softmax hides most of it."""
    model, inputs, expected = light_models.load(name)
    evaluator = ReferenceEvaluator(model)
    results = evaluator.run(None, inputs, intermediate=True)
    tolerance = {"rtol": light_models.RTOL[name], "atol": light_models.ATOL}
    np.testing.assert_allclose(results[model.graph.output[0].name], expected, **tolerance)
    fused = Counter(node.op_type for node in evaluator.rt_nodes_ if "+" in node.op_type)
    assert fused == FUSED.get(name, {})
    np.testing.assert_allclose(evaluator.run(None, inputs)[0], expected, **tolerance)
    nodes = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    assert (
        len(nodes)
        == {"resnet50": 53, "densenet121": 121, "inception_v2": 69, "shufflenet": 49}[name]
    )
    for node in nodes:
        arrays = dict(
            zip(("x", "scale", "bias", "mean", "var"), map(results.get, node.input), strict=True)
        )
        epsilon = [attribute.f for attribute in node.attribute if attribute.name == "epsilon"]
        exact = formula(arrays, float(np.float32(epsilon[0] if epsilon else 1e-5)))
        found = results[node.output[0]]
        scale = np.abs(exact).max() + np.abs(arrays["bias"]).max()
        assert np.abs(found - exact).max() <= 4 * 2.0**-23 * scale, node.name


def formula(arrays, epsilon):
    x, scale, bias, mean, var = (
        arrays[name].astype(np.float64).reshape((-1, 1, 1) if name != "x" else arrays["x"].shape)
        for name in ("x", "scale", "bias", "mean", "var")
    )
    return (x - mean) / np.sqrt(var + epsilon) * scale + bias


def test_the_light_models_example(monkeypatch, capsys):
    printed = run_main(light_models, monkeypatch, capsys, "shufflenet", "--nodes", "--repeat", "1")
    assert "shufflenet: as expected; 49 batch norms take" in printed
    assert re.search(r"^n1 +1x24x112x112 +float32 +1 +\d", printed, re.MULTILINE)
    assert re.search(r"^geometric mean: \d+\.\d times$", printed, re.MULTILINE)


def test_the_light_models_example_knows_its_models(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["onnx_light_models", "resnet"])
    with pytest.raises(SystemExit, match="2"):
        light_models.main()
    assert "unknown: resnet; there are resnet50, densenet121" in capsys.readouterr().err
