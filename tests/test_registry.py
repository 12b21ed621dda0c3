"""The choice of a backend: precedence, strictness, and what each message says."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import threading
from types import ModuleType

import numpy as np
import pytest
from fresh_python import error_of, output_of

import bnfast
from bnfast import BackendUnavailableError, UnknownBackendError, registry

X = np.ones((2, 3, 4, 4), np.float32)
FAST = ("bnfast.backends.cython_openmp", "bnfast.backends.numba_parallel")


@pytest.fixture(autouse=True)
def fresh_registry(monkeypatch):
    """Start and end every test in the state right after import, with BNFAST_BACKEND unset."""
    monkeypatch.delenv("BNFAST_BACKEND", raising=False)
    registry._reset()
    yield
    registry._reset()


@pytest.fixture
def add_backend(monkeypatch):
    """Return a function that registers a backend whose module is made up."""

    def add(name, unavailable=None, accepts=np.ndarray):
        module = ModuleType(f"made_up_{name}")
        module.unavailable = lambda: unavailable
        module.accepts = lambda x: isinstance(x, accepts)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        bnfast.register_backend(name, module=module.__name__, install=f"pip install {name}")
        return module

    return add


@pytest.fixture
def write_backend(monkeypatch, tmp_path):
    """Return a function that registers a backend whose module is a file with the given text."""

    def write(name, text):
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / f"written_{name}.py").write_text(text)
        bnfast.register_backend(name, module=f"written_{name}", install=f"pip install {name}")

    return write


class OnGpu:
    """An array on a GPU, as the array interface of CUDA shows it."""

    __cuda_array_interface__ = {"shape": (2, 3, 4, 4)}  # noqa: RUF012


class Dlpack:
    """An array on a device, as DLPack shows it."""

    def __init__(self, device_type):
        self.device_type = device_type

    def __dlpack_device__(self):
        return self.device_type, 0


# The order of precedence


@pytest.mark.parametrize("environment", [None, "e"])
@pytest.mark.parametrize("process", [None, "p"])
@pytest.mark.parametrize("context", [None, "c"])
@pytest.mark.parametrize("argument", [None, "a"])
def test_precedence(add_backend, monkeypatch, argument, context, process, environment):
    modules = {name: add_backend(name) for name in "acpe"}
    for fast in FAST:
        monkeypatch.setitem(sys.modules, fast, None)
    logging.getLogger("bnfast").addHandler(logging.NullHandler())
    if environment is not None:
        monkeypatch.setenv("BNFAST_BACKEND", environment)
    bnfast.set_backend(process)
    token = None
    if context is not None:
        scope = bnfast.use_backend(context)
        token = scope.__enter__()
    expected = argument or context or process or environment or "numpy"
    try:
        chosen = registry.choose(argument, X)
        assert registry.current(argument).name == expected
        if argument is None:
            assert bnfast.get_backend() == expected
    finally:
        if context is not None:
            scope.__exit__(None, None, None)
    assert token is None
    if expected == "numpy":
        assert chosen.__name__ == "bnfast.backends.numpy_reference"
    else:
        assert chosen is modules[expected]
