"""Every CUDA kernel, compiled for real GPUs on a machine that has none.

Each kernel and dtype becomes PTX for the capabilities in `CAPABILITIES`, and the PTX machine code
for those in `LINKED`. The machine code keeps everything in registers; the PTX has the 16-byte loads
and stores and the fused multiply-adds that the kernel was written with. What each kernel needs is
printed at the end.

It needs the extra ``cuda13``, and no simulator, which the ordinary run of the tests has: a process
of its own, on a file that such a run does not collect. ``.ci/cuda-offline`` is both.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from device_kernels import factories
from numba import config, cuda

if config.ENABLE_CUDASIM:
    raise pytest.UsageError("kernels are compiled without the simulator: NUMBA_ENABLE_CUDASIM=0")

from cuda.core import Linker, LinkerOptions, ObjectCode
from numba.cuda import dispatcher

from bnfast.backends.cuda_kernels import driver
from bnfast.backends.cuda_kernels.signatures import launch_bounds, signature

LINKED = ((7, 5), (8, 0), (9, 0))
CAPABILITIES = (*LINKED, (10, 0))

WIDE = {
    "rows.moments": (1, 0),
    "rows.sums": (3, 0),
    "rows.normalize": (2, 1),
    "rows.gradient": (3, 2),
    "columns.moments": (1, 0),
    "columns.sums": (3, 0),
    "columns.normalize": (2, 1),
    "columns.gradient": (3, 2),
    "merging.moments": (0, 0),
    "merging.sums": (0, 0),
    "copying.strided": (0, 0),
}
"""How many arrays a kernel reads, and how many it writes, by vectors of `driver.VECTOR`."""

FUSED = ("rows.normalize", "rows.gradient", "columns.normalize", "columns.gradient")
"""Kernels whose error bound needs elements to be multiplied and added with one rounding."""

over_kernels = pytest.mark.parametrize(
    ("kernel", "itemsize"),
    [
        pytest.param(kernel, itemsize, id=f"{kernel}-float{8 * itemsize}")
        for kernel in factories()
        for itemsize in driver.real_types
    ],
)

PTX_LOAD = {4: r"ld\.global(?:\.nc)?\.v4\.[bf]32", 8: r"ld\.global(?:\.nc)?\.v2\.[bf]64"}
PTX_STORE = {4: r"st\.global\.v4\.[bf]32", 8: r"st\.global\.v2\.[bf]64"}
PTX_FMA = {4: "fma.rn.f32", 8: "fma.rn.f64"}


class Resources(NamedTuple):
    """What ptxas says that a kernel needs, per thread: registers, and bytes of memory."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def in_registers(self) -> bool:
        """Whether nothing is kept in memory that was meant to be in registers."""
        return self.stack == self.spill_stores == self.spill_loads == 0


@pytest.fixture(autouse=True, scope="module")
def no_device() -> Iterator[None]:
    """Answer for the GPU that Numba asks which capability functions are compiled for."""
    with pytest.MonkeyPatch.context() as patch:
        any_device = SimpleNamespace(compute_capability=LINKED[0])
        patch.setattr(dispatcher, "get_current_device", lambda: any_device)
        yield


@pytest.fixture(autouse=True, scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, int], list[str]]]:
    """Collect the registers of each kernel, and print them in the end."""
    rows: dict[tuple[str, int], list[str]] = {}
    yield rows
    lines = [("registers a thread", [".".join(map(str, capability)) for capability in LINKED])]
    for (kernel, itemsize), cells in rows.items():
        lines.append((f"{kernel} float{8 * itemsize}", cells))
    plugins = request.config.pluginmanager
    with plugins.getplugin("capturemanager").global_and_fixture_disabled():
        for name, cells in lines:
            text = f"\n{name:28}" + "".join(f"{cell:>6}" for cell in cells)
            plugins.getplugin("terminalreporter").write(text)


@functools.cache
def ptx(kernel: str, itemsize: int, capability: tuple[int, int], blocks: int | None = None) -> str:
    """Return a kernel's PTX, for so many blocks a multiprocessor instead of its own number."""
    real = driver.real_types[itemsize]
    made = factories()[kernel](real)
    threads, own = launch_bounds(made, real)
    compiled: tuple[str, Any] = cuda.compile_ptx(
        made, signature(made, real), cc=capability, launch_bounds=(threads, blocks or own)
    )
    return compiled[0]


def link(text: str, capability: tuple[int, int]) -> Resources:
    """Compile PTX to machine code, and return what it needs."""
    options = LinkerOptions(arch="sm_{}{}".format(*capability), ptxas_options=["-v"])
    linker = Linker(ObjectCode.from_ptx(text.encode()), options=options)
    linker.link("cubin")
    log = linker.get_info_log().replace("\0", "")
    registers = re.findall(r"Used (\d+) registers", log)
    memory = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log)
    assert (len(registers), len(memory)) == (1, 3), f"not the report on one kernel: {log}"
    return Resources(*map(int, registers + memory))


@over_kernels
def test_everything_is_in_registers(kernel: str, itemsize: int, table: Any) -> None:
    needs = {
        capability: link(ptx(kernel, itemsize, capability), capability) for capability in LINKED
    }
    table[kernel, itemsize] = [str(resources.registers) for resources in needs.values()]
    spilled = {at: resources for at, resources in needs.items() if not resources.in_registers}
    assert not spilled


@pytest.mark.parametrize("capability", CAPABILITIES)
@over_kernels
def test_vectors_are_wide_and_products_fused(
    kernel: str, itemsize: int, capability: tuple[int, int]
) -> None:
    text = ptx(kernel, itemsize, capability)
    assert "sm_{}{}".format(*capability) in text
    pieces = driver.VECTOR * itemsize // 16  # of a vector, each an instruction
    loads, stores = WIDE[kernel]
    assert len(re.findall(PTX_LOAD[itemsize], text)) >= loads * pieces
    assert len(re.findall(PTX_STORE[itemsize], text)) >= stores * pieces
    assert text.count(PTX_FMA[itemsize]) > 0 or kernel not in FUSED
    assert "call" not in text  # every device function is a part of its kernel


def test_a_kernel_that_spills_is_noticed() -> None:
    """Eight blocks of 256 threads leave 32 registers for a thread."""
    crowded = link(ptx("columns.moments", 8, (8, 0), blocks=8), (8, 0))
    assert crowded.registers <= 32
    assert not crowded.in_registers
