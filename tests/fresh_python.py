"""Run a piece of Python in an interpreter of its own: for imports, environment variables, forks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import bnfast

_HOME = str(Path(bnfast.__file__).parent.parent)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python *arguments`` on the package under test, with these environment variables only.

    Variables of bnfast, OpenMP and Numba's simulator that this process has are not passed on.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("BNFAST_", "OMP_", "NUMBA_ENABLE_CUDASIM"))
    }
    paths = os.pathsep.join(filter(None, [_HOME, inherited.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments],
        env=inherited | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def output_of(code: str, **environment: str) -> str:
    """Return what ``code`` prints; it must succeed."""
    finished = run("-c", textwrap.dedent(code), **environment)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def error_of(code: str, **environment: str) -> str:
    """Return the standard error of ``code``; it must fail."""
    finished = run("-c", textwrap.dedent(code), **environment)
    assert finished.returncode != 0, finished.stdout
    return finished.stderr.strip()
