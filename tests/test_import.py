"""``import bnfast`` is light: NumPy, and nothing that a backend or a peer needs."""

from __future__ import annotations

import pytest
from fresh_python import output_of

HEAVY = [
    "bnfast.backends.cython_openmp",
    "bnfast.backends.numba_parallel",
    "bnfast.backends.numba_cuda",
    "bnfast.interop.from_torch",
    "bnfast.interop.from_keras",
    "bnfast.interop.from_onnx",
    "bnfast.interop.onnx",
    "bnfast.interop.dask",
    "bnfast.interop.mpi",
    "bnfast.testing",
    "numba",
    "numba_cuda",
    "llvmlite",
    "cuda",
    "scipy",
    "torch",
    "onnx",
    "keras",
    "tqdm",
    "dask",
    "mpi4py",
    "pytest",
    "logging",
    "difflib",
    "importlib.metadata",
]


def modules_after(statement: str) -> set[str]:
    return set(output_of(f"{statement}\nimport sys\nprint(*sys.modules)").split())


@pytest.fixture(scope="module")
def added_by_import() -> set[str]:
    """Return the modules that bnfast adds to those of a bare NumPy."""
    return modules_after("import numpy, bnfast") - modules_after("import numpy")


@pytest.mark.parametrize("module", HEAVY)
def test_import_leaves_heavy_modules_alone(added_by_import, module):
    assert "bnfast.registry" in added_by_import
    assert module not in added_by_import


def test_import_adds_only_numpy_and_the_standard_library(added_by_import):
    names = output_of("import sys; print(*sys.stdlib_module_names)").split()
    roots = {name.partition(".")[0] for name in added_by_import}
    assert roots - set(names) <= {"bnfast", "numpy"}


def test_a_backend_is_imported_at_its_first_use():
    printed = output_of(
        """
        import sys
        import bnfast
        module = "bnfast.backends.numpy_reference"
        before = module in sys.modules
        with bnfast.use_backend("numpy"):
            print(before, module in sys.modules, "numba" in sys.modules)
        """
    )
    assert printed == "False True False"


def test_import_reads_no_variable():
    printed = output_of(
        "import bnfast; print('imported')",
        BNFAST_BACKEND="nonsense",
        BNFAST_NUM_THREADS="nonsense",
        BNFAST_ISA="nonsense",
        BNFAST_CACHE_BYTES="nonsense",
    )
    assert printed == "imported"
