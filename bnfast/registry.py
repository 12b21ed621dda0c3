"""The table of backends, the choice among them, and every message about it.

Table
    `_BUILT_IN` lists the backends in order of preference: name, module, the line that installs it,
    and the memory that ``auto`` uses it for. A module is imported when its backend is first asked
    for. `register_backend` adds a row for a third party; ``auto`` never picks such a row.
Choice
    ``argument > use_backend() > set_backend() > BNFAST_BACKEND > auto``: the one expression in
    `current`, whose last term, `_default`, is the last two. Wherever a name is accepted, so is a
    comma list, in order of preference.
    **A named backend is strict**: if it is unknown or cannot run, that is an error, never another
    backend. ``auto`` is forgiving and follows the data: host arrays go to the first host backend
    that can run, arrays on a GPU go to the GPU backend.
Reasons
    A backend cannot run if importing its module raises ImportError, or if its ``unavailable()``
    returns a sentence. Any other exception is a bug in the backend and propagates.
Cost
    `choose` is on the way of every call: about 0.1 microseconds (``benchmarks/test_choice.py``).
    Hence the cached `_default`, `_resolve` and `_automatic`. Only successes are cached, and a
    row is never replaced, so nothing cached can go stale.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
import threading
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, cast

from numpy import ndarray

from bnfast.device import DeviceArray, on_device
from bnfast.errors import BackendUnavailableError, UnknownBackendError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bnfast.spec import DeviceKernels, Kernels

AUTO: Final = "auto"


class Backend(NamedTuple):
    """One row of `list_backends`."""

    name: str
    """What to write in ``backend=`` and ``BNFAST_BACKEND``."""
    available: bool
    """Whether the backend can run in this process."""
    reason: str | None
    """Why it cannot, in one sentence; None if it can."""
    install: str
    """The command that installs it."""
    module: str
    """The module that holds its kernels."""


class Entry(NamedTuple):
    """One row of the table."""

    name: str
    module: str
    install: str
    automatic_for: Literal["host", "device"] | None
    """The memory whose arrays ``auto`` gives to this backend; None: it runs only when named."""


class Choice(NamedTuple):
    """A backend that can run, and who chose it."""

    name: str
    kernels: Kernels
    source: str
    automatic: bool


_BUILT_IN: Final = (
    Entry(
        "cython",
        "bnfast.backends.cython_openmp",
        "pip install --force-reinstall --no-binary bnfast bnfast  # needs a C compiler",
        "host",
    ),
    Entry(
        "numba",
        "bnfast.backends.numba_parallel",
        'pip install "bnfast[numba]"',
        "host",
    ),
    Entry(
        "cuda",
        "bnfast.backends.numba_cuda",
        'pip install --upgrade "bnfast[cuda12]"  # or bnfast[cuda13]',
        "device",
    ),
    Entry(
        "numpy",
        "bnfast.backends.numpy_reference",
        "pip install --force-reinstall bnfast",
        "host",
    ),
)

_table: dict[str, Entry] = {entry.name: entry for entry in _BUILT_IN}
_process_choice: Choice | None = None
_context_choice: ContextVar[Choice | None] = ContextVar("bnfast_backend", default=None)
_announcement = threading.Lock()  # taken by whoever logs the automatic choice, and never given back


def list_backends() -> dict[str, Backend]:
    """Return every known backend, in order of preference, with the reason if it cannot run.

    Imports the modules of all of them, which takes a second where Numba is installed.

    Returns
    -------
    dict of str to Backend
        Keyed by name; see `Backend` for the fields.

    Examples
    --------
    >>> bnfast.list_backends()["numpy"].available
    True
    """
    return {entry.name: _describe(entry) for entry in tuple(_table.values())}


def get_backend() -> str:
    """Return the name of the backend that a call on a NumPy array would use here and now.

    Raises
    ------
    UnknownBackendError, BackendUnavailableError
        If ``BNFAST_BACKEND`` decides, and names no backend that can run.

    Examples
    --------
    >>> with bnfast.use_backend("numpy"):
    ...     bnfast.get_backend()
    'numpy'
    """
    return current().name


def set_backend(name: str | None) -> None:
    """Choose the backend for the whole process, below `use_backend` and a ``backend`` argument.

    Parameters
    ----------
    name : str or None
        A backend name, a comma list in order of preference (the first that can run is taken, now),
        ``"auto"``, or None to leave the choice to ``BNFAST_BACKEND`` again.

    Raises
    ------
    UnknownBackendError
        If a name is not in `list_backends`. The choice is then left as it was.
    BackendUnavailableError
        If none of the names can run here. The choice is then left as it was.

    Examples
    --------
    >>> bnfast.set_backend("numpy")
    >>> bnfast.get_backend()
    'numpy'
    >>> bnfast.set_backend(None)
    """
    global _process_choice
    _process_choice = None if name is None else _named(name, "set_backend()")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend inside a ``with`` block.

    The choice lives in a `contextvars.ContextVar`: asyncio tasks and `asyncio.to_thread` inherit
    it, other tasks do not see it, and a new `threading.Thread` starts without it (it inherits
    where ``sys.flags.thread_inherit_context`` is set).

    Parameters
    ----------
    name : str
        As for `set_backend`.

    Raises
    ------
    UnknownBackendError, BackendUnavailableError
        As for `set_backend`, on entering the block.

    Examples
    --------
    >>> with bnfast.use_backend("numpy"):
    ...     y = bnfast.BatchNorm2d(3)(np.ones((2, 3, 4, 4), np.float32))
    """
    token = _context_choice.set(_named(name, "use_backend()"))
    try:
        yield
    finally:
        _context_choice.reset(token)


