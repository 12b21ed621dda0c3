"""Numba's threading layers that can run here, and the environment in which Numba takes each."""

from __future__ import annotations

import importlib.metadata
import os
from functools import cache
from pathlib import Path

import pytest


@cache
def _tbb() -> str | None:
    """Return the folder of the library that the package tbb brings, or None without it."""
    try:
        files = importlib.metadata.files("tbb") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    folders = {Path(file.locate()).resolve().parent for file in files if "libtbb.so" in file.name}
    return str(min(folders)) if folders else None


LAYERS = [
    "omp",
    "workqueue",
    pytest.param(
        "tbb", marks=pytest.mark.skipif(_tbb() is None, reason="the package tbb is missing")
    ),
]


def environment_of(layer: str) -> dict[str, str]:
    """Return the variables that make Numba take a layer."""
    variables = {"NUMBA_THREADING_LAYER": layer, "NUMBA_NUM_THREADS": "4"}
    if layer == "tbb":
        paths = [_tbb(), os.environ.get("LD_LIBRARY_PATH")]
        variables["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    return variables
