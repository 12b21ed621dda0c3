"""From arrays on the device to launched kernels: grids, arguments, and the numbers per channel.

A `Call` knows where its arrays are: arrays on the device are used where they lie, NumPy arrays are
copied there, and results back when it ends. The numbers per channel always live on the host. They
go up in one piece, and what comes down comes in one piece; a call that has nothing to bring down
does not wait for the device.

Memory on the device that outlives a call belongs to one thread and one stream (`_Desk`), so that it
needs no lock: what a stream does, it does in order.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np

from bnfast.backends.cuda_kernels import columns, driver, elements, geometry, merging, rows
from bnfast.backends.cuda_kernels.arrays import Frame
from bnfast.backends.cuda_kernels.driver import cuda, pointer
from bnfast.backends.cuda_kernels.geometry import Launch
from bnfast.spec import Channels


class _Desk(threading.local):
    """Buffers of float64, by device, stream, purpose and size; they are kept."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[int, Any, str, int], Any] = {}

    def numbers(self, frame: Frame, purpose: str, count: int) -> Any:
        """Return an array of ``count`` numbers: to take a part of one would take longer."""
        key = frame.device, frame.stream, purpose, count
        held = self.buffers.get(key)
        if held is None:
            with frame.memory_for(purpose, 8 * count):
                held = self.buffers[key] = cuda.device_array(count, np.float64)
        return held

    def room(self, frame: Frame, purpose: str, count: int) -> Any:
        """Return an array of at least ``count`` numbers, of which there is one that grows."""
        key = frame.device, frame.stream, purpose, 0
        held = self.buffers.get(key)
        if held is None or held.size < count:
            with frame.memory_for(purpose, 8 * count):
                held = self.buffers[key] = cuda.device_array(count, np.float64)
        return held


_MODULES = {"rows": rows, "columns": columns, "merging": merging}
_desk = _Desk()
_assumed: Launch | None = None


def _preferred(device: int) -> Launch:
    """Return how kernels are launched on a device.

    256 threads are few enough that a multiprocessor holds several blocks, some of which wait for
    memory while others add up. Each thread of the simulator is one of Python.
    """
    if driver.SIMULATED:
        return Launch(threads=8, blocks=3, part=48, rows=4)
    multiprocessors = driver.multiprocessors(device)
    return Launch(threads=256, blocks=8 * multiprocessors, part=4096, rows=8)


def assume_launch(launch: Launch | None) -> None:
    """Launch kernels like this; None: as the device likes it. Parts of sums depend on it."""
    global _assumed
    _assumed = launch


class Call:
    """One call of the contract: ``with Call(x) as call``."""

    def __init__(self, x: Any) -> None:
        self.on_host = isinstance(x, np.ndarray)
        self.frame = Frame(x)
        self.stream = self.frame.stream
        self.launch = _assumed or _preferred(self.frame.device)
        self.form = "rows" if x.ndim == 3 else "columns"
        self.channels: int = x.shape[1]
        self.plan = geometry.plan(tuple(x.shape), self.launch)
        self.element = elements.element_type(x.dtype, self.frame.device)
        self.alignment = elements.alignment(x.dtype.itemsize)
        self._copies: dict[int, Any] = {}
        self._results: list[tuple[Any, Any]] = []

    def __enter__(self) -> Call:
        self.frame.__enter__()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if error is None:
                for array, copy in self._results:
                    copy.copy_to_host(elements.flat(array), stream=self.stream)
        finally:
            self.frame.__exit__(kind, error, trace)

    def read(self, array: Any) -> Any:
        """Return an array on the device that holds what ``array`` holds; None for None."""
        if array is None or not self.on_host:
            self.frame.join(array)
            return array
        copy = self._copies.get(array.ctypes.data)
        if copy is None:
            with self.frame.memory_for("a copy of an input", array.nbytes):
                copy = cuda.to_device(elements.flat(array), stream=self.stream)
            self._copies[array.ctypes.data] = copy
        return copy

    def write(self, array: Any) -> Any:
        """Return an array on the device that ``array`` will have been filled from."""
        if array is None or not self.on_host:
            self.frame.join(array)
            return array
        copy = self._copies.get(array.ctypes.data)
        if copy is None:
            with self.frame.memory_for("a result", array.nbytes):
                flat = elements.flat(array)
                copy = cuda.device_array(flat.size, flat.dtype, stream=self.stream)
        self._results.append((array, copy))
        return copy

    def send(self, *vectors: Channels) -> Any:
        """Return channel vectors on the device, one after the other."""
        packed = np.concatenate(vectors)
        sent = _desk.numbers(self.frame, "the numbers of the channels", packed.size)
        driver.upload(sent, packed, self.stream)
        return sent

    def result(self) -> Any:
        """Return room for two numbers per channel; the next call on this stream takes it over."""
        return _desk.numbers(self.frame, "the sums of the channels", 2 * self.channels)

    def known(self, planes: int) -> Any:
        """Return room for so many numbers per part and channel."""
        count = planes * self.plan.parts * self.channels
        return _desk.room(self.frame, "the sums of parts", count)

    def bring(self, result: Any, *vectors: Channels) -> None:
        """Fill channel vectors from the device, where they lie one after the other."""
        packed = np.empty(result.size)
        driver.download(result, packed, self.stream)
        if self.stream:
            self.stream.synchronize()
        at = 0
        for vector in vectors:
            vector[:] = packed[at : at + vector.size]
            at += vector.size

    def run(self, kernel: str, blocks: int, *arguments: Any) -> None:
        """Launch the kernel of that name: "rows.moments" and the like."""
        launch = _configured(kernel, self.element, blocks, self.launch.threads, self.stream)
        launch(*arguments)

    def aligned(self, *arrays: Any) -> bool:
        """Return whether vectors of all arrays can be loaded and stored whole."""
        return self.plan.vectors and all(
            array is None or driver.address(array) % self.alignment == 0 for array in arrays
        )