def register_backend(name: str, *, module: str, install: str) -> None:
    """Add a backend of your own; it runs when it is named.

    Parameters
    ----------
    name : str
        A new name: lower-case letters, digits, ``_`` and ``-``, starting with a letter.
    module : str
        Dotted path of a module that matches `bnfast.spec.Kernels`. Imported at first use.
    install : str
        The command to show to a user who does not have it.

    Raises
    ------
    ValueError
        If the name is taken or malformed, ``module`` is no dotted path, or ``install`` is empty.

    Examples
    --------
    >>> bnfast.register_backend("mine", module="mine.kernels", install="pip install mine")
    >>> bnfast.list_backends()["mine"].install
    'pip install mine'
    """
    if name == AUTO or not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise ValueError(
            f"cannot register a backend as {name!r}: a name has lower-case letters, digits, '_' "
            f"and '-', starts with a letter, and is not {AUTO!r}"
        )
    if not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"backend {name!r}: module={module!r} is no dotted path such as 'pkg.mod'")
    if not install.strip():
        raise ValueError(f"backend {name!r}: install= is empty; give the command that installs it")
    entry = Entry(name, module, install, automatic_for=None)
    # setdefault looks and inserts in one step: of two threads that register a name, one wins.
    holder = _table.setdefault(name, entry)
    if holder is not entry:
        raise ValueError(
            f"backend {name!r} is already registered (module {holder.module}); choose another name"
        )


def load(name: str) -> Kernels:
    """Return the kernels of a backend.

    Raises UnknownBackendError or BackendUnavailableError.
    """
    return _named(name, "load()").kernels


def loaded() -> list[Kernels]:
    """Return the backend modules that this process has imported so far, without importing any."""
    return [
        cast("Kernels", sys.modules[entry.module])
        for entry in tuple(_table.values())
        if sys.modules.get(entry.module) is not None
    ]


def choose(argument: str | None, x: object = None) -> Kernels:
    """Return the kernels for a call on ``x`` that was given ``backend=argument``.

    Raises
    ------
    UnknownBackendError
        If a name is not in the table.
    BackendUnavailableError
        If none of the backends that were named can run; or if ``x`` lives on a GPU and ``auto``
        has no backend for it.
    TypeError
        If ``x`` lives on a GPU and the backend that was named does not read it there.
    """
    choice = current(argument)
    if type(x) is ndarray or not on_device(x):
        return choice.kernels
    return _for_device(choice, x).kernels


def choice_for(argument: str | None, x: object) -> Choice:
    """Return the choice whose kernels `choose` returns."""
    choice = current(argument)
    return _for_device(choice, x) if on_device(x) else choice


def describe(argument: str | None, x: object) -> DeviceArray | None:
    """Return what stands for ``x`` in a call that was given ``backend=argument``.

    None if ``x`` is to be taken as a NumPy array. Raises what `choose` raises.
    """
    if isinstance(x, ndarray):
        return None
    kernels = choose(argument, x)
    return cast("DeviceKernels", kernels).describe(x) if kernels.accepts(x) else None


def current(argument: str | None = None) -> Choice:
    """Return the choice in force, and who made it: this expression is the order of precedence."""
    return (
        (None if argument is None else _named(argument, "the argument backend="))
        or _context_choice.get()
        or _process_choice
        or _default()
    )


@functools.cache
def _instruction_set_limit() -> str:
    """Return the highest instruction set to use, or nothing for what the CPU has."""
    return os.environ.get("BNFAST_ISA", "").strip()


def _environment() -> Choice | None:
    """Return what ``BNFAST_BACKEND`` chooses; None if it is unset or empty."""
    names = os.environ.get("BNFAST_BACKEND", "").strip()
    return _named(names, "the environment variable BNFAST_BACKEND") if names else None


@functools.cache
def _default() -> Choice:
    """Return the choice where the program made none: ``BNFAST_BACKEND`` before ``auto``."""
    return _environment() or _automatic()


