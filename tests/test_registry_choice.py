"""The choice of a backend: precedence, lists, what `auto` takes, and arrays on a device."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import threading
from contextlib import nullcontext
from types import ModuleType

import numpy as np
import pytest
from fresh_python import output_of

import bnfast
from bnfast import BackendUnavailableError, UnknownBackendError, registry

pytestmark = pytest.mark.usefixtures("fresh_registry")

X = np.ones((2, 3, 4, 4), np.float32)
CYTHON = "bnfast.backends.cython_openmp"
NUMBA = "bnfast.backends.numba_parallel"
NUMPY = "bnfast.backends.numpy_reference"


# The order of precedence


@pytest.mark.parametrize("environment", [None, "e"])
@pytest.mark.parametrize("process", [None, "p"])
@pytest.mark.parametrize("context", [None, "c"])
@pytest.mark.parametrize("argument", [None, "a"])
def test_precedence(add_backend, monkeypatch, argument, context, process, environment):
    for name in "acpe":
        add_backend(name)
    if environment is not None:
        monkeypatch.setenv("BNFAST_BACKEND", environment)
    bnfast.set_backend(process)
    with bnfast.use_backend(context) if context else nullcontext():
        kernels = registry.choose(argument, X)
        name = registry.current(argument).name
        assert bnfast.get_backend() == registry.current().name
    named = argument or context or process or environment
    if named:
        assert (name, kernels.__name__) == (named, f"made_up_{named}")
    else:
        assert registry.current().source == "auto"
        assert kernels.__name__.startswith("bnfast.backends.")


def test_auto_named_overrides_what_is_below_it(add_backend, monkeypatch):
    add_backend("mine")
    automatic = bnfast.get_backend()
    monkeypatch.setenv("BNFAST_BACKEND", "mine")
    registry._reset()
    add_backend("mine")
    assert bnfast.get_backend() == "mine"
    assert registry.choose("auto", X) is registry.load(automatic)
    with bnfast.use_backend("auto"):
        assert bnfast.get_backend() == automatic
    bnfast.set_backend("auto")
    assert bnfast.get_backend() == automatic


def test_nested_contexts_unwind(add_backend):
    add_backend("outer")
    add_backend("inner")
    automatic = bnfast.get_backend()
    with bnfast.use_backend("outer"):
        with bnfast.use_backend("inner"):
            assert bnfast.get_backend() == "inner"
        assert bnfast.get_backend() == "outer"
    assert bnfast.get_backend() == automatic


def test_context_unwinds_on_an_error(add_backend):
    add_backend("mine")
    automatic = bnfast.get_backend()
    with pytest.raises(KeyError), bnfast.use_backend("mine"):
        raise KeyError
    assert bnfast.get_backend() == automatic


def test_set_backend_none_gives_the_choice_back(add_backend, monkeypatch):
    add_backend("mine")
    monkeypatch.setenv("BNFAST_BACKEND", "numpy")
    bnfast.set_backend("mine")
    assert bnfast.get_backend() == "mine"
    bnfast.set_backend(None)
    assert bnfast.get_backend() == "numpy"


def test_failing_set_backend_changes_nothing(add_backend):
    add_backend("mine")
    add_backend("broken", unavailable="it is broken.")
    bnfast.set_backend("mine")
    with pytest.raises(BackendUnavailableError):
        bnfast.set_backend("broken")
    with pytest.raises(UnknownBackendError):
        bnfast.set_backend("nobody")
    assert bnfast.get_backend() == "mine"


@pytest.mark.parametrize("value", ["", "  "])
def test_empty_variable_counts_as_unset(monkeypatch, value):
    automatic = bnfast.get_backend()
    registry._reset()
    monkeypatch.setenv("BNFAST_BACKEND", value)
    assert (bnfast.get_backend(), registry.current().source) == (automatic, "auto")


def test_variable_is_read_at_first_use_and_once(add_backend, monkeypatch):
    add_backend("mine")
    monkeypatch.setenv("BNFAST_BACKEND", "mine")
    assert bnfast.get_backend() == "mine"
    monkeypatch.setenv("BNFAST_BACKEND", "numpy")
    assert bnfast.get_backend() == "mine"


@pytest.mark.parametrize("value", ["numpy", " numpy ", "cuda,numpy", "cuda , numpy"])
def test_variable_in_a_fresh_process(value):
    assert output_of("import bnfast; print(bnfast.get_backend())", BNFAST_BACKEND=value) == "numpy"


# Lists


def test_list_takes_the_first_that_can_run(add_backend):
    add_backend("broken", unavailable="it is broken.")
    add_backend("first")
    add_backend("second")
    assert registry.current("broken, first,second").name == "first"
    assert registry.current("second,first").name == "second"
    bnfast.set_backend("broken,second")
    assert bnfast.get_backend() == "second"
    with bnfast.use_backend("broken,first"):
        assert bnfast.get_backend() == "first"


def test_list_may_end_in_auto(add_backend):
    add_backend("broken", unavailable="it is broken.")
    assert registry.current("broken,auto") == registry.current("auto")


def test_list_with_an_unknown_name_is_an_error_even_after_a_good_one():
    with pytest.raises(UnknownBackendError, match=r"^unknown backend 'nobody' \(asked for by "):
        registry.choose("numpy,nobody", X)


def test_list_of_which_none_can_run_gives_every_reason(add_backend):
    add_backend("one", unavailable="one has no device.")
    add_backend("two", unavailable="two has no driver.")
    available = [name for name, row in bnfast.list_backends().items() if row.available]
    with pytest.raises(BackendUnavailableError) as caught:
        registry.choose("one,two", X)
    assert str(caught.value) == (
        "backend 'one,two' (asked for by the argument backend=) cannot run here\n"
        "  one: one has no device.\n"
        "    install: pip install one\n"
        "  two: two has no driver.\n"
        "    install: pip install two\n"
        f"available here: {', '.join(available)}"
    )


# auto


def test_auto_prefers_cython_then_numba_then_numpy(monkeypatch, caplog):
    def stand_in(path):
        module = ModuleType(path)
        module.unavailable = lambda: None
        monkeypatch.setitem(sys.modules, path, module)

    caplog.set_level(logging.INFO, "bnfast")
    for path in (CYTHON, NUMBA):
        stand_in(path)
    chosen = [bnfast.get_backend()]
    monkeypatch.setitem(sys.modules, CYTHON, None)
    registry._reset()
    chosen.append(bnfast.get_backend())
    monkeypatch.setitem(sys.modules, NUMBA, None)
    registry._reset()
    chosen.append(bnfast.get_backend())
    assert chosen == ["cython", "numba", "numpy"]
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "WARNING"]


def test_auto_never_picks_a_third_party(add_backend, no_gpu, monkeypatch):
    add_backend("mine")
    for path in (CYTHON, NUMBA, NUMPY):
        monkeypatch.setitem(sys.modules, path, None)
    with pytest.raises(
        BackendUnavailableError, match=r"^backend 'cython,numba,numpy' \(asked for by auto\)"
    ) as caught:
        registry.choose(None, X)
    assert str(caught.value).endswith("\navailable here: mine")


def test_auto_logs_its_choice_once(monkeypatch, caplog):
    everyone_asks = threading.Barrier(8, timeout=60)
    module = ModuleType(CYTHON)
    module.unavailable = lambda: (everyone_asks.wait(), None)[1]
    monkeypatch.setitem(sys.modules, CYTHON, module)
    caplog.set_level(logging.INFO, "bnfast")
    pool = [threading.Thread(target=registry.choose, args=(None, X)) for _ in range(8)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    assert registry.choose("auto", X) is module
    assert caplog.record_tuples == [
        ("bnfast", logging.INFO, "backend 'cython' chosen automatically")
    ]


def test_auto_warns_once_where_only_numpy_is_left(monkeypatch, caplog):
    for path in (CYTHON, NUMBA):
        monkeypatch.setitem(sys.modules, path, None)
    for _ in range(3):
        registry.choose(None, X)
    assert caplog.record_tuples == [
        (
            "bnfast",
            logging.WARNING,
            "no fast backend can run here; using 'numpy', which is much slower:\n"
            f"  cython: the module {CYTHON} was not built or installed\n"
            "    install: pip install --force-reinstall --no-binary bnfast bnfast"
            "  # needs a C compiler\n"
            f"  numba: the module {NUMBA} was not built or installed\n"
            '    install: pip install "bnfast[numba]"',
        )
    ]


def test_named_numpy_is_not_worth_a_warning(caplog):
    caplog.set_level(logging.INFO, "bnfast")
    registry.choose("numpy", X)
    assert caplog.record_tuples == []


# Tasks


def test_context_is_inherited_by_tasks_and_does_not_leak(add_backend):
    add_backend("mine")
    automatic = bnfast.get_backend()

    async def child():
        return bnfast.get_backend(), await asyncio.to_thread(bnfast.get_backend)

    async def sibling():
        with bnfast.use_backend("numpy"):
            await asyncio.sleep(0)
            return bnfast.get_backend()

    async def parent():
        other = asyncio.create_task(sibling())
        with bnfast.use_backend("mine"):
            inherited = await asyncio.create_task(child())
        return inherited, await other, bnfast.get_backend()

    assert asyncio.run(parent()) == (("mine", "mine"), "numpy", automatic)


# Arrays that live elsewhere


class OnGpu:
    """An array on a GPU, as CUDA's array interface shows it."""

    @property
    def __cuda_array_interface__(self):
        return {"shape": (2, 3, 4, 4)}


