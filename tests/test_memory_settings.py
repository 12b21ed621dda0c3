"""Recycled memory: the variable that bounds it, forks, and the end of the process."""

from __future__ import annotations

import os
import re
import tracemalloc

import numpy as np
import pytest
from fresh_python import error_of, output_of, run
from lending import MIB, address, lend

import bnfast
from bnfast import memory

pytestmark = pytest.mark.usefixtures("bound")


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
