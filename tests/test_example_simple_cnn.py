"""docs/examples/simple_cnn.py: the tutorial's numbers on every backend, and a right gradient.

The program's own functions are called, on each backend that can run here. What they are held
against is written here a second time, in float64 and in another way: convolution as a sum over
nine shifts, pooling as a maximum over axes, the gradient by finite differences.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import bnfast
from bnfast import registry

PROGRAM = Path(__file__).parents[1] / "docs" / "examples" / "simple_cnn.py"
_specification = importlib.util.spec_from_file_location("simple_cnn", PROGRAM)
assert _specification is not None
assert _specification.loader is not None
simple_cnn = importlib.util.module_from_spec(_specification)
_specification.loader.exec_module(simple_cnn)

# The simulator of the CUDA kernels would take hours.
AVAILABLE = [
    name
    for name, backend in bnfast.list_backends().items()
    if backend.available and registry.load(name).instruction_set() != "simulator"
]

BATCH_NORMS = {
    "plain": simple_cnn.PlainBatchNorm2d,
    **{name: simple_cnn.bnfast_batch_norm(name) for name in AVAILABLE},
}


@pytest.fixture(params=BATCH_NORMS)
def batch_norm(request: pytest.FixtureRequest) -> Any:
    return BATCH_NORMS[request.param]


def test_expected_numbers_are_the_tutorials() -> None:
    counts = {name: len(values) for name, values in simple_cnn.STATISTICS.items()}
    assert counts == {
        "bn1.running_mean": 16,
        "bn1.running_var": 16,
        "bn2.running_mean": 32,
        "bn2.running_var": 32,
    }
    assert simple_cnn.LOSS == 2.573317


def test_one_step_gives_the_tutorials_numbers(batch_norm: Any) -> None:
    network, images, labels = simple_cnn.tutorial(batch_norm)
    loss = network.train_step(images, labels)
    assert loss == pytest.approx(2.573317, abs=1e-5)
    assert simple_cnn.equal_digits(network) == 96


def test_a_changed_statistic_is_noticed(rng: np.random.Generator) -> None:
    network, images, labels = simple_cnn.tutorial(simple_cnn.PlainBatchNorm2d)
    network.train_step(images, labels)
    network.bn2.running_mean[rng.integers(32)] += 1e-4
    assert simple_cnn.equal_digits(network) == 95


def test_eval_mode_equals_float64(batch_norm: Any) -> None:
    network, images, labels = simple_cnn.tutorial(batch_norm)
    for _ in range(3):
        network.train_step(images, labels)
    network.train(False)
    expected = logits_in_float64(network, images)
    # Measured over four seeds: 2.6e-7 of the largest logit.
    atol = 2e-6 * np.abs(expected).max()
    np.testing.assert_allclose(network(images), expected, rtol=0, atol=atol)


def logits_in_float64(network: Any, images: NDArray[Any]) -> NDArray[np.float64]:
    x = images.astype(np.float64)
    for conv, bn in ((network.conv1, network.bn1), (network.conv2, network.bn2)):
        n, _, height, width = x.shape
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        y = np.zeros((n, len(conv.bias), height, width))
        for row, column in np.ndindex(3, 3):
            shifted = padded[:, :, row : row + height, column : column + width]
            y += np.einsum("oc,nchw->nohw", conv.weight[:, :, row, column].astype(float), shifted)
        y = np.moveaxis(y, 1, -1) + conv.bias
        y = (y - bn.running_mean) / np.sqrt(bn.running_var.astype(float) + 1e-5)
        y = np.maximum(y * bn.weight + bn.bias, 0)
        x = np.moveaxis(y, -1, 1).reshape(n, -1, height // 2, 2, width // 2, 2).max((3, 5))
    return np.asarray(x.reshape(len(x), -1) @ network.fc.weight.T.astype(float) + network.fc.bias)


def test_gradient_equals_finite_differences(batch_norm: Any, rng: np.random.Generator) -> None:
    draws = simple_cnn.Draws(int(rng.integers(2**32)))
    network = simple_cnn.SimpleCNN(draws, batch_norm, (2, 3, 4), 8, 5, np.float64)
    for layer in (network.bn1, network.bn2):
        layer.weight[...] = rng.uniform(0.5, 1.5, layer.weight.shape)
        layer.bias[...] = rng.normal(size=layer.bias.shape)
    images, labels = rng.normal(size=(4, 2, 8, 8)), rng.integers(5, size=4)

    def loss() -> float:
        return float(simple_cnn.cross_entropy(network(images), labels)[0])

    def branches() -> bytes:
        """Which way every maximum and every ReLU went: a kink lies where this changes."""
        choices = (
            network.pool1.winner,
            network.pool2.winner,
            network.conv2.x > 0,
            network.fc.x > 0,
        )
        return b"".join(choice.tobytes() for choice in choices)

    network.backward(simple_cnn.cross_entropy(network(images), labels)[1])
    here = branches()
    step = 1e-5
    checked = dict.fromkeys(("conv1", "bn1", "conv2", "bn2", "fc"), 0)
    for name in checked:
        layer = getattr(network, name)
        for parameter, gradient in (
            (layer.weight, layer.grad_weight),
            (layer.bias, layer.grad_bias),
        ):
            for _ in range(4):
                entry = np.unravel_index(rng.integers(parameter.size), parameter.shape)
                value, losses, crossed = parameter[entry], [], False
                for sign in (1, -1):
                    parameter[entry] = value + sign * step
                    losses.append(loss())
                    crossed |= branches() != here
                parameter[entry] = value
                if not crossed:
                    slope = (losses[0] - losses[1]) / (2 * step)
                    assert gradient[entry] == pytest.approx(slope, rel=1e-6, abs=1e-8)
                    checked[name] += 1
    assert min(checked.values()) >= 4, f"too many entries next to a kink: {checked}"


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(bnfast.__file__).parents[1]),
            "NUMBA_ENABLE_CUDASIM": "0",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_program_trains_and_compares() -> None:
    run = run_program("--backend", "numpy", "--steps", "2")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "training on numpy: loss 2.573317 in step 1" in run.stdout
    assert "step 2 of 2" in run.stderr
    rows = {line[:12].strip(): line for line in run.stdout.splitlines() if "96 of 96" in line}
    assert list(rows) == ["plain NumPy", *AVAILABLE]
    assert all("2.573317" in row for row in rows.values())


def test_program_names_the_backends_that_are_known() -> None:
    run = run_program("--backend", "numppy")
    assert run.returncode == 2
    assert "numppy" in run.stderr
    assert all(name in run.stderr for name in bnfast.list_backends())
    assert "Traceback" not in run.stderr


def test_program_refuses_zero_steps() -> None:
    run = run_program("--steps", "0")
    assert run.returncode == 2
    assert "--steps must be at least 1" in run.stderr


@pytest.mark.parametrize("fault", ["statistic", "training", "eval"])
def test_program_fails_when_a_number_is_wrong(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Faulty(simple_cnn.PlainBatchNorm2d):  # type: ignore[misc, name-defined]
        def __call__(self, x: NDArray[Any]) -> Any:
            y = super().__call__(x)
            if fault == "statistic":
                self.running_mean[0] += 1e-4
            elif self.training == (fault == "training"):
                y = y * np.float32(1.001)
            return y

    numpy_alone = {"numpy": bnfast.list_backends()["numpy"]}
    monkeypatch.setattr(bnfast, "list_backends", lambda: numpy_alone)
    assert simple_cnn.main(["--backend", "numpy", "--steps", "1"]) == 0
    assert "Every row is right." in capsys.readouterr().out
    monkeypatch.setattr(simple_cnn, "bnfast_batch_norm", lambda name: Faulty)
    assert simple_cnn.main(["--backend", "numpy", "--steps", "1"]) == 1
    assert "WRONG: numpy." in capsys.readouterr().out
