"""Recycled memory: when a block comes back, to whom it goes, and how much is kept."""

from __future__ import annotations

import gc
import pickle
import queue
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fresh_python import output_of
from lending import MIB, address, lend

import bnfast
from bnfast import memory

pytestmark = pytest.mark.usefixtures("bound")
FLOAT = np.dtype(np.float32)


# What is handed out


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint16])
def test_an_array_is_an_ordinary_one(rng, dtype):
    for recycled in (False, True):
        shape = (int(rng.integers(2, 9)), int(rng.integers(2, 9)), 131072)
        y = memory.empty(shape, np.dtype(dtype))
        assert type(y) is np.ndarray
        assert (y.shape, y.dtype) == (shape, np.dtype(dtype))
        assert y.flags.c_contiguous
        assert y.flags.aligned
        assert y.flags.writeable
        y[...] = rng.integers(0, 100, shape)
        again = pickle.loads(pickle.dumps(y))
        assert np.array_equal(again, y), recycled


def test_memory_is_aligned_to_64_bytes(rng):
    held = [lend(int(size)) for size in rng.integers(MIB, 9 * MIB, 50)]
    assert {address(y) % 64 for y in held} == {0}


def test_an_array_cannot_be_resized():
    y = lend()
    with pytest.raises(ValueError, match="does not own its data"):
        y.resize(2 * MIB, refcheck=False)


def test_an_array_made_read_only_can_be_made_writeable_again():
    y = lend()
    y.setflags(write=False)
    y.setflags(write=True)
    y[0] = 1


def test_sizes_are_rounded_up_by_a_sixteenth_at_most(rng):
    for size in [MIB, MIB + 1, 2 * MIB - 1, *rng.integers(MIB, 100 * MIB, 20).tolist()]:
        lend(size)
        assert size <= memory.idle() <= size * 17 / 16
        bnfast.empty_cache()


# When a block comes back


def root(array):
    while isinstance(array, np.ndarray):
        array = array.base
    return array


KEEPERS = {
    "slice": lambda y: y[1000:2000],
    "view of views": lambda y: y[1000:].reshape(2, -1)[1:].T[::2][:, :1],
    "other dtype": lambda y: y.reshape(-1).view(np.float64),
    "memoryview": memoryview,
    "slice of a memoryview": lambda y: memoryview(y)[5:10],
    "frombuffer": lambda y: np.frombuffer(y, np.uint8, 10),
    "DLPack": np.from_dlpack,
    "as_strided": lambda y: np.lib.stride_tricks.as_strided(y, (3, 3), (1, 1)),
    "subclass": lambda y: y.view(np.recarray),
    "iterator": lambda y: y.flat,
    "its base": lambda y: y.base,
    "the end of its bases": root,
}


@pytest.mark.parametrize("make", KEEPERS.values(), ids=KEEPERS)
def test_a_block_comes_back_with_the_last_that_views_it(make):
    y = lend()
    first = address(y)
    keeper = make(y)
    del y
    assert memory.idle() == 0
    other = lend()
    assert address(other) != first
    del keeper
    assert memory.idle() == MIB
    assert address(lend()) == first


def test_a_torch_tensor_keeps_the_block(rng):
    torch = pytest.importorskip("torch")
    y = memory.empty((512, 512), FLOAT)
    y[...] = expected = rng.normal(size=y.shape)
    tensor = torch.from_numpy(y)[1:]
    del y
    other = memory.empty((512, 512), FLOAT)
    other[...] = 0
    assert np.array_equal(tensor.numpy(), expected.astype(FLOAT)[1:])
    del tensor, other
    assert memory.idle() == 2 * MIB


def test_the_block_used_last_goes_out_first():
    held = [lend() for _ in range(3)]
    addresses = [address(y) for y in held]
    while held:
        del held[0]
    assert [address(y) for y in [lend(), lend(), lend()]] == addresses[::-1]


def test_a_block_goes_only_to_arrays_of_its_size():
    small, large = lend(MIB), lend(2 * MIB)
    addresses = address(small), address(large)
    del small, large
    assert address(lend(2 * MIB)) == addresses[1]
    assert address(lend(MIB)) == addresses[0]
    held = lend(3 * MIB)
    assert address(held) not in addresses


def test_arrays_of_nearly_the_same_size_share_a_block():
    y = lend(10 * MIB)
    first = address(y)
    del y
    assert address(lend(10 * MIB - 100_000)) == first


def test_release_in_a_garbage_collection():
    cycle = [lend()]
    cycle.append(cycle)
    first = address(cycle[0])
    del cycle
    assert memory.idle() == 0
    gc.collect()
    assert address(lend()) == first


