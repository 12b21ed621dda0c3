"""What kernels are written with: the only file that imports Numba's CUDA target.

Everything else imports ``cuda`` from here, at the top of its module, where Numba's simulator
replaces it while a kernel runs. The functions below exist twice: for a GPU, where some of them are
LLVM instructions that Numba has no name for, and as plain Python for the simulator. What reads and
writes elements is in `elements`, in the same way.

    device         decorates a function that kernels call
    configure      a kernel, its grid and a stream -> what launches it
    pointer        an array on the device -> the argument of a kernel
    upload         numbers on the host -> an array on the device
    download       the way back
    barrier        wait for the other threads of the block
    fma            a * b + c, rounded once
    divide         a // b of numbers that are not negative
    cast           a number in the type of another one
"""

# What exists twice has two signatures, and type checkers see the simulator's `numba.cuda` only.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return,attr-defined,misc"

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import cuda as _cuda

from bnfast.backends.cuda_kernels import failures
from bnfast.backends.cuda_kernels.signatures import launch_bounds, signature
from bnfast.device import DeviceArray

cuda: Any = _cuda  # whose names type checkers see only some of, those of the simulator

SIMULATED: bool = bool(numba.config.ENABLE_CUDASIM)

VECTOR = 4
"""Elements that a thread moves at a time: 16 bytes of float32, 32 of float64, 8 where they have 16
bits."""

MOST_THREADS = 256
"""Threads of a block, at most: shared memory is reserved for as many."""

if SIMULATED:
    float32: Any = np.float32
    float64: Any = np.float64
    int32: Any = np.int32
    int64: Any = np.int64
    sqrt: Any = np.sqrt

    def device(function: Callable[..., Any]) -> Callable[..., Any]:
        """Leave the function as it is: the simulator runs it as a part of the kernel."""
        return function

    class Pointer:
        """What a kernel gets for an array: elements by number, and no others."""

        def __init__(self, elements: Any) -> None:
            self.elements = elements

        def __getitem__(self, i: int) -> Any:
            """Return element ``i``."""
            if i < 0:
                raise IndexError(f"element {i} is before the array")
            return self.elements[i]

        def __setitem__(self, i: int, value: Any) -> None:
            """Replace element ``i``."""
            if i < 0:
                raise IndexError(f"element {i} is before the array")
            self.elements[i] = value

    def pointer(array: Any, at: int = 0) -> Any:
        """Return what a kernel takes for the elements of an array from ``at`` on."""
        if array is None:
            return None
        return Pointer(_host(array).reshape(-1)[at:])

    def address(array: Any) -> int:
        """Return where an array on the device lies."""
        return int(_host(array).ctypes.data)

    def upload(array: Any, numbers: Any, stream: Any) -> None:
        """Fill an array on the device with as many numbers."""
        array.copy_to_device(numbers, stream=stream)

    def download(array: Any, numbers: Any, stream: Any) -> None:
        """Fill ``numbers`` from an array on the device, at the latest when the stream is done."""
        array.copy_to_host(numbers, stream=stream)

    def _host(array: Any) -> Any:
        """Return the NumPy array that the simulator has for an array on the device."""
        if hasattr(array, "_ary"):
            return array._ary
        return np.asarray(array).view(array.dtype)  # bfloat16 has no letter in an interface

    def configure(kernel: Any, element: Any, blocks: int, threads: int, stream: Any) -> Any:
        """Return a function that launches a kernel, which numbers cannot make fail or warn."""
        simulated = cuda.jit(kernel)

        def launch(*arguments: Any) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                simulated[blocks, threads, stream](*arguments)

        return launch

    def barrier() -> None:
        """Wait for the other threads of the block."""
        threading.current_thread().syncthreads()

    def fma(a: Any, b: Any, c: Any) -> Any:
        """Return a * b + c; a float32 product is exact in float64."""
        return type(a)(float(a) * float(b) + float(c))

    def divide(a: int, b: int) -> int:
        """Return a // b, for a >= 0 and b > 0."""
        return a // b

    def cast(value: Any, like: Any) -> Any:
        """Return ``value`` in the type of ``like``."""
        return type(like)(value)

else:
    if cuda.implementation == "Built-in":
        raise ImportError(failures.BUILT_IN)
    from numba.cuda import types
    from numba.cuda.core.errors import NumbaPerformanceWarning
    from numba.cuda.extending import intrinsic

    float32, float64, int32, int64 = types.float32, types.float64, types.int32, types.int64
    sqrt = math.sqrt
    device = cuda.jit(device=True)

    def address(array: Any) -> int:
        """Return where an array on the device lies."""
        if isinstance(array, DeviceArray):
            return array.address
        return array.device_ctypes_pointer.value

    # Numba's methods look into contiguity and contexts first. Without them, and with the address
    # above in place of an interface, a small call takes Python 73 us instead of 130.

    def upload(array: Any, numbers: Any, stream: Any) -> None:
        """Fill an array on the device with as many numbers."""
        cuda.cudadrv.driver.host_to_device(array, numbers, numbers.nbytes, stream=stream)

    def download(array: Any, numbers: Any, stream: Any) -> None:
        """Fill ``numbers`` from an array on the device, at the latest when the stream is done."""
        cuda.cudadrv.driver.device_to_host(numbers, array, numbers.nbytes, stream=stream)

    def pointer(array: Any, at: int = 0) -> int:
        """Return the address of element ``at`` of an array on the device; 0 for None."""
        return 0 if array is None else address(array) + at * array.dtype.itemsize

    @functools.cache
    def _compiled(kernel: Any, element: Any) -> Any:
        bounds = launch_bounds(kernel, element)
        return cuda.jit(signature(kernel, element), launch_bounds=bounds)(kernel)

    def configure(kernel: Any, element: Any, blocks: int, threads: int, stream: Any) -> Any:
        """Return a function that launches a kernel."""
        with warnings.catch_warnings():
            # Small arrays need few blocks; Numba warns of that.
            warnings.simplefilter("ignore", NumbaPerformanceWarning)
            return _compiled(kernel, element)[blocks, threads, stream]

    @device
    def barrier():
        """Wait for the other threads of the block."""
        cuda.syncthreads()

    @device
    def fma(a, b, c):
        """Return a * b + c, rounded once."""
        return cuda.fma(a, b, c)

    @intrinsic
    def divide(typing_context, a, b):
        """Return a // b, for a >= 0 and b > 0: without Python's rules for signs and for 0."""

        def generate(context, builder, signature, arguments):
            return builder.udiv(
                *(
                    context.cast(builder, argument, kind, types.int64)
                    for argument, kind in zip(arguments, (a, b), strict=True)
                )
            )

        return types.int64(a, b), generate

    @intrinsic
    def cast(typing_context, value, like):
        """Return ``value`` in the type of ``like``."""

        def generate(context, builder, signature, arguments):
            return context.cast(builder, arguments[0], value, like)

        return like(value, like), generate


def unavailable() -> str | None:
    """Return None, or one sentence saying why kernels cannot run here."""
    return None if SIMULATED else failures.unavailable(cuda)


@functools.cache
def multiprocessors(device: int) -> int:
    """Return how many multiprocessors a device has."""
    return 1 if SIMULATED else int(cuda.gpus[device].MULTIPROCESSOR_COUNT)


@functools.cache
def capability(device: int) -> tuple[int, int]:
    """Return the compute capability of a device; the simulator does what the newest does."""
    return (99, 0) if SIMULATED else tuple(cuda.gpus[device].compute_capability)
