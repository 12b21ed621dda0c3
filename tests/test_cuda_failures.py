"""What can be wrong with a GPU: memory that runs out, forks, and what keeps it from running."""

from __future__ import annotations

import numpy as np
import pytest
from fresh_python import output_of
from made_up_gpu import SHAPE

import bnfast
from bnfast.backends.cuda_kernels import failures
from bnfast.testing.bounds import assert_same_bits

# ---- while it runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["result", "copy", "backward"])
def test_out_of_memory(kind, numbers, gpu, call):
    x, dy, layer = numbers(*SHAPE), numbers(*SHAPE), bnfast.BatchNorm2d(3)
    layer(kind(x))
    before, launches = layer.state_dict(), len(gpu.launches)
    gpu.full = True
    calls = {
        "result": lambda: layer(kind(x)),
        "copy": lambda: layer(kind(numbers(4, 3, 2, 16)[..., ::2])),
        "backward": lambda: layer.backward(kind(dy)),
    }
    with pytest.raises(MemoryError) as caught:
        calls[call]()
    purpose = "a contiguous copy" if call == "copy" else "the result"
    assert str(caught.value) == (
        f"no memory on cuda:0 for {purpose} of 768 bytes; of 80,000,000,000 bytes 1,000 are free"
    )
    assert caught.value.__cause__ is not None
    assert len(gpu.launches) == launches
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[name], name)
    assert layer.grad_weight is None
    gpu.full = False
    twin = bnfast.BatchNorm2d(3, backend="numpy")
    twin(x)
    assert_same_bits("dx", layer.backward(kind(dy)).memory, twin.backward(dy))


def test_other_errors_pass_through():
    with pytest.raises(ZeroDivisionError), failures.MemoryFor("the result", 8, "cuda:0", None):
        raise ZeroDivisionError


def test_how_much_is_free_may_be_unknown():
    with (
        pytest.raises(MemoryError, match=r"^no memory on cuda:0 for the result of 1,000 bytes$"),
        failures.MemoryFor("the result", 1000, "cuda:0", None),
    ):
        raise MemoryError


def test_forked_while_in_use(kind, numbers, monkeypatch):
    monkeypatch.setattr(failures, "_forked", True)
    with pytest.raises(bnfast.BackendUnavailableError) as caught:
        bnfast.BatchNorm2d(3)(kind(numbers(*SHAPE)))
    assert str(caught.value) == failures.FORKED
    assert failures.unavailable(None) == failures.FORKED


def test_fork():
    printed = output_of(
        """
        import os
        from types import SimpleNamespace
        from bnfast.backends.cuda_kernels import failures

        def child():
            if os.fork() == 0:
                try:
                    failures.refuse_fork()
                    print("works", flush=True)
                except Exception as error:
                    print(type(error).__name__, flush=True)
                os._exit(0)
            os.wait()

        child()
        failures.unavailable(SimpleNamespace(gpus=[]))  # asks the driver
        child()
        failures.refuse_fork()
        """
    )
    assert printed.split() == ["works", "BackendUnavailableError"]


# ---- what cannot run ----------------------------------------------------------------------------


def test_nothing_is_missing(gpu):
    assert failures.unavailable(gpu) is None


def test_no_gpu(gpu):
    gpu.gpus = []
    assert failures.unavailable(gpu) == "there is no NVIDIA GPU that this process may use"


class Raising:
    """An object of which nothing can be had."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        raise self.error

    def get_version(self):
        raise self.error


def test_no_driver(gpu):
    gpu.gpus = Raising(ImportError("Error at driver init: \n\nCUDA driver cannot be found.\n:"))
    assert failures.unavailable(gpu) == (
        "no CUDA driver can be used: Error at driver init: CUDA driver cannot be found"
    )


def test_no_toolkit(gpu):
    gpu.runtime = Raising(RuntimeError("Failure finding libnvrtc.so"))
    assert failures.unavailable(gpu) == (
        "the libraries of the CUDA toolkit cannot be used: Failure finding libnvrtc.so"
    )


def test_old_driver(gpu):
    gpu.driver_version = (12, 4)
    assert failures.unavailable(gpu) == (
        "the NVIDIA driver is too old: it is for CUDA 12.4, and the CUDA toolkit that is installed "
        "is 13.0; update the driver, or install bnfast[cuda12]"
    )


def test_driver_that_no_extra_is_for(gpu):
    gpu.driver_version = (11, 8)
    assert failures.unavailable(gpu) == (
        "the NVIDIA driver is too old: it is for CUDA 11.8, and the CUDA toolkit that is installed "
        "is 13.0; update the driver"
    )


def test_old_gpu(gpu):
    gpu.gpus[0].compute_capability = (6, 1)
    assert failures.unavailable(gpu) == (
        "the GPU is too old: its compute capability is 6.1, and CUDA 13.0 needs 7.5"
    )


def test_bindings_missing():
    error = ModuleNotFoundError("No module named 'cuda.bindings'")
    assert failures.not_imported(error) == (
        "numba.cuda cannot be used: No module named 'cuda.bindings'"
    )


def test_without_numba():
    printed = output_of(
        """
        import sys
        sys.modules["numba"] = None
        import bnfast
        print(bnfast.list_backends()["cuda"].reason)
        """
    )
    assert printed == "numba.cuda cannot be used: import of numba halted; None in sys.modules"
