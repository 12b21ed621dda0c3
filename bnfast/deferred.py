"""Arrays that are not computed yet: how they are recognised, and who calls on them.

A dask array is a recipe for chunks. Taken for a NumPy array it would be computed, all of it, in
memory. So `bnfast.checks.admit` raises `Deferred` for one, and a call that knows how to defer its
own work catches that and passes the array to the `engine`. A call that does not lets it pass: it is
a TypeError that says what to do. A call on a NumPy array takes no step more for it.
"""

from __future__ import annotations

from typing import Any


class Deferred(TypeError):
    """Raised where an array is wanted and a dask collection comes.

    Attributes
    ----------
    collection : object
        The collection.
    """

    def __init__(self, collection: Any, name: str) -> None:
        kind = type(collection).__name__
        super().__init__(
            f"{name} is a collection of dask ({kind}), which is not computed here: pass "
            f"{name}.compute(), or see bnfast.interop.dask for what works on dask arrays"
        )
        self.collection = collection

    @property
    def engine(self) -> Any:
        """The module with the calls on such arrays; imported when it is asked for."""
        from bnfast.interop import dask

        return dask


def is_deferred(x: object) -> bool:
    """Return whether ``x`` is a dask collection: by dask's protocol, without importing dask."""
    graph = getattr(type(x), "__dask_graph__", None)
    return graph is not None and graph(x) is not None


def refuse_deferred(x: Any, name: str) -> None:
    """Raise `Deferred` for a dask collection."""
    if is_deferred(x):
        raise Deferred(x, name)
