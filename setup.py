"""Builds the Cython extension; everything else about the package is in pyproject.toml.

Flags that not every compiler has are tried on a small program. A compiler without OpenMP (Apple's
clang) builds a serial extension, unless BNFAST_REQUIRE_OPENMP=1 makes that an error.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = [
    "-O3",
    "-g0",  # debug information would be two thirds of the file
    "-fopenmp-simd",  # loops carry `omp simd`, with OpenMP's threads or without
    "-ffp-contract=off",  # the kernels say where a multiply and an add are one operation
    "-fno-trapping-math",  # floating-point exceptions are not looked at; a branch is a mask
    "-fno-math-errno",
    # Never -ffast-math: linked into a shared object it switches denormals off for the process.
]

# GCC's alone: it would clear 16 lanes by `rep stos`, which outlasts a run of 49 elements.
GCC_FLAGS = ["-fno-tree-loop-distribute-patterns"]

OPENMP_FLAGS = {
    "linux": (["-fopenmp"], ["-fopenmp"]),
    "darwin": (["-Xpreprocessor", "-fopenmp"], ["-lomp"]),
}

EMPTY_PROGRAM = "int main(void) { return 0; }\n"

# OpenMP 5: the kernels pause the pool before a fork.
OPENMP_PROGRAM = (
    "#include <omp.h>\nint main(void) { return omp_pause_resource_all(omp_pause_hard); }\n"
)


class BuildKernels(build_ext):
    """Adds the compiler's flags, and says what to do where compiling fails."""

    def build_extensions(self) -> None:
        compile_flags, link_flags = self.openmp_flags()
        if self.accepts(EMPTY_PROGRAM, GCC_FLAGS, []):
            compile_flags = compile_flags + GCC_FLAGS
        for extension in self.extensions:
            extension.extra_compile_args = FLAGS + compile_flags
            extension.extra_link_args = link_flags
        try:
            super().build_extensions()
        except Exception as error:
            raise RuntimeError(
                f"bnfast's kernels could not be compiled: {error}\n"
                "A C compiler and Python's headers are needed "
                "(Debian: apt-get install gcc python3-dev; macOS: xcode-select --install)."
            ) from error

    def openmp_flags(self) -> tuple[list[str], list[str]]:
        """Return what to add for compiling and linking with OpenMP, or nothing."""
        flags = OPENMP_FLAGS.get(sys.platform, (["-fopenmp"], ["-fopenmp"]))
        if self.accepts(OPENMP_PROGRAM, *flags):
            return flags
        if os.environ.get("BNFAST_REQUIRE_OPENMP") == "1":
            raise RuntimeError(
                f"this compiler has no OpenMP ({' '.join(flags[0])} failed), and "
                "BNFAST_REQUIRE_OPENMP=1 asks for it (macOS: brew install libomp)"
            )
        print("bnfast: no OpenMP found, building serial kernels", file=sys.stderr)
        return [], []

    def accepts(self, program: str, compile_flags: list[str], link_flags: list[str]) -> bool:
        """Return whether a program compiles and links with these flags."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(program)
            try:
                objects = self.compiler.compile(
                    [str(source)], output_dir=folder, extra_postargs=compile_flags
                )
                self.compiler.link_executable(
                    objects, str(Path(folder, "probe")), extra_postargs=link_flags
                )
            except Exception:
                return False
        return True


setup(
    ext_modules=cythonize(
        [
            Extension(
                "bnfast.backends.cython_openmp",
                ["bnfast/backends/cython_openmp.pyx"],
                include_dirs=[np.get_include()],
                define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION")],
                depends=[str(path) for path in sorted(Path("bnfast/backends/kernels").glob("*.h"))],
            )
        ],
    ),
    cmdclass={"build_ext": BuildKernels},
)
