"""docs/writing-a-backend.md, followed to the letter, ends in a backend that conforms."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
OPTIONS = "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"
LARGEST = "4x64x3136 or 12289x64 or 70001 or 9x2x8191 or 1031x1x67 or 24576 or 100001"
"""Shapes that take two thirds of the time, and are for kernels that cut their work."""


def test_backend_of_the_page_passes_the_suite(tmp_path: Path) -> None:
    page = (DOCS / "writing-a-backend.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    shutil.copy(DOCS / "examples" / "my_backend.py", tmp_path)
    (tmp_path / "test_mine.py").write_text("\n".join(blocks), encoding="utf-8")

    run = subprocess.run(
        [sys.executable, *OPTIONS, "-k", f"not ({LARGEST})", str(tmp_path)],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"},
        capture_output=True,
        text=True,
    )

    report = run.stdout + run.stderr
    assert run.returncode == 0, report
    summary = re.search(r"^(\d+) passed(?:, \d+ deselected)? in ", run.stdout, re.MULTILINE)
    assert summary is not None, report  # and none skipped
    assert int(summary[1]) > 2000, report