@functools.lru_cache(1024)
def _configured(kernel: str, element: Any, blocks: int, threads: int, stream: Any) -> Any:
    return driver.configure(_kernel(kernel, element), element, blocks, threads, stream)


@functools.cache
def _kernel(name: str, element: Any) -> Any:
    module, factory = name.split(".")
    return getattr(_MODULES[module], factory)(elements.computed_in(element))


def measure(call: Call, x: Any) -> Any:
    """Return mean and m2 of every channel, on the device."""
    plan, channels = call.plan, call.channels
    result = call.result()
    whole = plan.parts == 1  # then the first kernel finds the result itself
    known = result if whole else call.known(4)
    call.run(
        f"{call.form}.moments", plan.sum_blocks,
        pointer(x), pointer(known), *plan.sum_geometry, call.aligned(x),
    )  # fmt: skip
    if not whole:
        call.run(
            "merging.moments", min(channels, call.launch.blocks),
            pointer(known), pointer(result), *plan.merge_geometry,
        )  # fmt: skip
    return result


def normalize(
    call: Call, x: Any, residual: Any, y: Any, moments: Any, affine: Any, eps: float,
    divisor: float, relu: bool, reverse: bool,
) -> None:  # fmt: skip
    """Fill y, for the means at ``moments`` and the variances behind them divided by ``divisor``.

    Backwards where x has just been measured: its end is still in the cache.
    """
    plan = call.plan
    call.run(
        f"{call.form}.normalize", plan.pass_blocks,
        pointer(x), pointer(residual), pointer(y), moments, affine, eps, divisor,
        *plan.pass_geometry, residual is not None, relu, call.aligned(x, residual, y),
        reverse,
    )  # fmt: skip


def add_up(call: Call, dy: Any, x: Any, y: Any, factors: Any, relu: bool) -> Any:
    """Return both sums of every channel, on the device; ``factors`` are mean, invstd, ..."""
    plan, channels = call.plan, call.channels
    result = call.result()
    whole = plan.parts == 1
    known = result if whole else call.known(2)
    call.run(
        f"{call.form}.sums", plan.sum_blocks,
        pointer(dy), pointer(x), pointer(y), pointer(factors), pointer(known),
        *plan.sum_geometry, relu, call.aligned(dy, x, y),
    )  # fmt: skip
    if not whole:
        call.run(
            "merging.sums", min(channels, call.launch.blocks),
            pointer(known), pointer(factors, channels), pointer(result), *plan.merge_geometry,
        )  # fmt: skip
    return result


def differentiate(
    call: Call, dy: Any, x: Any, y: Any, dx: Any, dresidual: Any, factors: Any, sums: Any,
    count: float, relu: bool, reverse: bool,
) -> None:  # fmt: skip
    """Fill dx and dresidual; backwards where the arrays have just been summed."""
    plan = call.plan
    call.run(
        f"{call.form}.gradient", plan.pass_blocks,
        pointer(dy), pointer(x), pointer(y), pointer(dx), pointer(dresidual), factors, sums,
        count, *plan.pass_geometry, relu, dresidual is not None,
        call.aligned(dy, x, y, dx, dresidual), reverse,
    )  # fmt: skip


def instruction_set() -> str:
    """Return what runs the kernels, for reports."""
    if driver.SIMULATED:
        return "simulator"
    major, minor = cuda.get_current_device().compute_capability
    return f"compute capability {major}.{minor}"