@pytest.mark.parametrize("operation", ["take", "give"])
def test_a_collection_amid_an_operation(monkeypatch, rng, operation):
    """Right after it lists the blocks, garbage dies that holds arrays and takes new ones."""

    class Garbage:
        def __init__(self):
            self.itself = self
            self.array = lend()

        def __del__(self):
            nested.append(lend())

    nested = []
    kept = []
    blocks = memory._Cache._blocks

    def interrupted(cache):
        listed = blocks(cache)
        if garbage:
            garbage.pop()
            gc.collect()
        return listed

    gc.disable()
    try:
        idle = [lend() for _ in range(4)]
        garbage = [Garbage() for _ in range(3)]
        del idle
        monkeypatch.setattr(memory._Cache, "_blocks", interrupted)
        if operation == "take":
            kept.append(lend())
        else:
            lend()
        monkeypatch.undo()
        gc.collect()  # the garbage that came up inside a collection
    finally:
        gc.enable()
    out = kept + nested
    assert len(nested) == 3
    assert len({address(y) for y in out}) == len(out)
    for number, y in enumerate(out):
        y[...] = number
    assert [int(y.max()) for y in out] == list(range(len(out)))


# Threads


def test_many_threads(bound):
    """Blocks are taken in six threads and given back in others; nobody gets one that is in use."""
    bound(4 * MIB)
    passed_on = queue.SimpleQueue()
    together = threading.Barrier(6)

    def work(number):
        together.wait()
        for turn in range(4000):
            y = lend(MIB if turn % 8 else 2 * MIB)[::4096]
            y[...] = number
            time.sleep(0)  # lets another thread run
            if not (y == number).all():
                return False
            passed_on.put(y)
            del y
            passed_on.get()
        return True

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(work, range(1, 7))) == [True] * 6
    finally:
        sys.setswitchinterval(interval)
    assert 0 < memory.idle() <= 4 * MIB
    addresses = [address(block) for block in memory._cache._blocks()]
    assert len(set(addresses)) == len(addresses)


def test_a_block_can_be_given_back_by_another_thread():
    held = [lend()]
    first = address(held[0])
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert address(lend()) == first


# The bound


def test_blocks_idle_longest_are_freed_first(bound):
    bound(3 * MIB)
    held = [lend() for _ in range(5)]
    addresses = [address(y) for y in held]
    while held:
        del held[0]
    assert memory.idle() == 3 * MIB
    assert [address(block) for block in memory._cache._blocks()] == addresses[2:]


def test_a_block_beyond_the_bound_drives_no_other_out(bound):
    bound(3 * MIB)
    lend(MIB)
    lend(4 * MIB)
    assert memory.idle() == MIB


def test_a_large_block_drives_out_several(bound):
    bound(4 * MIB)
    held = [lend() for _ in range(4)]
    del held
    lend(3 * MIB)
    assert sorted(block.nbytes for block in memory._cache._blocks()) == [MIB, 3 * MIB]


def test_memory_over_the_bound_is_freed(bound):
    bound(8 * MIB)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        held = [lend(4 * MIB) for _ in range(5)]
        assert tracemalloc.get_traced_memory()[0] - before >= 20 * MIB
        del held
        assert 8 * MIB <= tracemalloc.get_traced_memory()[0] - before < 9 * MIB
        bnfast.empty_cache()
        assert tracemalloc.get_traced_memory()[0] - before < MIB
    finally:
        tracemalloc.stop()


def test_empty_cache_leaves_arrays_in_use_alone(rng):
    used, idle = lend(), lend()
    used[...] = expected = rng.integers(0, 255, MIB)
    first = address(used)
    del idle
    bnfast.empty_cache()
    assert memory.idle() == 0
    other = lend()
    other[...] = 0
    assert np.array_equal(used, expected)
    del used
    assert address(lend()) == first


def test_out_of_memory_empties_the_cache_and_tries_again(monkeypatch):
    def allocate(size):
        if memory.idle():
            raise MemoryError
        return right(size)

    right = memory._allocate
    lend(2 * MIB)
    monkeypatch.setattr(memory, "_allocate", allocate)
    assert lend(3 * MIB).size == 3 * MIB


def test_out_of_memory_for_good():
    with pytest.raises(MemoryError):
        lend(2**62)
    assert lend().size == MIB


def test_a_process_at_its_limit_gets_the_idle_memory():
    pytest.importorskip("resource")
    code = """
        import resource
        import numpy as np
        from bnfast import memory
        dtype = np.dtype(np.uint8)
        memory.empty((2**29,), dtype)
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + 2**28
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        print(memory.idle() // 2**20, end=" ")
        y = memory.empty((2**29 + 2**27,), dtype)
        print(memory.idle(), y.nbytes // 2**20)
    """
    assert output_of(code, BNFAST_CACHE_BYTES=str(2**30)) == "512 0 640"
