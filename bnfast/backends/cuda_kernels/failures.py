"""What can be wrong with a GPU, and the sentence for it.

A user reads these: each says what is missing or too old, and what to do. None of them is followed
by another backend in its place.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Final

from bnfast.errors import BackendUnavailableError

OUT_OF_MEMORY: Final = 2
"""The driver's code, CUDA_ERROR_OUT_OF_MEMORY."""

OLDEST: Final = {12: (5, 0), 13: (7, 5)}
"""The lowest compute capability that a CUDA toolkit compiles for, by its major version."""

FORKED: Final = (
    "CUDA was in use when this process was forked, and does not work in the child; start processes "
    'with multiprocessing.get_context("spawn") or "forkserver"'
)

BUILT_IN: Final = "the package numba-cuda, which brings Numba's CUDA target, is not installed"

_in_use = False
_forked = False


def unavailable(cuda: Any) -> str | None:
    """Return None, or one sentence saying why Numba's CUDA target cannot run here.

    Parameters
    ----------
    cuda : module
        ``numba.cuda``, not the simulator. Its driver is initialised by this.
    """
    global _in_use
    if _forked:
        return FORKED
    _in_use = True
    try:
        count = len(cuda.gpus)
    except Exception as error:  # ImportError without a driver, CudaAPIError where it refuses
        return f"no CUDA driver can be used: {_one_line(error)}"
    if count == 0:
        return "there is no NVIDIA GPU that this process may use"
    try:
        toolkit = tuple(cuda.runtime.get_version())
    except Exception as error:  # no runtime or compiler library, or one that does not load
        return f"the libraries of the CUDA toolkit cannot be used: {_one_line(error)}"
    driver = tuple(cuda.cudadrv.driver.driver.get_version())
    if driver[0] < toolkit[0]:
        extra = f", or install bnfast[cuda{driver[0]}]" if driver[0] in OLDEST else ""
        return (
            f"the NVIDIA driver is too old: it is for CUDA {_dotted(driver)}, and the CUDA toolkit "
            f"that is installed is {_dotted(toolkit)}; update the driver{extra}"
        )
    capability, oldest = tuple(cuda.gpus[0].compute_capability), OLDEST.get(toolkit[0], (7, 5))
    if capability < oldest:
        return (
            f"the GPU is too old: its compute capability is {_dotted(capability)}, and CUDA "
            f"{_dotted(toolkit)} needs {_dotted(oldest)}"
        )
    return None


def not_imported(error: ImportError) -> str:
    """Return the sentence where Numba, numba-cuda or the CUDA bindings are missing or broken."""
    return f"numba.cuda cannot be used: {_one_line(error)}"


def refuse_fork() -> None:
    """Raise BackendUnavailableError in a process that was forked while CUDA was in use."""
    if _forked:
        raise BackendUnavailableError(FORKED)


def refuse_capture(cuda: Any, stream: int) -> None:
    """Raise RuntimeError while a stream records a CUDA graph.

    What goes up with a call is recorded as a copy from host memory that a replay no longer finds.
    """
    if int(cuda.cudadrv.driver.driver.cuStreamIsCapturing(stream)):
        raise RuntimeError(
            "a call cannot be recorded in a CUDA graph: the parameters go up with each call, from "
            "host memory that a replay would not find"
        )


@dataclass(slots=True)
class MemoryFor:
    """A context that turns errors of full memory into one MemoryError with the sizes.

    Those of Numba, CuPy and torch. (`contextlib.contextmanager` would cost a microsecond.)

    Attributes
    ----------
    purpose : str
        What the memory is for.
    size : int
        Its bytes.
    place : str
        The device that it is wanted on.
    cuda : module
        ``numba.cuda``, which knows how much memory is free.
    """

    purpose: str
    size: int
    place: str
    cuda: Any

    def __enter__(self) -> None:
        """Nothing yet."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raise MemoryError instead, if that is what it is."""
        if error is not None and out_of_memory(error):
            raise MemoryError(
                f"no memory on {self.place} for {self.purpose} of {self.size:,} bytes"
                f"{_free(self.cuda)}"
            ) from error


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error of Numba, CuPy or torch says that a GPU's memory is full."""
    return (
        isinstance(error, MemoryError)  # CuPy's is one
        or type(error).__name__ == "OutOfMemoryError"  # torch's is a RuntimeError
        or getattr(error, "code", None) == OUT_OF_MEMORY
    )


def _free(cuda: Any) -> str:
    """Return how much memory is left, where the driver says so."""
    try:
        info = cuda.current_context().get_memory_info()
        return f"; of {info.total:,} bytes {info.free:,} are free"
    except Exception:  # this is a part of a message about an error: no place for another one
        return ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(" .:") or type(error).__name__


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version[:2]))


def _after_fork_in_child() -> None:
    global _forked
    _forked = _in_use


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
