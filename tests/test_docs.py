"""What the documentation shows is so: its code runs, and its links lead somewhere.

Code is every block fenced as ``python`` in the README and on the pages, one namespace per page, and
every example in a docstring. A block with prompts is a doctest; any other just has to run. A page
may name packages that its code needs, as ``<!-- needs: torch -->``: without them it is skipped.
"""

from __future__ import annotations

import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import bnfast
from bnfast import memory, registry, threads

ROOT = Path(__file__).parents[1]
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
}
NEEDS = re.compile(r"^<!-- needs: (.*) -->$", re.MULTILINE)
FENCED = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")

MODULE_NEEDS = {
    "bnfast.interop.dask": "dask",
    "bnfast.interop.mpi": "mpi4py",
    "bnfast.interop.onnx": "onnx",
    "bnfast.interop.onnx_operator": "onnx",
}

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "bnfast").rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.fixture(autouse=True)
def as_after_import() -> Iterator[None]:
    """Take back what an example registers or sets."""
    yield
    registry._reset()
    threads._reset()
    memory._reset()


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if FENCED.search(text)])
def test_code_on_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # an example may write a file
    text = TEXTS[page]
    for needed in NEEDS.findall(text):
        for package in needed.split(", "):
            pytest.importorskip(package, reason=f"{page} needs {package}")
    names: dict[str, object] = {"__name__": page}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for block in FENCED.finditer(text):
        line = text.count("\n", 0, block.start(1))
        if ">>> " in block[1]:
            parsed = doctest.DocTestParser().get_doctest(block[1], names, page, page, line)
            runner.run(parsed, clear_globs=False)
            names.update(parsed.globs)
        else:
            exec(compile("\n" * line + block[1], ROOT / page, "exec"), names)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_hold(module: str) -> None:
    if module in MODULE_NEEDS:
        pytest.importorskip(MODULE_NEEDS[module], reason=f"{module} needs {MODULE_NEEDS[module]}")
    result = doctest.testmod(
        importlib.import_module(module), extraglobs={"bnfast": bnfast, "np": np}
    )
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    assert [link for link in LINK.findall(TEXTS[page]) if not (folder / link).exists()] == []
