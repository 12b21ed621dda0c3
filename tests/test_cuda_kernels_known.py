"""The kernels that `cuda_offline` compiles are the kernels that are launched: no more, no fewer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from device_kernels import factories
from numba import config, cuda
from quick_simulator import quick

import bnfast
from bnfast import registry
from bnfast.backends.cuda_kernels import driver, launch
from bnfast.testing import guard
from bnfast.testing.cases import OPERATIONS, draw

pytestmark = pytest.mark.skipif(
    not config.ENABLE_CUDASIM, reason="a GPU would not cut these shapes into parts"
)


def origin(kernel: Any) -> str:
    """Return the name of the factory that a kernel was made by."""
    return f"{kernel.__module__.rpartition('.')[2]}.{kernel.__qualname__.partition('.')[0]}"


def test_kernels_that_are_launched_are_those_that_are_known(rng, numbers, monkeypatch) -> None:
    launched = set()
    right = driver.configure

    def seen(kernel, *how):
        launched.add(origin(kernel))
        return right(kernel, *how)

    monkeypatch.setattr(driver, "configure", seen)
    launch._configured.cache_clear()
    with quick():
        for shape in ((9, 2, 17), (153, 2)):
            for operation in OPERATIONS:
                guard.run(registry.load("cuda"), operation, draw(rng, shape, np.float32))
        gaps = cuda.to_device(numbers(2, 3, 8))[:, :, ::2]
        bnfast.BatchNorm1d(3, backend="cuda")(gaps)
    assert launched == set(factories())
