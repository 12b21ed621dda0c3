"""What a process can tell about the fork that it came from, if any.

A fork copies one thread. OpenMP's worker threads are not copied, but GNU's runtime believes that
they are there: a parallel region of the forking thread would wait for them for ever. Who was there
before the fork can end them in time (`bnfast.threads`); who is imported only after it can do no
more than notice.
"""

from __future__ import annotations

from typing import Final

_FORKED: Final = 0x40
"""Linux's flag of a process that was forked and has not executed another program since."""


def forked(proc: str = "/proc/self") -> bool:
    """Return whether this process is a fork of a program that may have used any library.

    A child of multiprocessing's fork server is not: the server imports, and computes nothing. Where
    the system does not tell, the answer is no.
    """
    # The name of the program stands in parentheses, and may hold some itself.
    fields = _read(f"{proc}/stat").rpartition(b")")[2].split()
    if len(fields) < 7 or not int(fields[6]) & _FORKED:
        return False
    return b"multiprocessing.forkserver" not in _read(f"{proc}/cmdline")


def openmp_is_loaded(proc: str = "/proc/self") -> bool:
    """Return whether GNU's OpenMP runtime is in this process under its own name.

    Wheels bring copies under names of their own, which nobody else uses.
    """
    return b"/libgomp.so" in _read(f"{proc}/maps")


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""
