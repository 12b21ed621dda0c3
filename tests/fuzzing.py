"""What the fuzzers draw: arrays that lie anywhere in memory, with values of any kind; and the run.

An array is drawn as a `Lie` (how it lies in memory) and values of some character. hypothesis draws
few numbers for each, and the values come from a generator that one of them seeds, so that a failing
case is small and shrinks well.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bnfast import registry
from bnfast.backends import caches
from bnfast.testing.reference import FORMATS, limits

Array: TypeAlias = NDArray[Any]

DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)
GAP = 0xA5
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 49, 63, 64, 65, 67, 100, 129, 257)
MOST_ELEMENTS = 6000
LARGE = 98_304  # from here on calls are shared by threads
CACHES = (None, (2048, 4096), (65536, 65536))
"""Bytes of a core's cache and of all, for small arrays to go the way of large ones, or the real."""


def fuzz(
    check: Callable[[Any], None], cases: st.SearchStrategy[Any], config: Any, examples: int
) -> None:
    """Check so many examples, and as many again until ``--fuzz-seconds`` are over.

    Every round has a seed of its own, drawn from ``--seed``. A case names its backend, and what is
    assumed of the caches meanwhile.
    """
    for number in rounds(config):

        def one(case: Any) -> None:
            assume_caches(case["backend"], case["caches"])
            try:
                check(case)
            finally:
                assume_caches(case["backend"], None)

        options(examples)(seed(number)(given(cases)(one)))()


def assume_caches(backend: str, sizes: tuple[int, int] | None) -> None:
    """Let a backend that cuts its work by the sizes of the caches take these for them."""
    assume = getattr(registry.load(backend), "assume_caches", None)
    if assume:
        assume(*(sizes or caches.sizes()))


def rounds(config: Any) -> Iterator[int]:
    """Yield and print the seed of one round, and of further ones until the time is over."""
    seeds = np.random.default_rng(config.option.seed)
    end = time.monotonic() + config.option.fuzz_seconds
    done = 0
    while not done or time.monotonic() < end:
        number = int(seeds.integers(2**32))
        print(f"round {done}: hypothesis seed {number}")  # noqa: T201  pytest shows it on failure
        yield number
        done += 1


def options(examples: int) -> settings:
    """Return the settings of one round: nothing kept on disk, no limit on time."""
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@dataclasses.dataclass(frozen=True)
class Lie:
    """How an array lies in memory: the order of its axes, steps and gaps, alignment, byte order."""

    order: tuple[int, ...]
    steps: tuple[int, ...]
    gaps: tuple[int, ...]
    shift: int = 0
    swapped: bool = False
    read_only: bool = False
    repeated: int | None = None

    def lay(self, values: Array) -> Array:
        """Return an array that lies so and holds ``values``, its memory filled up with `GAP`."""
        dtype = values.dtype.newbyteorder("S") if self.swapped else values.dtype
        lengths = [values.shape[axis] for axis in self.order]
        spans = [
            n * abs(step) + gap for n, step, gap in zip(lengths, self.steps, self.gaps, strict=True)
        ]
        raw = np.full(math.prod(spans) * dtype.itemsize + 128, GAP, np.uint8)
        start = -raw.ctypes.data % 64 + self.shift
        whole = np.ndarray(spans, dtype, raw, start)
        places = []
        for n, step, gap in zip(lengths, self.steps, self.gaps, strict=True):
            first = gap // 2
            place = slice(first, first + n * abs(step), abs(step))
            places.append(place)
        array = whole[tuple(places)]
        array = array[tuple(slice(None, None, -1 if s < 0 else 1) for s in self.steps)]
        array = array.transpose(np.argsort(self.order))
        array[...] = values
        if self.repeated is not None and array.shape[self.repeated]:
            first_of = np.take(array, [0], axis=self.repeated)
            array = np.broadcast_to(first_of, array.shape)
        if self.read_only:
            array = array.view()
            array.flags.writeable = False
        return array


@st.composite
def lies(draw: Any, ndim: int, dtype: Any, *, out: bool = False) -> Lie:
    """Draw how an array of a number of dimensions lies; ``out`` is writable and native."""
    axes = tuple(range(ndim))
    common = st.just(axes), st.just((0, *axes[2:], 1))
    order = draw(st.one_of(*common, st.permutations(axes).map(tuple)))
    if draw(st.booleans()):
        steps, gaps = (1,) * ndim, (0,) * ndim
    else:
        steps = draw(st.tuples(*[st.sampled_from((1, 1, 1, -1, 2, -3))] * ndim))
        gaps = draw(st.tuples(*[st.sampled_from((0, 0, 0, 1, 3))] * ndim))
    size = np.dtype(dtype).itemsize
    shift = draw(st.sampled_from((0, 0, 0, size, 3 * size, 1)))
    if out:
        return Lie(order, steps, gaps, shift)
    native = np.dtype(dtype).name == "bfloat16"  # which has one byte order
    swapped = False if native else draw(st.integers(0, 7)) == 7
    read_only = draw(st.integers(0, 7)) == 7
    repeated = draw(st.sampled_from((None,) * 7 + axes))
    return Lie(order, steps, gaps, shift, swapped, read_only, repeated)


