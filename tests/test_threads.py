"""The number of threads: where it comes from; and the lock on the parallel region."""

from __future__ import annotations

import asyncio
import functools
import math
import os
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
from fresh_python import error_of, output_of

import bnfast
from bnfast import threads

LARGE = threads.SERIAL_BELOW
PRINT_COUNT = "import bnfast; print(bnfast.get_num_threads())"


@pytest.fixture(autouse=True)
def fresh_threads(monkeypatch):
    """Start and end every test in the state right after import, with the variables unset."""
    for variable in ("BNFAST_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    threads._reset()
    yield
    threads._reset()


# The order of precedence


@pytest.mark.parametrize("openmp", [None, 5])
@pytest.mark.parametrize("environment", [None, 4])
@pytest.mark.parametrize("process", [None, 3])
@pytest.mark.parametrize("context", [None, 2])
def test_precedence(monkeypatch, context, process, environment, openmp):
    monkeypatch.setattr(threads, "_cgroup_quota", lambda: 0.5)
    for variable, value in (("BNFAST_NUM_THREADS", environment), ("OMP_NUM_THREADS", openmp)):
        if value is not None:
            monkeypatch.setenv(variable, str(value))
    bnfast.set_num_threads(process)
    with bnfast.use_num_threads(context) if context else nullcontext():
        assert bnfast.get_num_threads() == (context or process or environment or openmp or 1)


@pytest.mark.parametrize(
    ("setup", "source"),
    [
        ({}, "the CPUs that this process may use"),
        ({"OMP_NUM_THREADS": "3"}, "the environment variable OMP_NUM_THREADS"),
        ({"BNFAST_NUM_THREADS": "3"}, "the environment variable BNFAST_NUM_THREADS"),
    ],
)
def test_source_of_the_number(monkeypatch, setup, source):
    monkeypatch.setattr(threads, "_cgroup_quota", lambda: math.inf)
    for variable, value in setup.items():
        monkeypatch.setenv(variable, value)
    assert threads.current().source == source
    bnfast.set_num_threads(2)
    assert threads.current() == (2, "set_num_threads()")
    with bnfast.use_num_threads(7):
        assert threads.current() == (7, "use_num_threads()")


def test_nested_contexts_unwind():
    with bnfast.use_num_threads(2):
        with bnfast.use_num_threads(3):
            assert bnfast.get_num_threads() == 3
        assert bnfast.get_num_threads() == 2


def test_context_unwinds_on_an_error():
    bnfast.set_num_threads(2)
    with pytest.raises(KeyError), bnfast.use_num_threads(3):
        raise KeyError
    assert bnfast.get_num_threads() == 2


def test_numpy_integers_are_numbers():
    bnfast.set_num_threads(np.int64(3))
    assert (bnfast.get_num_threads(), type(bnfast.get_num_threads())) == (3, int)


def use(number):
    with bnfast.use_num_threads(number):
        pass


SETTERS = [
    pytest.param(bnfast.set_num_threads, "set_num_threads()", id="process"),
    pytest.param(use, "use_num_threads()", id="context"),
]


@pytest.mark.parametrize(("setter", "source"), SETTERS)
@pytest.mark.parametrize("number", [0, -1, 4097, 2**40])
def test_number_out_of_range(setter, source, number):
    before = bnfast.get_num_threads()
    message = f"{source} takes from 1 to 4096 threads, not {number}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        setter(number)
    assert bnfast.get_num_threads() == before


@pytest.mark.parametrize(("setter", "source"), SETTERS)
@pytest.mark.parametrize("number", [True, False, 2.0, "2", [2], np.True_, np.float32(2)])
def test_number_of_another_type(setter, source, number):
    message = f"{source} takes a whole number of threads, not {type(number).__name__}: {number!r}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        setter(number)


def test_use_num_threads_does_not_take_none():
    with pytest.raises(TypeError, match=r"not NoneType: None$"):
        use(None)


# The environment


def test_variables_in_a_fresh_process():
    assert output_of(PRINT_COUNT, BNFAST_NUM_THREADS=" 3 ", OMP_NUM_THREADS="5") == "3"
    assert output_of(PRINT_COUNT, BNFAST_NUM_THREADS="", OMP_NUM_THREADS="5,2") == "5"


@pytest.mark.parametrize(
    "value", ["0", "-1", "two", "2.0", "1_0", "4097", "2,2", "\N{FULLWIDTH DIGIT TWO}"]
)
def test_malformed_bnfast_variable_is_an_error(monkeypatch, value):
    monkeypatch.setenv("BNFAST_NUM_THREADS", value)
    message = (
        "the environment variable BNFAST_NUM_THREADS must be a whole number from 1 to 4096, "
        f"not {value!r}; unset it to use the CPUs that are available"
    )
    for _ in range(2):  # an error is not remembered as an answer
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            bnfast.get_num_threads()
    with pytest.raises(ValueError, match="BNFAST_NUM_THREADS"):
        threads.claim(LARGE)
    with bnfast.use_num_threads(2):
        assert threads.claim(LARGE) == 2
        threads.free[True] = True


def test_malformed_bnfast_variable_in_a_fresh_process():
    assert error_of(PRINT_COUNT, BNFAST_NUM_THREADS="two").endswith(
        "ValueError: the environment variable BNFAST_NUM_THREADS must be a whole number from 1 to "
        "4096, not 'two'; unset it to use the CPUs that are available"
    )


@pytest.mark.parametrize(
    ("value", "number"),
    [("3", 3), ("3,2", 3), (" 3 , 2", 3), ("0", 9), ("-1", 9), ("many", 9), (",2", 9), ("", 9)],
)
def test_openmp_variable(monkeypatch, value, number):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(9), raising=False)
    monkeypatch.setattr(threads, "_cgroup_quota", lambda: math.inf)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert bnfast.get_num_threads() == number


