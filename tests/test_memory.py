"""Recycled memory: when a block comes back, to whom it goes, and how much is kept."""

from __future__ import annotations

import gc
import os
import pickle
import queue
import re
import sys
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fresh_python import error_of, output_of, run

import bnfast
from bnfast import memory

MIB = 2**20
FLOAT = np.dtype(np.float32)
BYTE = np.dtype(np.uint8)


@pytest.fixture(autouse=True)
def fresh_memory(monkeypatch):
    """Start and end every test in the state right after import, with the variable unset."""
    monkeypatch.delenv("BNFAST_CACHE_BYTES", raising=False)
    memory._reset()
    yield
    memory._reset()


@pytest.fixture
def bound(monkeypatch):
    """Return a function that sets the bound."""

    def set_bound(size):
        monkeypatch.setenv("BNFAST_CACHE_BYTES", str(size))
        memory._reset()

    return set_bound


def lend(size=MIB):
    return memory.empty((size,), BYTE)


def address(array):
    return array.__array_interface__["data"][0]


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


# The variable


def test_bound_without_the_variable():
    assert memory.current() == (268435456, "the default")


@pytest.mark.parametrize("value", ["8388608", " 08388608 "])
def test_bound_of_the_variable(bound, value):
    bound(value)
    held = [lend() for _ in range(10)]
    del held
    assert memory.idle() == 8 * MIB
    assert memory.current() == (8388608, "the environment variable BNFAST_CACHE_BYTES")


def test_zero_keeps_nothing(bound):
    bound(0)
    tracemalloc.start()
    try:
        y = lend(8 * MIB)
        assert address(y) % 64 == 0
        before = tracemalloc.get_traced_memory()[0]
        del y
        assert before - tracemalloc.get_traced_memory()[0] >= 8 * MIB
    finally:
        tracemalloc.stop()
    assert memory.idle() == 0


@pytest.mark.parametrize(
    "value", ["-1", "1e6", "1 GB", "256MB", "0x10", "1_0", "9" * 19, "\N{FULLWIDTH DIGIT TWO}"]
)
def test_malformed_variable_is_an_error(bound, value):
    bound(value)
    message = (
        "the environment variable BNFAST_CACHE_BYTES must be a whole number of bytes, such as "
        f"268435456, or 0 to keep nothing, not {value!r}; unset it for 268435456"
    )
    for _ in range(2):  # an error is not remembered as an answer
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            lend()
    bnfast.empty_cache()


def test_malformed_variable_changes_nothing(bound, rng):
    bound("much")
    layer = bnfast.BatchNorm2d(4)
    x = rng.normal(size=(2, 4, 256, 256)).astype(np.float32)
    before = {name: np.copy(value) for name, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match="BNFAST_CACHE_BYTES"):
        layer(x)
    assert all(np.array_equal(value, before[name]) for name, value in layer.state_dict().items())
    layer(x, out=x)  # nothing to allocate
    assert layer.num_batches_tracked == 1


def test_variable_in_a_fresh_process():
    code = """
        import numpy as np
        from bnfast import memory
        memory.empty((2**21,), np.dtype(np.uint8))
        print(memory.idle(), memory.current().size)
    """
    assert output_of(code) == "2097152 268435456"
    assert output_of(code, BNFAST_CACHE_BYTES="") == "2097152 268435456"
    assert output_of(code, BNFAST_CACHE_BYTES="0") == "0 0"
    assert output_of(code, BNFAST_CACHE_BYTES="2000000") == "0 2000000"
    assert "ValueError: the environment variable BNFAST_CACHE_BYTES must be a whole" in error_of(
        code, BNFAST_CACHE_BYTES="-1"
    )


def test_variable_is_read_once(bound, monkeypatch):
    bound(2 * MIB)
    lend()
    monkeypatch.setenv("BNFAST_CACHE_BYTES", "0")
    lend()
    assert memory.idle() == MIB
    assert memory.current().size == 2 * MIB


# Processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_has_memory_of_its_own():
    code = """
        import os
        import numpy as np
        from bnfast import memory
        def lend(value):
            y = memory.empty((2**20,), np.dtype(np.uint8))
            y[...] = value
            return y
        used, idle = lend(1), lend(2)
        del idle
        child = os.fork()
        if child == 0:
            assert (used == 1).all() and memory.idle() == 2**20
            taken = lend(3)
            used[...] = 4
            del used
            held = lend(5)
            memory.empty_cache()
            assert (taken == 3).all() and (held == 5).all()
            raise SystemExit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), end=" ")
        taken = lend(6)
        print((used == 1).all(), (taken == 6).all(), memory.idle())
    """
    assert output_of(code) == "7 True True 0"


def test_arrays_that_outlive_everything_at_exit():
    code = """
import builtins, sys, threading
import numpy as np
from bnfast import memory
lend = lambda: memory.empty((2**20,), np.dtype(np.uint8))
module_level = lend()
builtins.kept = lend()
sys.kept = [lend()]
np.kept = lend()
memory.kept = lend()
cycle = [lend()]
cycle.append(cycle)
del lend, cycle
print(memory.idle())
"""
    finished = run("-X", "dev", "-c", code)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "0\n", "")
