"""Real torch modules: converted, loaded from, folded and recalibrated like them."""

from __future__ import annotations

import numpy as np
import pytest
from trained_layers import VECTORS

import bnfast

torch = pytest.importorskip("torch", minversion="2.13", reason="torch is not installed")

KINDS = {
    "BatchNorm1d": (6, 3, 5),
    "BatchNorm2d": (4, 3, 2, 8),
    "BatchNorm3d": (2, 3, 2, 3, 4),
}


def module_of(rng, kind="BatchNorm2d", dtype=torch.float32, **arguments):
    """Return a module with random numbers that has trained once."""
    module = getattr(torch.nn, kind)(3, **arguments, dtype=dtype)
    with torch.no_grad():
        for value in (*module.parameters(), module.running_mean, module.running_var):
            if value is not None:
                value.copy_(torch.tensor(rng.uniform(0.5, 3, 3)))
    if module.num_batches_tracked is not None:
        module.num_batches_tracked += 11
    return module.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"eps": 1e-3, "momentum": None},
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
    ],
)
def test_the_layer_computes_what_the_module_does(rng, kind, arguments):
    module = module_of(rng, kind, **arguments)
    layer = getattr(bnfast, kind).from_torch(module)
    assert layer.training is False
    assert list(layer.state_dict()) == list(module.state_dict())
    for name, value in module.state_dict().items():
        np.testing.assert_array_equal(layer.state_dict()[name], value.numpy(), name)
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
        assert getattr(layer, name) == getattr(module, name)
    x = rng.normal(2, 3, KINDS[kind]).astype(np.float32)
    expected = module(torch.tensor(x)).detach().numpy()
    assert np.abs(layer(x) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(rng, dtype):
    module = module_of(rng, dtype=dtype)
    layer = bnfast.BatchNorm2d.from_torch(module)
    loaded = bnfast.BatchNorm2d(3, dtype=layer.weight.dtype)
    loaded.load_state_dict(module.state_dict())
    for name in VECTORS:
        exact = getattr(module, name).detach().double().numpy()
        for vector in (getattr(layer, name), getattr(loaded, name)):
            assert vector.dtype == (np.float64 if dtype == torch.float64 else np.float32)
            np.testing.assert_array_equal(vector, exact)
    assert layer.num_batches_tracked == loaded.num_batches_tracked == 11


def test_other_modules():
    sync = torch.nn.SyncBatchNorm(3, eps=0.1).eval()
    assert bnfast.BatchNorm3d.from_torch(sync).eps == 0.1
    instance = torch.nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    with pytest.raises(TypeError, match="got InstanceNorm2d, another normalisation"):
        bnfast.BatchNorm2d.from_torch(instance)
    with pytest.raises(TypeError, match=r"^expected a BatchNorm module of torch, got Conv2d, whic"):
        bnfast.BatchNorm2d.from_torch(torch.nn.Conv2d(3, 3, 1))
    with pytest.raises(TypeError, match=r"use bnfast\.BatchNorm3d\.from_torch$"):
        bnfast.BatchNorm2d.from_torch(torch.nn.BatchNorm3d(3))
    with pytest.raises(TypeError, match=r"^weight should hold real numbers, got Uninitialized"):
        bnfast.BatchNorm2d.from_torch(torch.nn.LazyBatchNorm2d())


def test_a_module_is_no_mapping():
    layer = bnfast.BatchNorm2d(3)
    with pytest.raises(
        TypeError,
        match=r"^cannot load the state of BatchNorm2d: expected a mapping of names to arrays, got "
        r"BatchNorm2d$",
    ):
        layer.load_state_dict(torch.nn.BatchNorm2d(3))


CONVOLUTIONS = {
    "Conv1d": {},
    "Conv2d": {"groups": 3},
    "Conv3d": {"bias": False},
    "ConvTranspose2d": {},
    "ConvTranspose3d": {"bias": False},
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_fused_convolutions(rng, name, affine):
    """The same numbers as torch's helper, and the same output as the two modules."""
    convolution = getattr(torch.nn, name)(3, 6, 2, **CONVOLUTIONS[name], dtype=torch.float64)
    norm = getattr(torch.nn, f"BatchNorm{name[-2]}d")(6, affine=affine, dtype=torch.float64)
    x = torch.tensor(rng.normal(size=(4, 3, *(5,) * int(name[-2]))))
    norm(convolution(x))
    norm.eval()
    transpose = "Transpose" in name
    arguments = (
        convolution.weight,
        convolution.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    theirs = torch.nn.utils.fusion.fuse_conv_bn_weights(*arguments, transpose)
    arrays = [v.detach().numpy() if isinstance(v, torch.Tensor) else v for v in arguments]
    ours = bnfast.fuse_conv_bn_weights(*arrays, transpose)
    for own, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(own, other.detach().numpy(), rtol=1e-13, atol=1e-15)
    expected = norm(convolution(x))
    with torch.no_grad():
        convolution.weight.copy_(torch.tensor(ours[0]))
        convolution.bias = torch.nn.Parameter(torch.tensor(ours[1]))
    torch.testing.assert_close(convolution(x), expected, rtol=1e-12, atol=1e-12)


def test_fused_linear_layers(rng):
    linear, norm = torch.nn.Linear(5, 3), module_of(rng, "BatchNorm1d")
    arguments = (linear.weight, linear.bias, norm.running_mean, norm.running_var, norm.eps)
    arguments += (norm.weight, norm.bias)
    theirs = torch.nn.utils.fusion.fuse_linear_bn_weights(*arguments)
    arrays = [v.detach().numpy() if isinstance(v, torch.Tensor) else v for v in arguments]
    for own, other in zip(bnfast.fuse_linear_bn_weights(*arrays), theirs, strict=True):
        assert own.dtype == np.float32
        np.testing.assert_allclose(own, other.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_recalibrate_as_update_bn(rng, momentum):
    """Two layers, so that the second sees what the first makes of its batches in training mode."""
    weights = [rng.normal(size=size).astype(np.float32) for size in ((3, 6), (6, 5))]
    norms = [torch.nn.BatchNorm1d(n, momentum=momentum) for n in (6, 5)]

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = torch.nn.ModuleList(norms)

        def forward(self, x):
            x = torch.relu(self.norms[0](x @ torch.tensor(weights[0])))
            return self.norms[1](x @ torch.tensor(weights[1]))

    network = Network().eval()
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 2)
            norm.running_var.uniform_(0.5, 2)
    layers = [bnfast.BatchNorm1d.from_torch(norm) for norm in norms]

    def model(x):
        x = np.maximum(layers[0](x @ weights[0]), 0)
        return layers[1](x @ weights[1])

    batches = [rng.normal(rng.normal(), 2, (int(n), 3)) for n in rng.integers(4, 60, 12)]
    batches = [batch.astype(np.float32) for batch in batches]
    torch.optim.swa_utils.update_bn([torch.tensor(batch) for batch in batches], network)
    bnfast.recalibrate(model, layers, batches, mode="torch", progress=False)
    for layer, norm in zip(layers, norms, strict=True):
        assert layer.num_batches_tracked == int(norm.num_batches_tracked) == 12
        assert layer.momentum == norm.momentum == momentum
        assert layer.training is norm.training is False
        for name in ("running_mean", "running_var"):
            np.testing.assert_allclose(
                getattr(layer, name), getattr(norm, name).numpy(), rtol=1e-6, atol=1e-6
            )