def test_variables_are_read_at_first_use_and_once(monkeypatch):
    monkeypatch.setenv("BNFAST_NUM_THREADS", "3")
    assert bnfast.get_num_threads() == 3
    monkeypatch.setenv("BNFAST_NUM_THREADS", "4")
    assert bnfast.get_num_threads() == 3


# The CPUs that this process may use


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_affinity_is_respected():
    code = """
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        import bnfast
        print(bnfast.get_num_threads())
    """
    assert output_of(code) == "1"


def test_without_affinity_all_cpus_count(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setattr(threads, "_cgroup_quota", lambda: math.inf)
    assert threads.current() == (12, "the CPUs that this process may use")
    threads._reset()
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert bnfast.get_num_threads() == 1


@pytest.mark.parametrize(
    ("quota", "number"),
    [(0.1, 1), (1.0, 1), (1.5, 2), (7.01, 8), (8.0, 8), (99.0, 8), (math.inf, 8)],
)
def test_quota_is_rounded_up_and_only_lowers(monkeypatch, quota, number):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.setattr(threads, "_cgroup_quota", lambda: quota)
    assert bnfast.get_num_threads() == number
    assert ("quota" in threads.current().source) == (quota < 8)


@pytest.fixture
def cgroup_quota(tmp_path):
    """Return the quota that is found in a made-up hierarchy of control groups."""

    def quota(membership, files):
        (tmp_path / "cgroup").write_text(membership)
        for path, text in files.items():
            file = tmp_path / "fs" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return threads._cgroup_quota(str(tmp_path / "cgroup"), str(tmp_path / "fs"))

    return quota


V1 = "4:memory:/a/b\n1:cpu,cpuacct:/a/b\n0::/\n"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3.0),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n", "a/cpu.max": "300000 100000\n"}, 0.5),
        ("0::/a/b\n", {"cpu.max": "200000 100000\n"}, 2.0),
        ("0::/../../c\n", {"c/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/a:b\n", {"a:b/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/\n", {"cpu.max": "garbage\n"}, math.inf),
        ("0::/\n", {"cpu.max": "100000 0\n"}, math.inf),
        ("0::/\n", {}, math.inf),
        ("", {"cpu.max": "200000 100000\n"}, math.inf),
        (
            V1,
            {"cpu/a/b/cpu.cfs_quota_us": "250000\n", "cpu/a/b/cpu.cfs_period_us": "100000\n"},
            2.5,
        ),
        (V1, {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.5),
        (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ("1:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "1\n", "cpu/cpu.cfs_period_us": "1\n"}, math.inf),
    ],
)
def test_cgroup_quota(cgroup_quota, membership, files, expected):
    assert cgroup_quota(membership, files) == expected


def test_no_control_groups_no_limit(tmp_path):
    assert threads._cgroup_quota(str(tmp_path / "absent"), str(tmp_path)) == math.inf


# The lock


def test_small_problems_are_serial_and_leave_the_lock_alone():
    with bnfast.use_num_threads(4):
        assert threads.claim(LARGE - 1) == 1
        assert threads.claim(0) == 1
        assert threads.claim(LARGE) == 4
        threads.free[True] = True


def test_one_thread_leaves_the_lock_alone():
    with bnfast.use_num_threads(1):
        assert threads.claim(LARGE) == 1
    with bnfast.use_num_threads(4):
        assert threads.claim(LARGE) == 4
        threads.free[True] = True


def test_nested_claim_is_serial():
    with bnfast.use_num_threads(4):
        outer = threads.claim(LARGE)
        inner = threads.claim(LARGE)
        threads.free[inner > 1] = True
        still_inside = threads.claim(LARGE)
        threads.free[outer > 1] = True
        after = threads.claim(LARGE)
        threads.free[after > 1] = True
    assert (outer, inner, still_inside, after) == (4, 1, 1, 4)


def test_number_may_change_between_claim_and_release():
    with bnfast.use_num_threads(4):
        claimed = threads.claim(LARGE)
        with bnfast.use_num_threads(1):
            threads.free[claimed > 1] = True
        assert threads.claim(LARGE) == 4
        threads.free[True] = True


def test_lock_is_free_after_a_kernel_raised():
    x = np.ones((1, 1, 512, 512), np.float32)
    assert x.size >= LARGE
    bn = bnfast.BatchNorm2d(1)
    with bnfast.use_num_threads(4):
        with pytest.raises(ValueError, match="channels"):
            bn(np.ones((1, 2, 512, 512), np.float32))
        bn(x)
        assert threads.claim(LARGE) == 4
        threads.free[True] = True


def test_pool_of_threads_never_has_two_in_the_region():
    bnfast.set_num_threads(4)
    start = threading.Barrier(8)
    inside = []
    most_inside = []
    outcomes = []

    def work(_):
        start.wait()
        for _ in range(2000):
            claimed = threads.claim(LARGE)
            try:
                if claimed > 1:
                    inside.append(None)
                    most_inside.append(len(inside))
                    inside.pop()
            finally:
                threads.free[claimed > 1] = True
            outcomes.append(claimed)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert set(most_inside) == {1}
    assert set(outcomes) <= {1, 4}
    assert threads.claim(LARGE) == 4
    threads.free[True] = True


# Inheritance of the context


def test_context_is_inherited_by_tasks_and_does_not_leak():
    bnfast.set_num_threads(9)

    async def child():
        return bnfast.get_num_threads(), await asyncio.to_thread(bnfast.get_num_threads)

    async def sibling():
        with bnfast.use_num_threads(3):
            await asyncio.sleep(0)
            return bnfast.get_num_threads()

    async def parent():
        other = asyncio.create_task(sibling())
        with bnfast.use_num_threads(2):
            inherited = await asyncio.create_task(child())
        return inherited, await other, bnfast.get_num_threads()

    assert asyncio.run(parent()) == ((2, 2), 3, 9)


def test_context_and_new_threads():
    bnfast.set_num_threads(9)
    seen = []
    with bnfast.use_num_threads(2):
        thread = threading.Thread(target=lambda: seen.append(bnfast.get_num_threads()))
        thread.start()
        thread.join()
    inherits = getattr(sys.flags, "thread_inherit_context", False)
    assert seen == [2 if inherits else 9]


# Fork

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")


@needs_fork
def test_child_has_a_free_lock_and_the_parent_keeps_its_own():
    code = f"""
        import os
        import threading
        import bnfast
        from bnfast import threads

        bnfast.set_num_threads(4)
        claimed, done = threading.Event(), threading.Event()

        def hold():
            number = threads.claim({LARGE})
            claimed.set()
            done.wait()
            threads.free[number > 1] = True

        holder = threading.Thread(target=hold)
        holder.start()
        claimed.wait()
        in_parent = threads.claim({LARGE})
        child = os.fork()
        if child == 0:
            os._exit(threads.claim({LARGE}))
        in_child = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        still = threads.claim({LARGE})
        done.set()
        holder.join()
        print(in_parent, in_child, still, threads.claim({LARGE}))
    """
    assert output_of(code) == "1 4 1 4"


@needs_fork
def test_before_fork_of_imported_backends_runs(tmp_path):
    for name in ("used", "unused", "plain"):
        hook = f"def before_fork(): print('{name} was told', flush=True)" if name != "plain" else ""
        (tmp_path / f"backend_{name}.py").write_text(f"def unavailable(): return None\n{hook}\n")
    code = """
        import os
        import bnfast
        for name in ("used", "unused", "plain"):
            bnfast.register_backend(name, module=f"backend_{name}", install="pip install it")
        for name in ("used", "plain"):
            bnfast.set_backend(name)
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
    """
    assert output_of(code, PYTHONPATH=str(tmp_path)) == "used was told"


def test_beside_threads_that_spin_calls_of_medium_size_take_one(monkeypatch):
    monkeypatch.delenv("BNFAST_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads._reset()
    three = functools.cache(lambda: threads.ThreadCount(3, "a test"))
    monkeypatch.setattr(threads, "_available", three)
    few = threads.beside_spinning.FEW

    def count(elements):
        with threads.beside_spinning(elements):
            return bnfast.get_num_threads()

    assert count(threads.SERIAL_BELOW) == count(few - 1) == 1
    assert count(few) == 3
    assert bnfast.get_num_threads() == 3
    with bnfast.use_num_threads(2):  # somebody's wish is left alone
        assert count(few - 1) == 2
    bnfast.set_num_threads(5)
    assert count(few - 1) == 5
    bnfast.set_num_threads(None)
