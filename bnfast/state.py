"""The numbers of a layer: one table, shown as vectors, saved and loaded.

One table per layer holds the four channel vectors as rows, so that a call packs them in one step::

    row 0  weight        row 2  running_mean
    row 1  bias          row 3  running_var

The public attributes are views of these rows: written in place, they take effect at the next call.
Assigning to one copies the values into its row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bnfast import channels
from bnfast.interop.arrays import as_numpy
from bnfast.spec import Channels

VECTORS = ("weight", "bias", "running_mean", "running_var")
NEUTRAL = (1.0, 0.0, 0.0, 1.0)


class IncompatibleKeys(NamedTuple):
    """What `load_state_dict` did not find, and what it did not know."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def _vector(row: int, text: str) -> property:
    """Return a property that shows one row of the table, or None where the layer lacks it."""
    name = VECTORS[row]

    def read(self: State) -> NDArray[Any] | None:
        return self._views[row]

    def assign(self: State, value: Any) -> None:
        if value is not None:
            array = channels.as_array(value, name)
            channels.check_vector(array, self.num_features, name)
        with np.errstate(over="ignore"):
            self._table[row] = NEUTRAL[row] if value is None else array
        self._views[row] = None if value is None else self._table[row]

    return property(read, assign, doc=text)


class State:
    """The vectors and the counter of a layer."""

    num_features: int
    num_batches_tracked: int | None
    _table: NDArray[Any]
    _views: list[NDArray[Any] | None]
    _last_packed: tuple[bytes | None, tuple[Channels, ...]]

    weight = _vector(0, "Scale of each channel, shape (C,); None without `affine`.")
    bias = _vector(1, "Shift of each channel, shape (C,); None without `affine` or `bias`.")
    running_mean = _vector(2, "Running mean, shape (C,); None where it is not tracked.")
    running_var = _vector(3, "Running unbiased variance, shape (C,); None where not tracked.")

    def _adopt(self, table: NDArray[Any], present: tuple[bool, ...]) -> None:
        """Take ``table`` as this layer's numbers, showing the rows that are ``present``."""
        self._table = table
        self._last_packed = (None, ())
        self._views = [row if shown else None for row, shown in zip(table, present, strict=True)]

    def state_dict(self, prefix: str = "") -> dict[str, NDArray[Any]]:
        """Return a copy of the layer's state under PyTorch's names, each preceded by ``prefix``.

        ``num_batches_tracked`` is an int64 array of shape (). What the layer lacks has no key.
        """
        state: dict[str, NDArray[Any]] = {
            prefix + name: view.copy()
            for name, view in zip(VECTORS, self._views, strict=True)
            if view is not None
        }
        if self.num_batches_tracked is not None:
            state[prefix + "num_batches_tracked"] = np.array(self.num_batches_tracked, np.int64)
        return state

    def load_state_dict(
        self, mapping: Mapping[str, Any], strict: bool = True, prefix: str = ""
    ) -> IncompatibleKeys:
        """Take the layer's state from a mapping of names to arrays.

        Parameters
        ----------
        mapping : mapping
            What `state_dict` returns, ``numpy.load`` of an ``.npz``, safetensors' ``load_file``, or
            the ``state_dict()`` of a torch module.
        strict : bool
            Whether a missing or an unexpected key is an error. A missing counter is not: old
            files lack it.
        prefix : str
            What precedes the names; keys without it are ignored.

        Returns
        -------
        IncompatibleKeys
            ``missing_keys`` and ``unexpected_keys``.

        Raises
        ------
        ValueError
            For missing or unexpected keys, for shapes that do not fit, and for a ``running_var``
            with NaN. Nothing is loaded then.
        TypeError
            For values that are not real numbers, and for what is no mapping.
        """
        if not isinstance(mapping, Mapping):
            raise TypeError(
                f"cannot load the state of {type(self).__name__}: expected a mapping of names to "
                f"arrays, got {type(mapping).__name__}"
            )
        own = self.state_dict(prefix)
        counter = prefix + "num_batches_tracked"
        missing = [key for key in own if key not in mapping and key != counter]
        unexpected = [key for key in mapping if key.startswith(prefix) and key not in own]
        if strict and (missing or unexpected):
            parts = [f"missing keys {missing}"] * bool(missing)
            parts += [f"unexpected keys {unexpected}"] * bool(unexpected)
            raise ValueError(
                f"cannot load the state of {type(self).__name__}: {', '.join(parts)}; "
                f"expected {list(own)}"
            )
        found = {key: as_numpy(mapping[key], key) for key in own if key in mapping}
        count = None
        if counter in found:
            count = as_counter(found.pop(counter), counter)
        for key, array in found.items():
            channels.check_vector(array, self.num_features, key)
            if key == prefix + "running_var":
                check_variance(array, key)
        table = self._table.copy()
        with np.errstate(over="ignore"):
            for key, array in found.items():
                table[VECTORS.index(key.removeprefix(prefix))] = array
        self._table[:] = table
        if count is not None:
            self.num_batches_tracked = count
        return IncompatibleKeys(missing, unexpected)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        """Return what the results depend on, for dask's names of tasks."""
        state = self.__getstate__()
        del state["_saved"]
        return type(self).__qualname__, sorted(state.items())

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and copy keep: everything but what the last forward saved."""
        state = self.__dict__.copy()
        del state["_last_packed"]
        state["_views"] = tuple(view is not None for view in self._views)
        state["_saved"] = "the layer was copied after its last forward"
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a layer; its public vectors are views of its own table again."""
        present = state.pop("_views")
        self.__dict__.update(state)
        table = np.array(state["_table"])
        if table.shape != (4, self.num_features) or table.dtype.char not in "fd":
            raise ValueError(f"not the state of a layer with {self.num_features} features")
        self._adopt(table, present)


def as_counter(value: NDArray[Any], key: str) -> int:
    """Return a counter as an int, or raise ValueError."""
    number = value.item() if value.size == 1 and value.dtype.kind in "iuf" else -1
    if not (number >= 0 and number < math.inf and number == int(number)):
        raise ValueError(f"{key} should be one non-negative integer, got {value!r}")
    return int(number)


def check_variance(array: NDArray[Any], key: str) -> None:
    """Raise ValueError for a variance with NaN: every output of that channel would be NaN."""
    bad = np.flatnonzero(np.isnan(array.astype(np.float64)))
    if bad.size:
        raise ValueError(
            f"{key} should hold numbers, got NaN in {bad.size} of {array.size} channels, "
            f"first in channel {bad[0]}"
        )
