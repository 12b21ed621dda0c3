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

from bnfast.backends.cuda_kernels import driver, elements
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

BY_INTEGERS = "bfloat16 by integers"
"""Rounded without an instruction for it, for capabilities below `elements.ROUNDS_BFLOAT16`."""

ELEMENTS = elements.ELEMENT_TYPES | {BY_INTEGERS: elements.bfloat16_by_integers}

over_kernels = pytest.mark.parametrize("kernel", factories())
over_elements = pytest.mark.parametrize("element", ELEMENTS)

VECTORS = {2: r"(?:v2\.[bu]32|v4\.[bu]16)", 4: r"v4\.[bf]32", 8: r"v2\.[bf]64"}
"""What moves 16 bytes, or a vector of less, by the size of an element."""

PTX_FMA = {4: "fma.rn.f32", 8: "fma.rn.f64"}
PTX_ROUND = {"float16": "cvt.rn.f16.f32", "bfloat16": "cvt.rn.bf16.f32"}


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
def table(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], list[str]]]:
    """Collect the registers of each kernel, and print them in the end."""
    rows: dict[tuple[str, str], list[str]] = {}
    yield rows
    lines = [("registers a thread", [".".join(map(str, capability)) for capability in LINKED])]
    for names, cells in rows.items():
        lines.append((" ".join(names), cells))
    plugins = request.config.pluginmanager
    with plugins.getplugin("capturemanager").global_and_fixture_disabled():
        for name, cells in lines:
            text = f"\n{name:38}" + "".join(f"{cell:>6}" for cell in cells)
            plugins.getplugin("terminalreporter").write(text)


@functools.cache
def ptx(kernel: str, element: str, capability: tuple[int, int], blocks: int | None = None) -> str:
    """Return a kernel's PTX, for so many blocks a multiprocessor instead of its own number."""
    stored = ELEMENTS[element]
    made = factories()[kernel](elements.computed_in(stored))
    threads, own = launch_bounds(made, stored)
    compiled: tuple[str, Any] = cuda.compile_ptx(
        made, signature(made, stored), cc=capability, launch_bounds=(threads, blocks or own)
    )
    return compiled[0]


def runs(element: str, capability: tuple[int, int]) -> bool:
    """Return whether a GPU of that capability is given kernels for such elements."""
    if not element.startswith("bfloat16"):
        return True
    return (element == BY_INTEGERS) == (capability < elements.ROUNDS_BFLOAT16)


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


@over_elements
@over_kernels
def test_everything_is_in_registers(kernel: str, element: str, table: Any) -> None:
    needs = {
        capability: link(ptx(kernel, element, capability), capability)
        for capability in LINKED
        if runs(element, capability)
    }
    table[kernel, element] = [
        str(needs[capability].registers) if capability in needs else "" for capability in LINKED
    ]
    spilled = {at: resources for at, resources in needs.items() if not resources.in_registers}
    assert not spilled


@pytest.mark.parametrize(
    ("element", "capability"),
    [(element, at) for element in ELEMENTS for at in CAPABILITIES if runs(element, at)],
)
@over_kernels
def test_vectors_are_wide_and_products_fused(
    kernel: str, element: str, capability: tuple[int, int]
) -> None:
    text = ptx(kernel, element, capability)
    assert "sm_{}{}".format(*capability) in text
    stored, real = ELEMENTS[element], elements.computed_in(ELEMENTS[element])
    itemsize = stored.bitwidth // 8
    pieces = max(1, driver.VECTOR * itemsize // 16)  # of a vector, each an instruction
    loads, stores = WIDE[kernel]
    vector = VECTORS[itemsize]
    assert len(re.findall(rf"ld\.global(?:\.nc)?\.{vector}", text)) >= loads * pieces
    assert len(re.findall(rf"st\.global\.{vector}", text)) >= stores * pieces
    assert text.count(PTX_FMA[real.bitwidth // 8]) > 0 or kernel not in FUSED
    if element in PTX_ROUND and stores:
        assert text.count(PTX_ROUND[element]) >= stores * driver.VECTOR
    assert "call" not in text  # every device function is a part of its kernel


def test_a_kernel_that_spills_is_noticed() -> None:
    """Eight blocks of 256 threads leave 32 registers for a thread."""
    crowded = link(ptx("columns.moments", "float64", (8, 0), blocks=8), (8, 0))
    assert crowded.registers <= 32
    assert not crowded.in_registers