@functools.cache
def _automatic() -> Choice:
    """Return the choice for host arrays where nobody named a backend, and log it once."""
    candidates = [entry for entry in tuple(_table.values()) if entry.automatic_for == "host"]
    choice = _resolve(",".join(entry.name for entry in candidates), AUTO)
    if _announcement.acquire(blocking=False):
        _announce(choice, candidates)
    return choice._replace(automatic=True)


def _announce(choice: Choice, candidates: list[Entry]) -> None:
    """Log the automatic choice: a warning if all that is left is the last resort."""
    import logging  # 4 ms, a sixth of what `import bnfast` may cost

    logger = logging.getLogger("bnfast")
    if choice.name != candidates[-1].name:
        logger.info("backend %r chosen automatically", choice.name)
        return
    better = _reasons(_describe(entry) for entry in candidates[:-1])
    logger.warning(
        "no fast backend can run here; using %r, which is much slower:\n%s", choice.name, better
    )


def _for_device(choice: Choice, x: object) -> Choice:
    """Return the choice for an array on a GPU, where ``choice`` is in force."""
    if choice.automatic:
        names = [entry.name for entry in tuple(_table.values()) if entry.automatic_for == "device"]
        choice = _resolve(",".join(names), "auto, for an array on a GPU")
    array = x.array if isinstance(x, DeviceArray) else x
    if not choice.kernels.accepts(array):
        kind = f"{type(array).__module__}.{type(array).__qualname__}"
        raise TypeError(
            f"backend {choice.name!r} (asked for by {choice.source}) does not read arrays of type "
            f"{kind} on the device where this one lives; copy the array to the host first, or "
            f"leave the choice to backend={AUTO!r}"
        )
    return choice


def _named(names: str, source: str) -> Choice:
    """Return the first backend of a comma list that can run; ``source`` is who asked for it."""
    if not isinstance(names, str):
        raise TypeError(
            f"{source} takes a backend name or a comma list of names, "
            f"not {type(names).__name__}: {names!r}"
        )
    return _resolve(names, source)


@functools.cache
def _resolve(names: str, source: str) -> Choice:
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name != AUTO and name not in _table:
            raise UnknownBackendError(_unknown_message(name, source))
    cause = None
    for name in wanted:
        if name == AUTO:
            return _automatic()
        try:
            return Choice(name, _import(_table[name]), source, automatic=False)
        except BackendUnavailableError as error:
            cause = cause or error.__cause__
    raise BackendUnavailableError(_unavailable_message(wanted, source)) from cause


def _import(entry: Entry) -> Kernels:
    """Return the module of a backend, or raise BackendUnavailableError with the bare reason."""
    try:
        kernels = cast("Kernels", importlib.import_module(entry.module))
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == entry.module:
            reason = f"the module {entry.module} was not built or installed"
        else:
            reason = f"importing {entry.module} failed: {error}"
        raise BackendUnavailableError(reason) from error
    limit = _instruction_set_limit()
    if limit and hasattr(kernels, "limit_instruction_set"):
        try:
            kernels.limit_instruction_set(limit)
        except ValueError as error:
            raise BackendUnavailableError(
                f"the environment variable BNFAST_ISA: {error}"
            ) from error
    sentence = kernels.unavailable()
    if sentence is not None:
        raise BackendUnavailableError(sentence)
    return kernels


def _describe(entry: Entry) -> Backend:
    try:
        _import(entry)
    except BackendUnavailableError as error:
        return Backend(entry.name, False, str(error), entry.install, entry.module)
    return Backend(entry.name, True, None, entry.install, entry.module)


def _reasons(backends: Iterator[Backend]) -> str:
    return "\n".join(
        f"  {backend.name}: {backend.reason}\n    install: {backend.install}"
        for backend in backends
    )


def _unknown_message(name: str, source: str) -> str:
    import difflib  # needed only here

    names = [AUTO, *_table]
    nearest = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return (
        f"unknown backend {name!r} (asked for by {source}); {hint}Known names: {', '.join(names)}"
    )


def _unavailable_message(wanted: list[str], source: str) -> str:
    backends = list_backends()
    available = ", ".join(name for name, backend in backends.items() if backend.available)
    return (
        f"backend {','.join(wanted)!r} (asked for by {source}) cannot run here\n"
        f"{_reasons(backends[name] for name in wanted)}\n"
        f"available here: {available or 'none'}"
    )


def _reset() -> None:
    """Return to the state right after import, so that a test can start from it."""
    global _process_choice, _announcement
    _table.clear()
    _table.update({entry.name: entry for entry in _BUILT_IN})
    _process_choice = None
    _announcement = threading.Lock()
    for cached in (_default, _instruction_set_limit, _automatic, _resolve):
        cached.cache_clear()
