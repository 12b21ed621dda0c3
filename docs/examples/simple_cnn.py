"""Train a small image classifier in NumPy, with batch normalisation by bnfast, and check it.

The network is the SimpleCNN of a torch tutorial::

    images (16, 3, 32, 32)
      -> conv1 3x3, 16 channels -> bn1 + ReLU -> 2x2 max-pooling -> (16, 16, 16, 16)
      -> conv2 3x3, 32 channels -> bn2 + ReLU -> 2x2 max-pooling -> (16, 32, 8, 8)
      -> fc 2048 -> 10 -> cross-entropy

The tutorial prints its first loss and, after one step of SGD, the 96 running statistics of bn1 and
bn2. `simple_cnn_expected.json` holds these numbers. `Draws` makes the tutorial's random images,
labels and weights without torch, so every backend of bnfast must print the same numbers here: the
program ends in a table of them, with the time of the batch-norm layers, and exits with 1 if one is
wrong. Every layer has the shape of bnfast's: ``y = layer(x)``, then ``dx = layer.backward(dy)``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import DTypeLike, NDArray

import bnfast

Array: TypeAlias = NDArray[Any]
MakeBatchNorm: TypeAlias = Callable[..., Any]  # (num_features, *, dtype) -> batch norm, then ReLU

SEED = 0
EXPECTED = json.loads(Path(__file__).with_name("simple_cnn_expected.json").read_text())
LOSS = EXPECTED["loss"]
STATISTICS = {name: values for name, values in EXPECTED.items() if name != "loss"}
TOTAL = sum(map(len, STATISTICS.values()))


class Draws:
    """The random numbers of torch (CPU, float32) after ``torch.manual_seed(seed)``."""

    def __init__(self, seed: int) -> None:
        self.twister = np.random.RandomState(seed)  # seeds the MT19937 state exactly as torch does

    def words(self, count: int) -> NDArray[np.uint32]:
        return self.twister.randint(0, 2**32, count, dtype=np.uint32)

    def integers(self, high: int, count: int) -> Array:
        """``torch.randint(0, high, (count,))``."""
        return (self.words(count) % high).astype(np.int64)

    def uniform(self, count: int) -> Array:
        """``torch.rand(count)``: the low 24 bits of each word, as a fraction."""
        return (self.words(count) & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def normal(self, *shape: int) -> Array:
        """``torch.randn(shape)`` where 16 divides the size: Box-Muller in blocks of 8 + 8."""
        blocks = self.uniform(math.prod(shape)).reshape(-1, 2, 8)
        radius = np.sqrt(-2 * np.log(1 - blocks[:, 0]))
        angle = np.float32(2 * np.pi) * blocks[:, 1]
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(shape)

    def parameter(self, *shape: int, fan_in: int) -> Array:
        """Draw a weight or bias as torch does: uniform in +-1/sqrt(fan_in)."""
        symmetric = 2 * self.uniform(math.prod(shape)) - 1  # exact, so one rounding as in torch
        return (symmetric * np.float32(fan_in**-0.5)).reshape(shape)


class Affine:
    """A layer with a weight of `shape` and a bias, drawn in this order."""

    def __init__(self, draws: Draws, dtype: DTypeLike, *shape: int) -> None:
        fan_in = math.prod(shape[1:])
        self.weight = draws.parameter(*shape, fan_in=fan_in).astype(dtype)
        self.bias = draws.parameter(shape[0], fan_in=fan_in).astype(dtype)


class Conv2d(Affine):
    """3x3 convolution, stride 1, padding 1; weight (outputs, inputs, 3, 3)."""

    def __call__(self, x: Array) -> Array:
        self.x = x
        y = convolve(x, self.weight)
        y += self.bias[:, None, None]
        return y

    def backward(self, dy: Array) -> Array:
        n, outputs, height, width = dy.shape
        by_pixel = dy.reshape(n, outputs, height * width)
        products = np.tensordot(by_pixel, columns(self.x), ((0, 2), (0, 2)))
        self.grad_weight = products.reshape(self.weight.shape)
        self.grad_bias = dy.sum((0, 2, 3))
        return convolve(dy, self.weight[:, :, ::-1, ::-1].swapaxes(0, 1))


def columns(x: Array) -> Array:
    """(N, C, H, W) -> (N, 9 C, H W): under each pixel the 3x3 patch around it, zeros outside."""
    n, channels, height, width = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    patches = sliding_window_view(padded, (3, 3), axis=(2, 3))  # (N, C, H, W, 3, 3)
    return patches.transpose(0, 1, 4, 5, 2, 3).reshape(n, 9 * channels, height * width)


def convolve(x: Array, weight: Array) -> Array:
    n, _, height, width = x.shape
    y: Array = weight.reshape(len(weight), -1) @ columns(x)
    return y.reshape(n, -1, height, width)


class MaxPool2d:
    """The maximum of each 2x2 window. Of equal values the first gets the gradient, as in torch."""

    def __call__(self, x: Array) -> Array:
        n, channels, height, width = x.shape
        windows = x.reshape(n, channels, height // 2, 2, width // 2, 2).swapaxes(3, 4)
        flat = windows.reshape(n, channels, height // 2, width // 2, 4)
        self.winner = flat.argmax(-1)[..., None]
        return np.take_along_axis(flat, self.winner, -1)[..., 0]

    def backward(self, dy: Array) -> Array:
        n, channels, height, width = dy.shape
        flat = np.zeros((*dy.shape, 4), dy.dtype)
        np.put_along_axis(flat, self.winner, dy[..., None], -1)
        windows = flat.reshape(n, channels, height, width, 2, 2).swapaxes(3, 4)
        return windows.reshape(n, channels, 2 * height, 2 * width)


class Linear(Affine):
    """``x @ weight.T + bias`` on flattened samples; weight (outputs, inputs)."""

    def __call__(self, x: Array) -> Array:
        self.x = x
        y: Array = x.reshape(len(x), -1) @ self.weight.T + self.bias
        return y

    def backward(self, dy: Array) -> Array:
        self.grad_weight = dy.T @ self.x.reshape(len(dy), -1)
        self.grad_bias = dy.sum(0)
        dx: Array = dy @ self.weight
        return dx.reshape(self.x.shape)


class PlainBatchNorm2d:
    """Batch norm and ReLU as the formulas are written: what bnfast is compared with."""

    def __init__(self, num_features: int, *, dtype: DTypeLike) -> None:
        self.weight, self.running_var = np.ones((2, num_features), dtype)
        self.bias, self.running_mean = np.zeros((2, num_features), dtype)
        self.training = True

    def __call__(self, x: Array) -> Array:
        mean, var, count = self.running_mean, self.running_var, x[:, 0].size
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
            self.running_mean = 0.9 * self.running_mean + 0.1 * mean
            self.running_var = 0.9 * self.running_var + 0.1 * var * count / (count - 1)
        self.invstd = 1 / np.sqrt(var + 1e-5)
        self.xhat = (x - mean[:, None, None]) * self.invstd[:, None, None]
        y: Array = self.weight[:, None, None] * self.xhat + self.bias[:, None, None]
        self.y = np.maximum(y, 0)
        return self.y

    def backward(self, dy: Array) -> Array:
        g = dy * (self.y > 0)
        self.grad_weight, self.grad_bias = (g * self.xhat).sum((0, 2, 3)), g.sum((0, 2, 3))
        spread = self.grad_bias[:, None, None] + self.xhat * self.grad_weight[:, None, None]
        dx: Array = (self.weight * self.invstd)[:, None, None] * (g - spread / dy[:, 0].size)
        return dx

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def zero_grad(self) -> None:
        """Nothing to do: `backward` overwrites the gradients."""


def bnfast_batch_norm(backend: str | None) -> MakeBatchNorm:
    """Return a maker of bnfast's layer, ReLU included, on the named backend."""
    return functools.partial(bnfast.BatchNorm2d, activation="relu", backend=backend)