@st.composite
def shapes(draw: Any) -> tuple[int, ...]:
    """Draw a shape of 2 to 5 dimensions; a few are empty, a few shared by threads."""
    ndim = draw(st.integers(2, 5))
    lengths = [draw(st.sampled_from(LENGTHS)) for _ in range(ndim)]
    while math.prod(lengths) > MOST_ELEMENTS:
        longest = lengths.index(max(lengths))
        lengths[longest] = max(1, lengths[longest] // 3)
    kind = draw(st.integers(0, 24))
    if kind == 24:
        lengths[draw(st.integers(0, ndim - 1))] = 0
    elif kind == 23:
        axis = draw(st.sampled_from([axis for axis in range(ndim) if axis != 1]))
        lengths[axis] *= -(-LARGE // math.prod(lengths)) + draw(st.integers(0, 3))
    return tuple(lengths)


@dataclasses.dataclass(frozen=True)
class Character:
    """What the values of an array are like."""

    seed: int
    size: float
    ratio: float
    kind: str
    specials: tuple[float, ...]
    """What is put into one channel here and there."""

    def values(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return such values; those that do not fit into ``dtype`` are clipped."""
        rng = np.random.default_rng(self.seed)
        values = rng.standard_normal(shape)
        if self.kind == "integers":
            values = np.rint(4 * values)
        elif self.kind == "constant":
            values = np.zeros(shape)
        elif self.kind == "two values":
            values = np.where(values > 1, 1.0, 0.0)
        elif self.kind == "outlier" and values.size:
            values.flat[0] = 1e3
        values += self.ratio * np.sign(
            rng.standard_normal((1, *shape[1:2], *[1] * (len(shape) - 2)))
        )
        largest = limits(np.dtype(dtype))[0]
        values = np.clip(self.size * values, -0.4 * largest, 0.4 * largest).astype(dtype)
        if values.size:
            channel = np.moveaxis(values, 1, 0)[int(rng.integers(shape[1]))]
            for special in self.specials:
                channel[tuple(int(rng.integers(n)) for n in channel.shape)] = special
        return values


@st.composite
def characters(draw: Any, dtype: Any, *, specials: bool = True) -> Character:
    """Draw what values are like, within what the bounds are promised for."""
    narrow = np.dtype(dtype).name in FORMATS
    ratios = (0.0, 1.0, 10.0) if narrow else (0.0, 1.0, 10.0, 1e3, 1e6)
    sizes = (1.0, 1e-2, 1e2) if narrow else (1.0, 1e-2, 1e2, 1e-30, 1e15, 1e-38)
    kinds = ("normal", "normal", "integers", "constant", "two values", "outlier")
    poison = st.sampled_from((np.nan, np.inf, -np.inf, -0.0, 1e-45, 0.0))
    some = (
        st.lists(poison, max_size=3) if specials and draw(st.integers(0, 4)) == 4 else st.just([])
    )
    return Character(
        draw(st.integers(0, 2**32 - 1)),
        draw(st.sampled_from(sizes)),
        draw(st.sampled_from(ratios)),
        draw(st.sampled_from(kinds)),
        tuple(draw(some)),
    )


@st.composite
def vectors(draw: Any, channels: int, low: float, high: float) -> Array | None:
    """Draw a vector of one number per channel, of some dtype and stride; or None."""
    kind = draw(
        st.sampled_from(("none", "f4", "f8", "f2", "bfloat16", "i4", "stepped", "reversed"))
    )
    if kind == "none":
        return None
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = rng.uniform(low, high, channels)
    if kind == "stepped":
        return np.repeat(values, 3)[1::3]
    if kind == "reversed":
        return values.astype(np.float32)[::-1]
    return values.astype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)


def outside(array: Array) -> bytes:
    """Return what lies in the memory of an array between and around its elements."""
    raw = array
    while isinstance(raw.base, np.ndarray):
        raw = raw.base
    if not array.size:
        return raw.tobytes()
    marks = np.ones(raw.size, bool)
    mirror = np.ndarray(
        (*array.shape, array.itemsize),
        bool,
        marks,
        array.ctypes.data - raw.ctypes.data,
        (*array.strides, 1),
    )
    mirror[...] = False
    return raw[marks].tobytes()
