"""The samples that torch tests its own batch norm with, passed through bnfast: every sample of two
axes or more, outputs and gradients.

They come with the wheel. torch computes what is expected, in float64.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest

import bnfast
import bnfast.functional as F

torch = pytest.importorskip("torch", minversion="2.13", reason="torch is not installed")
pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")

from torch.testing._internal.common_methods_invocations import (  # noqa: E402
    sample_inputs_batch_norm,
)
from torch.testing._internal.common_modules import (  # noqa: E402
    module_error_inputs_torch_nn_BatchNorm1d_2d_3d,
    module_inputs_torch_nn_BatchNorm1d,
    module_inputs_torch_nn_BatchNorm2d,
    module_inputs_torch_nn_BatchNorm3d,
)

MODULES = {
    "BatchNorm1d": module_inputs_torch_nn_BatchNorm1d,
    "BatchNorm2d": module_inputs_torch_nn_BatchNorm2d,
    "BatchNorm3d": module_inputs_torch_nn_BatchNorm3d,
}
DTYPES = [torch.float32, torch.float64]
RTOL = {np.dtype(np.float32): 2e-6, np.dtype(np.float64): 1e-12}


def to_numpy(value):
    """Return a tensor as an array; anything else as it is."""
    return value.detach().numpy().copy() if isinstance(value, torch.Tensor) else value


def widened(value):
    """Return a leaf of float64 with the same numbers; what is no tensor as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def assert_close(actual, expected, what, like=None):
    """Compare within the rounding of the samples' dtype, relative to the largest number."""
    expected = expected.detach().numpy()
    assert actual.shape == expected.shape
    if expected.size:
        rtol = RTOL[np.dtype(actual.dtype if like is None else like)]
        error = np.abs(actual - expected).max()
        assert error <= rtol * max(1.0, np.abs(expected).max()), (what, error)


def gradient(x):
    return np.linspace(-1, 2, x.size, dtype=x.dtype).reshape(x.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_of_the_function(rng, dtype):
    torch.manual_seed(int(rng.integers(2**31)))
    passed = []
    for sample in sample_inputs_batch_norm(None, "cpu", dtype, requires_grad=True):
        if sample.input.ndim < 2:
            with pytest.raises(ValueError, match="expected at least 2D input"):
                F.batch_norm(to_numpy(sample.input), None, None, training=True)
            continue
        mean, var, weight, bias = sample.args
        training, eps = sample.kwargs.get("training", False), sample.kwargs.get("eps", 1e-5)
        x, running = to_numpy(sample.input), [to_numpy(mean), to_numpy(var)]

        wide = [widened(value) for value in (sample.input, *sample.args)]
        expected = torch.nn.functional.batch_norm(*wide, **sample.kwargs)
        dy = gradient(x)
        expected.backward(torch.tensor(dy.astype(np.float64)))

        used = [None if array is None else array.astype(float) for array in running]
        y = F.batch_norm(x, *running, to_numpy(weight), to_numpy(bias), **sample.kwargs)
        assert y.dtype == x.dtype
        assert_close(y, expected, "y")
        for own, theirs in zip(running, wide[1:3], strict=True):
            if theirs is not None:
                assert_close(own, theirs, "running statistics")
        if training:
            _, *used = F.batch_norm_with_stats(x, eps=eps)
        else:
            used[1] = 1 / np.sqrt(used[1] + eps)
        gradients = F.batch_norm_backward(dy, x, to_numpy(weight), *used, training=training)
        assert_close(gradients.dx, wide[0].grad, "dx")
        for own, theirs in ((gradients.dweight, wide[3]), (gradients.dbias, wide[4])):
            if theirs is not None:
                assert_close(own, theirs.grad, "gradient of a parameter", like=x.dtype)
        passed.append(x.ndim)
    assert len(passed) >= 10
    assert set(passed) == {2, 3, 4}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_samples_of_the_modules(rng, name, training, dtype):
    torch.manual_seed(int(rng.integers(2**31)))
    samples = MODULES[name](None, "cpu", dtype, requires_grad=True, training=training)
    for sample in samples:
        made = sample.constructor_input
        twin = getattr(torch.nn, name)(*made.args, **made.kwargs, dtype=torch.float64)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.uniform_(0.5, 2)
        for buffer in (twin.running_mean, twin.running_var):
            if buffer is not None:
                buffer.uniform_(0.5, 2)
        layer = getattr(bnfast, name)(
            *made.args, **made.kwargs, dtype=sample.forward_input.args[0].detach().numpy().dtype
        )
        layer.load_state_dict(twin.state_dict())
        # They start from the same numbers, which loading may have rounded.
        twin.load_state_dict({n: torch.tensor(v) for n, v in layer.state_dict().items()})
        converted = getattr(bnfast, name).from_torch(copy.deepcopy(twin))

        x = to_numpy(sample.forward_input.args[0])
        wide = torch.tensor(x.astype(np.float64), requires_grad=True)
        expected = twin.train(training)(wide)
        y = layer.train(training)(x)
        assert y.dtype == x.dtype
        assert_close(y, expected, f"{sample.desc}: y")
        assert_close(converted.train(training)(x), expected, f"{sample.desc}: y", like=x.dtype)
        for key, value in twin.state_dict().items():
            assert_close(layer.state_dict()[key], value, f"{sample.desc}: {key}", like=x.dtype)
        if training:
            dy = gradient(x)
            expected.backward(torch.tensor(dy.astype(np.float64)))
            assert_close(layer.backward(dy), wide.grad, f"{sample.desc}: dx")
            for key in ("weight", "bias"):
                if getattr(twin, key) is not None:
                    own = getattr(layer, f"grad_{key}")
                    assert_close(own, getattr(twin, key).grad, f"{sample.desc}: d{key}")
    assert len(samples) >= 7


@pytest.mark.parametrize("name", MODULES)
def test_samples_of_errors(name):
    info = type("Info", (), {"module_cls": getattr(torch.nn, name)})
    samples = module_error_inputs_torch_nn_BatchNorm1d_2d_3d(
        info, "cpu", torch.float32, requires_grad=False, training=True
    )
    for sample in samples:
        made = sample.module_error_input.constructor_input
        x = to_numpy(sample.module_error_input.forward_input.args[0])
        with pytest.raises(sample.error_type, match=r"eps must be (positive|finite)"):
            getattr(bnfast, name)(*made.args, **made.kwargs)(x)
    assert len(samples) == 2