class SimpleCNN:
    """The network above. Other sizes and float64 serve its tests."""

    def __init__(
        self,
        draws: Draws,
        batch_norm: MakeBatchNorm,
        channels: tuple[int, int, int] = (3, 16, 32),
        side: int = 32,
        classes: int = 10,
        dtype: DTypeLike = np.float32,
    ) -> None:
        first, second, third = channels
        self.conv1 = Conv2d(draws, dtype, second, first, 3, 3)
        self.bn1 = batch_norm(second, dtype=dtype)
        self.pool1 = MaxPool2d()
        self.conv2 = Conv2d(draws, dtype, third, second, 3, 3)
        self.bn2 = batch_norm(third, dtype=dtype)
        self.pool2 = MaxPool2d()
        self.fc = Linear(draws, dtype, classes, third * (side // 4) ** 2)
        self.layers = [self.conv1, self.bn1, self.pool1, self.conv2, self.bn2, self.pool2, self.fc]
        self.velocity: dict[tuple[int, str], Array] = {}

    def __call__(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, dy: Array) -> None:
        self.bn1.zero_grad()
        self.bn2.zero_grad()
        for layer in reversed(self.layers):
            dy = layer.backward(dy)

    def train(self, mode: bool = True) -> None:
        self.bn1.train(mode)
        self.bn2.train(mode)

    def sgd_step(self, learning_rate: float = 0.01, momentum: float = 0.9) -> None:
        for position in (0, 1, 3, 4, 6):  # all but the pooling layers
            layer = self.layers[position]
            for name in ("weight", "bias"):
                velocity = momentum * self.velocity.get((position, name), 0)
                velocity += getattr(layer, f"grad_{name}")
                self.velocity[position, name] = velocity
                getattr(layer, name)[...] -= learning_rate * velocity

    def train_step(self, images: Array, labels: Array) -> float:
        """One step of SGD; return the loss before it."""
        loss, dlogits = cross_entropy(self(images), labels)
        self.backward(dlogits)
        self.sgd_step()
        return loss


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """Return the mean loss over the batch and its gradient."""
    shifted = logits - logits.max(1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    target = np.arange(len(labels)), labels
    gradient = np.exp(log_probabilities)
    gradient[target] -= 1
    return -float(log_probabilities[target].mean()), gradient / len(labels)


def tutorial(batch_norm: MakeBatchNorm) -> tuple[SimpleCNN, Array, Array]:
    """Return the tutorial's network, images and labels, drawn in its order."""
    draws = Draws(SEED)
    images = draws.normal(16, 3, 32, 32)
    labels = draws.integers(10, 16)
    return SimpleCNN(draws, batch_norm), images, labels


def equal_digits(network: SimpleCNN) -> int:
    """Count the running statistics that equal the tutorial's in every printed digit."""
    count = 0
    for name, printed in STATISTICS.items():
        layer, attribute = name.split(".")
        values = getattr(getattr(network, layer), attribute)
        count += sum(f"{a:.4f}" == f"{b:.4f}" for a, b in zip(values, printed, strict=True))
    return count


class Result:
    """What one step of the tutorial gives with one kind of batch norm."""

    def __init__(self, name: str, batch_norm: MakeBatchNorm) -> None:
        self.name = name
        self.network, images, labels = tutorial(batch_norm)
        self.loss = self.network.train_step(images, labels)
        self.digits = equal_digits(self.network)
        self.network.train(False)
        self.eval_loss, _ = cross_entropy(self.network(images), labels)
        self.seconds: list[float] = []

    def right(self, plain: Result) -> bool:
        """Tell whether this is the tutorial, and plain NumPy's eval mode within rounding."""
        same_eval = math.isclose(self.eval_loss, plain.eval_loss, rel_tol=1e-5)
        return abs(self.loss - LOSS) <= 1e-5 and self.digits == TOTAL and same_eval


def time_batch_norm(results: list[Result], repetitions: int = 21) -> None:
    """Time forward and backward of bn1 and bn2 on this network's tensors, taking turns."""
    network, images, _ = tutorial(PlainBatchNorm2d)
    x1 = network.conv1(images)
    x2 = network.conv2(network.pool1(network.bn1(x1)))
    dy1, dy2 = (Draws(SEED).normal(*x.shape) for x in (x1, x2))
    for _, result in itertools.product(range(repetitions), results):
        result.network.train()
        start = time.perf_counter()
        for layer, x, dy in ((result.network.bn1, x1, dy1), (result.network.bn2, x2, dy2)):
            layer(x)
            layer.backward(dy)
        result.seconds.append(time.perf_counter() - start)


def progress(text: str) -> None:
    print(f"\r{text:<78}", end="" if text else "\r", file=sys.stderr, flush=True)


def compare() -> bool:
    """Print a row for each available backend; return whether every row is right."""
    results = [Result("plain NumPy", PlainBatchNorm2d)]
    for name, backend in bnfast.list_backends().items():
        if backend.available:
            progress(f"one step on {name}")
            results.append(Result(name, bnfast_batch_norm(name)))
        else:
            print(f"{name} is not available: {backend.reason}")
    progress("timing the batch-norm layers")
    time_batch_norm(results)
    progress("")
    print(f"{'batch norm':<12}{'loss':<10}{'statistics':<12}{'eval loss':<11}forward + backward")
    plain_time = statistics.median(results[0].seconds)
    for result in results:
        median = statistics.median(result.seconds)
        print(
            f"{result.name:<12}{result.loss:<10.6f}{f'{result.digits} of {TOTAL}':<12}"
            f"{result.eval_loss:<10.6f} {1e3 * median:.3f} ms, {plain_time / median:.1f}x plain"
        )
    wrong = [result.name for result in results if not result.right(results[0])]
    print(f"WRONG: {', '.join(wrong)}." if wrong else "Every row is right.", end=" ")
    print(f"The tutorial printed loss {LOSS} and these {TOTAL} running statistics.")
    return not wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the tutorial's SimpleCNN with bnfast.")
    parser.add_argument("--backend", help="backend to train on (default: bnfast's choice)")
    parser.add_argument("--steps", type=int, default=10, help="steps of SGD (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    try:
        backend = options.backend or bnfast.get_backend()
        network, images, labels = tutorial(bnfast_batch_norm(backend))
    except (bnfast.UnknownBackendError, bnfast.BackendUnavailableError) as error:
        parser.error(str(error))

    losses = []
    for step in range(1, options.steps + 1):
        losses.append(network.train_step(images, labels))
        progress(f"step {step} of {options.steps}: loss {losses[-1]:.6f}")
    progress("")
    print(f"training on {backend}: loss {losses[0]:.6f}", end=" ")
    print(f"in step 1, {losses[-1]:.6f} in step {options.steps}")

    network.train(False)
    logits = network(images)
    eval_loss, _ = cross_entropy(logits, labels)
    right = int((logits.argmax(1) == labels).sum())
    print(f"eval mode: loss {eval_loss:.6f}, {right} of {len(labels)} images classified\n")
    return 0 if compare() else 1


if __name__ == "__main__":
    sys.exit(main())
