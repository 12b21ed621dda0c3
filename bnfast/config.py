"""The report on an installation: what can run here, what is in use and who decided it, versions.

It is made to be pasted into a bug report, so it has to come out whole where the configuration
itself is the bug: a bad value in one of the ``BNFAST_`` variables is a line of the report.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from bnfast import memory, registry, threads
from bnfast.errors import BackendUnavailableError, UnknownBackendError

if TYPE_CHECKING:
    from collections.abc import Iterator

_WIDTH = 99
_INDENT = 12  # where the second column of the report starts
_OPENMP = {None: "", True: ", with OpenMP", False: ", built without OpenMP, so on one thread"}


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...
@overload
def show_config(mode: Literal["dict"]) -> dict[str, Any]: ...
def show_config(mode: Literal["stdout", "dict"] = "stdout") -> dict[str, Any] | None:
    """Report the backends, the choice among them, the threads, the memory kept, and versions.

    ``python -m bnfast`` prints the same. All backends are imported for it, which takes a second
    where Numba is installed.

    Parameters
    ----------
    mode : {"stdout", "dict"}
        Print the report, or return it.

    Returns
    -------
    dict or None
        With ``"dict"``, a mapping that the `json` module accepts. Its keys: ``versions``, by name,
        or None where absent (``cython`` is the one that translated the extension in use);
        ``platform``; ``backends``, for each name ``available``, ``reason``, ``install``,
        ``module``, ``instruction_set`` and ``openmp`` (None where a backend does not say);
        ``backend`` (``name``, ``chosen_by``, ``error``); ``threads`` (``count``, ``source``,
        ``error``); ``cache`` (``idle``, the bytes kept for reuse, ``limit``, ``source``,
        ``error``).

    Raises
    ------
    ValueError
        For any other ``mode``.

    Examples
    --------
    >>> bnfast.show_config(mode="dict")["backends"]["numpy"]["available"]
    True
    """
    if mode not in ("stdout", "dict"):
        raise ValueError(f"mode must be 'stdout' or 'dict', not {mode!r}")
    config = _collect()
    if mode == "dict":
        return config
    print(*_lines(config), sep="\n")
    return None


def _collect() -> dict[str, Any]:
    import platform  # with importlib.metadata and textwrap 20 ms, which only a report needs

    import bnfast  # here, because the package imports this module while it is imported itself

    backends = {name: _backend(backend) for name, backend in registry.list_backends().items()}
    return {
        "versions": {
            "bnfast": bnfast.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "numba": _numba_version(),
            "cython": _built_with_cython(),
        },
        "platform": platform.platform(),
        "backends": backends,
        "backend": _chosen_backend(),
        "threads": _thread_count(),
        "cache": _memory_kept(),
    }


def _backend(backend: registry.Backend) -> dict[str, Any]:
    kernels = registry.load(backend.name) if backend.available else None
    return {
        "available": backend.available,
        "reason": backend.reason,
        "install": backend.install,
        "module": backend.module,
        "instruction_set": None if kernels is None else kernels.instruction_set(),
        "openmp": getattr(kernels, "OPENMP", None),
    }


def _chosen_backend() -> dict[str, Any]:
    try:
        choice = registry.current()
    except (UnknownBackendError, BackendUnavailableError) as error:
        return {"name": None, "chosen_by": None, "error": str(error)}
    return {"name": choice.name, "chosen_by": choice.source, "error": None}


def _thread_count() -> dict[str, Any]:
    try:
        count = threads.current()
    except ValueError as error:
        return {"count": None, "source": None, "error": str(error)}
    return {"count": count.number, "source": count.source, "error": None}


def _memory_kept() -> dict[str, Any]:
    idle = memory.idle()
    try:
        limit = memory.current()
    except ValueError as error:
        return {"idle": idle, "limit": None, "source": None, "error": str(error)}
    return {"idle": idle, "limit": limit.size, "source": limit.source, "error": None}


def _built_with_cython() -> str | None:
    """Return the version of Cython that translated the extension in use, if one is."""
    for kernels in registry.loaded():
        version = getattr(kernels, "CYTHON_VERSION", None)
        if version is not None:
            return str(version)
    return None


def _numba_version() -> str | None:
    from importlib import metadata

    try:
        return metadata.version("numba")
    except metadata.PackageNotFoundError:
        return None


def _lines(config: dict[str, Any]) -> Iterator[str]:
    versions = config["versions"]
    backend = config["backend"]
    count = config["threads"]
    cache = config["cache"]
    yield from _entry(
        "versions", ", ".join(f"{name} {number or '(none)'}" for name, number in versions.items())
    )
    yield from _entry("platform", config["platform"])
    yield ""
    yield from _entry("backend", "can it run here?")
    for name, row in config["backends"].items():
        if row["available"]:
            yield from _entry(name, f"yes: {row['instruction_set']}{_OPENMP[row['openmp']]}")
        else:
            yield from _entry(name, f"no: {row['reason']}")
            # Not wrapped: the line is there to be copied.
            yield f"{'':<{_INDENT}}install: {row['install']}"
    yield ""
    yield from _entry(
        "in use", backend["error"] or f"{backend['name']}, chosen by {backend['chosen_by']}"
    )
    yield from _entry("threads", count["error"] or f"{count['count']}, from {count['source']}")
    yield from _entry(
        "cache",
        cache["error"]
        or f"{cache['idle']} bytes idle, {cache['limit']} at most, from {cache['source']}",
    )


def _entry(label: str, text: str) -> Iterator[str]:
    """Yield ``text`` wrapped into the second column, with ``label`` in the first."""
    import textwrap

    for line in text.splitlines():
        for piece in textwrap.wrap(line, _WIDTH - _INDENT, break_on_hyphens=False):
            yield f"{label:<{_INDENT}}{piece}"
            label = ""
