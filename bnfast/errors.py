"""The two errors of choosing a backend; every other bad call is a ValueError or a TypeError."""

from __future__ import annotations


class UnknownBackendError(ValueError):
    """A backend name that is not in the table."""


class BackendUnavailableError(RuntimeError):
    """A known backend that cannot run here: not built, not installed, or without its device."""