class Dlpack:
    """An array on a device, as DLPack shows it."""

    def __init__(self, device_type):
        self.device_type = device_type

    def __dlpack_device__(self):
        return self.device_type, 0

    @property
    def __cuda_array_interface__(self):
        raise RuntimeError("torch raises for a tensor that requires grad: ask DLPack first")


@pytest.mark.parametrize("array", [OnGpu(), Dlpack(2), Dlpack(13), Dlpack(10)])
def test_auto_sends_device_arrays_to_cuda(array, no_gpu):
    with pytest.raises(BackendUnavailableError) as caught:
        registry.choose(None, array)
    assert str(caught.value).startswith(
        "backend 'cuda' (asked for by auto, for an array on a GPU) cannot run here\n"
        f"  cuda: {no_gpu}\n"
        '    install: pip install --upgrade "bnfast[cuda12]"  # or bnfast[cuda13]\n'
        "available here: "
    )


@pytest.mark.parametrize(
    "array", [Dlpack(1), Dlpack(3), Dlpack(11), X, X[::2], np.ma.array(X), [1.0]]
)
def test_auto_sends_everything_else_to_the_host(array):
    assert registry.choose(None, array) is registry.load(bnfast.get_backend())


def test_auto_gives_a_device_array_to_a_cuda_backend_that_reads_it(monkeypatch):
    module = ModuleType("bnfast.backends.numba_cuda")
    module.unavailable = lambda: None
    module.accepts = lambda x: isinstance(x, OnGpu)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert registry.choose(None, OnGpu()) is module
    assert registry.choose("auto", OnGpu()) is module
    assert registry.choose(None, X) is not module
    with pytest.raises(TypeError, match=r"^backend 'cuda' \(asked for by auto, for an array on a"):
        registry.choose(None, Dlpack(8))


@pytest.mark.parametrize(
    ("ask", "source"),
    [
        (lambda: registry.choose("numpy", OnGpu()), "the argument backend="),
        (lambda: (bnfast.set_backend("numpy"), registry.choose(None, OnGpu())), "set_backend()"),
    ],
)
def test_host_backend_named_for_a_device_array(ask, source):
    message = (
        f"backend 'numpy' (asked for by {source}) does not read arrays of type "
        f"{__name__}.OnGpu on the device where this one lives; copy the array to the host first, "
        "or leave the choice to backend='auto'"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        ask()


def test_third_party_backend_may_read_device_arrays(add_backend):
    module = add_backend("mine", accepts=OnGpu)
    assert registry.choose("mine", OnGpu()) is module
