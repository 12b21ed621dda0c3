"""`bnfast.functional.batch_norm` and torch's, on arrays of two to seven axes in any memory layout.

torch runs in float64 on the same numbers. float32 results are compared within the bound that
`bnfast.spec` states, float64 ones within a few units more than the sums of either can be off by.
"""

from __future__ import annotations

import numpy as np
import pytest
from backends_here import over_backends, y_ulps
from torch_comparison import in_rows, lay

import bnfast
import bnfast.functional as F
from bnfast import spec

torch = pytest.importorskip("torch", minversion="2.13", reason="torch is not installed")

UNIT = 2.0**-53


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """The arrays are small: a team of threads takes a hundred times as long, on a busy machine."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@over_backends
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ndim", range(2, 8))
def test_every_rank(rng, ndim, training, dtype, backend):
    for _ in range(5):
        channels = int(rng.integers(1, 6))
        spatial = (int(n) for n in rng.integers(1, 5, ndim - 2))
        shape = (int(rng.integers(2, 6)), channels, *spatial)
        x = lay(rng, rng.normal(3, 2, shape).astype(dtype))
        weight, bias, mean = rng.normal(size=(3, channels))
        var = rng.uniform(0.5, 4, channels)
        dy = lay(rng, rng.normal(size=shape).astype(dtype))

        wide = torch.tensor(np.array(x, np.float64, order="C"), requires_grad=True)
        parameters = [torch.tensor(array, requires_grad=True) for array in (weight, bias)]
        statistics = [torch.tensor(array) for array in (mean, var)]
        expected = torch.nn.functional.batch_norm(wide, *statistics, *parameters, training, 0.3)
        expected.backward(torch.tensor(np.array(dy, np.float64, order="C")))

        used_mean, used_var = mean.copy(), var.copy()
        running = mean.copy(), var.copy()
        y = F.batch_norm(x, *running, weight, bias, training, 0.3, backend=backend)
        for own, theirs in zip(running, statistics, strict=True):
            np.testing.assert_allclose(own, theirs.numpy(), rtol=1e-13, atol=1e-14)
        if training:
            rows = in_rows(x).astype(np.float64)
            used_mean, used_var = rows.mean(axis=1), rows.var(axis=1)
        invstd = 1 / np.sqrt(used_var + 1e-5)
        gradients = F.batch_norm_backward(
            dy, x, weight, used_mean, invstd, training=training, backend=backend
        )

        assert (y.dtype, y.shape) == (dtype, shape)
        xhat = (in_rows(x) - used_mean[:, None]) * invstd[:, None]
        exact = in_rows(expected.detach().numpy())
        scale = spec.output_scale(xhat, weight[:, None], bias[:, None], 0.0, exact)
        unit = np.finfo(dtype).eps
        if dtype == np.float32:
            ulp = np.spacing(scale.astype(np.float32))
        else:
            ulp = spec.Y_UNITS_FLOAT64 * UNIT * (1 + np.abs(used_mean * invstd))[:, None] * scale
        bound = (y_ulps(backend) if dtype == np.float32 else 2) * ulp + 1e-13 * scale
        assert (np.abs(in_rows(y) - exact) <= bound).all()

        size = np.abs(weight * invstd)[:, None] * (1 + np.abs(xhat)) * (1 + np.abs(dy).max())
        error = np.abs(in_rows(gradients.dx) - in_rows(wide.grad.numpy()))
        assert (error <= (4 * unit + 1e-13) * size).all()
        for own, parameter in zip((gradients.dweight, gradients.dbias), parameters, strict=True):
            np.testing.assert_allclose(own, parameter.grad.numpy(), rtol=1e-11, atol=1e-11)


@over_backends
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("BatchNorm1d", (16, 5)),
        ("BatchNorm1d", (8, 5, 7)),
        ("BatchNorm2d", (4, 5, 6, 6)),
        ("BatchNorm3d", (3, 5, 2, 4, 3)),
    ],
)
def test_ten_steps_of_training(rng, kind, shape, backend):
    """Outputs, parameters under gradient descent, and the running statistics at the end."""
    twin = getattr(torch.nn, kind)(5, dtype=torch.float64)
    layer = getattr(bnfast, kind)(5, dtype=np.float64, backend=backend)
    for _ in range(10):
        x, dy = rng.normal(3, 2, shape), rng.normal(size=shape)
        wide = torch.tensor(x, requires_grad=True)
        expected = twin(wide)
        np.testing.assert_allclose(layer(x), expected.detach().numpy(), rtol=1e-11, atol=1e-11)
        expected.backward(torch.tensor(dy))
        np.testing.assert_allclose(layer.backward(dy), wide.grad.numpy(), rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            for name in ("weight", "bias"):
                parameter = getattr(twin, name)
                parameter -= 0.01 * parameter.grad
                getattr(layer, name)[:] -= 0.01 * getattr(layer, f"grad_{name}")
        twin.zero_grad()
        layer.zero_grad()
    for name, value in twin.state_dict().items():
        np.testing.assert_allclose(
            layer.state_dict()[name], value.numpy(), rtol=1e-11, atol=1e-11, err_msg=name
        )
