"""What a type checker makes of the package: backends match the contract, stubs match the code."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import bnfast
from bnfast.spec import Kernels

MODULES = ("numpy_reference", "cython_openmp", "numba_parallel")
SOURCES = Path(bnfast.__file__).parent.parent


def run(*arguments, cwd):
    """Run a module of mypy, and return (exit status, messages).

    The path is given because mypy does not see an editable installation.
    """
    finished = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env=os.environ | {"MYPYPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        check=False,
    )
    return finished.returncode, finished.stdout + finished.stderr


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def mypy(tmp_path, cache):
    """Return a function that checks a file with some code, strictly, and that file alone."""

    def check(code):
        (tmp_path / "checked.py").write_text(textwrap.dedent(code))
        options = ("--strict", "--follow-imports=silent", "--cache-dir", cache)
        return run("mypy", *options, "checked.py", cwd=tmp_path)

    return check


def test_every_backend_module_is_a_set_of_kernels(mypy):
    """mypy accepts a module where the protocol is asked for."""
    names = "\n".join(f"from bnfast.backends import {name}" for name in MODULES)
    listed = ", ".join(MODULES)
    status, messages = mypy(
        f"{names}\nfrom bnfast.spec import Kernels\nbackends: list[Kernels] = [{listed}]\n"
    )
    assert status == 0, messages


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        (None, ""),
        ("unavailable", "def unavailable() -> int: ..."),
        ("accepts", "def accepts(x: object, y: int) -> bool: ..."),
        ("moments", "def moments(x: Floats, *, mean: Channels, num_threads: int) -> None: ..."),
    ],
)
def test_a_module_that_differs_is_refused(mypy, tmp_path, changed, code):
    """The check above can fail: with one other signature a module is no set of kernels."""
    # "as": a strict mypy takes names that are merely imported for private.
    functions = [
        f"{name} as {name}"
        for name in vars(Kernels)
        if not name.startswith("_") and name != changed
    ]
    (tmp_path / "mine.py").write_text(
        f"from bnfast.backends.cython_openmp import {', '.join(functions)}\n"
        f"from bnfast.spec import Channels, Floats\n{code}\n"
    )
    status, messages = mypy(
        """
        import mine
        from bnfast.spec import Kernels
        kernels: Kernels = mine
        """,
    )
    if changed is None:
        assert status == 0, messages
    else:
        assert 'has type Module, variable has type "Kernels"' in messages


def test_public_api_is_typed_for_its_users(mypy):
    status, messages = mypy(
        """
        import numpy as np
        import bnfast
        import bnfast.functional as F

        layer = bnfast.BatchNorm2d(3, dtype=np.float64, activation="relu")
        x = np.ones((2, 3, 4, 4))
        y = layer.train()(x, residual=x, out=np.empty_like(x))
        dx = layer.backward(y)
        total = float(dx.sum())
        state: dict[str, np.ndarray] = layer.state_dict("bn.")
        missing, unexpected = layer.load_state_dict(state, strict=False, prefix="bn.")
        keys: list[str] = missing + unexpected
        y, mean, invstd = F.batch_norm_with_stats(x)
        gradients = F.batch_norm_backward(y, x, None, mean, invstd, training=True)
        dweight: np.ndarray = gradients.dweight
        count: int = F.moments(x).merge(F.moments(x)).count
        moments: bnfast.Moments = F.moments(x).merge(F.moments(x), F.moments(x))
        volume: bnfast.BatchNorm3d = bnfast.BatchNorm3d.from_torch(object(), activation="relu")
        line: bnfast.BatchNorm1d = bnfast.BatchNorm1d.from_keras(object(), backend="numpy")
        plane: bnfast.BatchNorm2d = bnfast.BatchNorm2d.from_onnx(object(), {})
        frozen: bnfast.FrozenBatchNorm = layer.freeze()
        y = frozen.eval()(x, residual=x, out=np.empty_like(x))
        w, b = bnfast.fuse_conv_bn_weights(x, None, x, x, 1e-5, None, None, transpose=True)
        w, b = bnfast.fuse_linear_bn_weights(x, b, x, x, 1e-5, x, x)
        bnfast.recalibrate(layer, [layer, line, volume], [x], mode="torch", progress=False)
        with bnfast.use_backend("numpy"), bnfast.use_num_threads(1):
            name: str = bnfast.get_backend()
        """,
    )
    assert status == 0, messages


def test_the_stub_of_the_compiled_module_matches_it():
    pytest.importorskip("bnfast.backends.cython_openmp", reason="the extension is not built")
    settings = ("--mypy-config-file", str(SOURCES / "pyproject.toml"))
    status, messages = run("mypy.stubtest", "bnfast.backends.cython_openmp", *settings, cwd=SOURCES)
    assert status == 0, messages
