"""docs/examples/simple_cnn.py beside the same program in torch: its draws and its losses."""

from __future__ import annotations

import numpy as np
import pytest
from test_example_simple_cnn import BATCH_NORMS, simple_cnn

torch = pytest.importorskip("torch", reason="torch is an optional peer; CI installs it")

STEPS = 10


@pytest.mark.parametrize("seed", [0, None], ids=["seed0", "fresh_seed"])
def test_draws_are_torchs(seed: int | None, rng: np.random.Generator) -> None:
    if seed is None:
        seed = int(rng.integers(2**32))
    torch.manual_seed(seed)
    draws = simple_cnn.Draws(seed)

    # torch takes its own vectorised log, cos and sin: measured 4.8e-7 apart, at values up to 4.5.
    normal = torch.randn(16, 3, 32, 32).numpy()
    np.testing.assert_allclose(draws.normal(16, 3, 32, 32), normal, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(draws.integers(10, 16), torch.randint(0, 10, (16,)).numpy())
    np.testing.assert_array_equal(draws.uniform(100), torch.rand(100).numpy())
    conv = torch.nn.Conv2d(3, 16, 3)
    fc = torch.nn.Linear(2048, 10)
    for theirs, fan_in in ((conv.weight, 27), (conv.bias, 27), (fc.weight, 2048), (fc.bias, 2048)):
        ours = draws.parameter(*theirs.shape, fan_in=fan_in)
        np.testing.assert_array_max_ulp(ours, theirs.detach().numpy(), maxulp=1)


@pytest.fixture(scope="module")
def torch_losses() -> list[float]:
    """The losses of the tutorial's own program, continued to `STEPS` steps and one more loss."""
    torch.manual_seed(simple_cnn.SEED)
    images = torch.randn(16, 3, 32, 32)
    labels = torch.randint(0, 10, (16,))
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1),
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(16, 32, 3, padding=1),
        torch.nn.BatchNorm2d(32),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(2048, 10),
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(STEPS + 1):
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_losses_follow_torch(name: str, torch_losses: list[float]) -> None:
    network, images, labels = simple_cnn.tutorial(BATCH_NORMS[name])
    losses = [network.train_step(images, labels) for _ in range(STEPS + 1)]
    # Measured: 1.3e-5 at most, as far as torch in float32 lies from torch in float64 (1.1e-5).
    np.testing.assert_allclose(losses, torch_losses, rtol=1e-4)
