"""All CUDA kernels there are, found in the modules that launch them: none can be forgotten.

A kernel is made by a factory, a function that is annotated to return one.
`test_cuda_kernels_known.py` proves that nothing else is launched.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from bnfast.backends import cuda_kernels


def factories() -> dict[str, Callable[[Any], Any]]:
    """Return the factory of each kernel, by names like "rows.moments"."""
    found = {}
    for info in pkgutil.iter_modules(cuda_kernels.__path__):
        module = importlib.import_module(f"{cuda_kernels.__name__}.{info.name}")
        for name, factory in vars(module).items():
            own = getattr(factory, "__module__", None) == module.__name__
            if own and getattr(factory, "__annotations__", {}).get("return") == "Kernel":
                found[f"{info.name}.{name}"] = factory
    return found
