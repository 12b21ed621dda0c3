"""The choice of a backend: precedence, strictness, and what each message says."""

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
from fresh_python import error_of, output_of

import bnfast
from bnfast import BackendUnavailableError, UnknownBackendError, registry

X = np.ones((2, 3, 4, 4), np.float32)
CYTHON = "bnfast.backends.cython_openmp"
NUMBA = "bnfast.backends.numba_parallel"
NUMPY = "bnfast.backends.numpy_reference"


@pytest.fixture(autouse=True)
def fresh_registry(monkeypatch):
    """Start and end every test in the state right after import, with BNFAST_BACKEND unset."""
    monkeypatch.delenv("BNFAST_BACKEND", raising=False)
    registry._reset()
    yield
    registry._reset()


@pytest.fixture
def add_backend(monkeypatch):
    """Return a function that registers a backend whose module is made up."""

    def add(name, unavailable=None, accepts=np.ndarray):
        module = ModuleType(f"made_up_{name}")
        module.unavailable = lambda: unavailable
        module.accepts = lambda x: isinstance(x, accepts)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        bnfast.register_backend(name, module=module.__name__, install=f"pip install {name}")
        return module

    return add


@pytest.fixture
def write_backend(monkeypatch, tmp_path):
    """Return a function that registers a backend whose module is a file with the given text."""

    names = []
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, text):
        names.append(f"written_{name}")
        (tmp_path / f"written_{name}.py").write_text(text)
        bnfast.register_backend(name, module=f"written_{name}", install=f"pip install {name}")

    yield write
    for name in names:
        sys.modules.pop(name, None)


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


# Unknown names


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("nunba", "did you mean 'numba'? "),
        ("Cython", "did you mean 'cython'? "),
        ("cuda12", "did you mean 'cuda'? "),
        ("zzz", ""),
        ("", ""),
    ],
)
def test_unknown_name_lists_the_names_and_the_nearest(name, hint):
    with pytest.raises(UnknownBackendError) as caught:
        registry.choose(name, X)
    assert str(caught.value) == (
        f"unknown backend {name!r} (asked for by the argument backend=); {hint}"
        "Known names: auto, cython, numba, cuda, numpy"
    )


def in_context(name):
    with bnfast.use_backend(name):
        pass


def from_environment(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BNFAST_BACKEND", name)
        registry.choose(None, X)


ASKED_BY = [
    pytest.param(lambda name: registry.choose(name, X), "the argument backend=", id="argument"),
    pytest.param(in_context, "use_backend()", id="context"),
    pytest.param(bnfast.set_backend, "set_backend()", id="process"),
    pytest.param(from_environment, "the environment variable BNFAST_BACKEND", id="environment"),
]


@pytest.mark.parametrize(("ask", "source"), ASKED_BY)
def test_errors_name_who_asked(add_backend, ask, source):
    add_backend("broken", unavailable="it is broken.")
    asked = re.escape(f"(asked for by {source})")
    with pytest.raises(UnknownBackendError, match=rf"^unknown backend 'nobody' {asked}; Known"):
        ask("nobody")
    with pytest.raises(BackendUnavailableError, match=rf"^backend 'broken' {asked} cannot run "):
        ask("broken")


@pytest.mark.parametrize("value", [["numpy"], 3, True, b"numpy"])
def test_names_are_strings(value):
    for ask, source in (
        (lambda name: registry.choose(name, X), "the argument backend="),
        (bnfast.set_backend, "set_backend()"),
        (in_context, "use_backend()"),
    ):
        message = (
            f"{source} takes a backend name or a comma list of names, "
            f"not {type(value).__name__}: {value!r}"
        )
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            ask(value)


def test_errors_have_the_usual_bases():
    assert issubclass(UnknownBackendError, ValueError)
    assert issubclass(BackendUnavailableError, RuntimeError)


@pytest.mark.parametrize("name", ["nunba", "cuda"])
def test_bad_variable_fails_in_a_fresh_process_at_first_use(name):
    error = error_of("import bnfast; print('imported'); bnfast.get_backend()", BNFAST_BACKEND=name)
    assert f"backend '{name}' (asked for by the environment variable BNFAST_BACKEND)" in error


def test_layer_checks_its_backend_when_it_is_made():
    with pytest.raises(UnknownBackendError, match="did you mean 'numba'"):
        bnfast.BatchNorm2d(3, backend="nunba")


# Known backends that cannot run


def test_module_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, CYTHON, None)
    row = bnfast.list_backends()["cython"]
    assert row == (
        "cython",
        False,
        f"the module {CYTHON} was not built or installed",
        "pip install --force-reinstall --no-binary bnfast bnfast  # needs a C compiler",
        CYTHON,
    )
    with pytest.raises(BackendUnavailableError, match="was not built or installed") as caught:
        registry.load("cython")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_module_whose_dependency_is_not_there(write_backend):
    write_backend("needy", "import no_such_dependency")
    reason = "importing written_needy failed: No module named 'no_such_dependency'"
    assert bnfast.list_backends()["needy"].reason == reason
    with pytest.raises(BackendUnavailableError, match=re.escape(reason)) as caught:
        registry.choose("needy", X)
    assert caught.value.__cause__.name == "no_such_dependency"


def test_import_error_is_a_reason(write_backend):
    write_backend("linked", "raise ImportError('libgomp.so.1: cannot open shared object file')")
    reason = "importing written_linked failed: libgomp.so.1: cannot open shared object file"
    assert bnfast.list_backends()["linked"].reason == reason


@pytest.mark.parametrize(
    ("text", "error"), [("1 / 0", ZeroDivisionError), ("raise OSError('disk')", OSError)]
)
def test_other_errors_of_a_backend_propagate(write_backend, text, error):
    write_backend("buggy", text)
    with pytest.raises(error):
        registry.choose("buggy", X)
    with pytest.raises(error):
        bnfast.list_backends()


def test_sentence_of_unavailable_is_the_reason(add_backend):
    add_backend("mine", unavailable="mine needs a moon phase; wait a week.")
    row = bnfast.list_backends()["mine"]
    assert (row.available, row.reason) == (False, "mine needs a moon phase; wait a week.")
    with pytest.raises(BackendUnavailableError) as caught:
        registry.load("mine")
    assert caught.value.__cause__ is None


def test_reason_that_goes_away_is_forgotten(add_backend):
    module = add_backend("mine", unavailable="not yet.")
    with pytest.raises(BackendUnavailableError):
        registry.load("mine")
    module.unavailable = lambda: None
    assert registry.load("mine") is module


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


def test_auto_never_picks_a_third_party(add_backend, monkeypatch):
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


# Arrays that live elsewhere


@pytest.mark.parametrize("array", [OnGpu(), Dlpack(2), Dlpack(13), Dlpack(10)])
def test_auto_sends_device_arrays_to_cuda(array):
    with pytest.raises(BackendUnavailableError) as caught:
        registry.choose(None, array)
    assert str(caught.value).startswith(
        "backend 'cuda' (asked for by auto, for an array on a GPU) cannot run here\n"
        f"  cuda: {bnfast.list_backends()['cuda'].reason}\n"
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


# register_backend


@pytest.mark.parametrize("name", ["numba", "cuda", "mine"])
def test_register_refuses_a_name_that_is_taken(add_backend, name):
    add_backend("mine")
    module = bnfast.list_backends()[name].module
    message = f"^backend '{name}' is already registered \\(module {module}\\); choose another name$"
    with pytest.raises(ValueError, match=message):
        bnfast.register_backend(name, module="other", install="pip install other")
    assert bnfast.list_backends()[name].module == module


@pytest.mark.parametrize("name", ["auto", "", "Mine", "a,b", "a b", "3d", "mine\n"])
def test_register_refuses_a_malformed_name(name):
    message = (
        f"cannot register a backend as {name!r}: a name has lower-case letters, digits, '_' and "
        "'-', starts with a letter, and is not 'auto'"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bnfast.register_backend(name, module="m", install="pip install m")


@pytest.mark.parametrize("module", ["", "pkg..mod", "pkg/mod.py", ".mod", "my-mod"])
def test_register_refuses_what_is_no_module_path(module):
    message = f"backend 'mine': module={module!r} is no dotted path such as 'pkg.mod'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bnfast.register_backend("mine", module=module, install="pip install m")
    assert "mine" not in bnfast.list_backends()


def test_register_refuses_an_empty_install_line():
    with pytest.raises(ValueError, match=r"^backend 'mine': install= is empty; give the command"):
        bnfast.register_backend("mine", module="m", install=" ")


def test_register_imports_nothing_and_shows_up_last(write_backend):
    write_backend("late", "def unavailable(): return None")
    assert "written_late" not in sys.modules
    assert list(bnfast.list_backends()) == ["cython", "numba", "cuda", "numpy", "late"]
    assert "written_late" in sys.modules


def test_registering_in_many_threads_lets_one_win():
    outcomes = []

    def register(number):
        try:
            bnfast.register_backend("mine", module=f"m{number}", install="pip install m")
        except ValueError:
            outcomes.append(None)
        else:
            outcomes.append(f"m{number}")

    pool = [threading.Thread(target=register, args=(number,)) for number in range(8)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    (winner,) = [outcome for outcome in outcomes if outcome]
    assert registry._table["mine"].module == winner


# The rest


def test_list_backends_is_a_copy():
    bnfast.list_backends().clear()
    assert list(bnfast.list_backends()) == ["cython", "numba", "cuda", "numpy"]


def test_cuda_says_that_it_is_not_there_yet():
    row = bnfast.list_backends()["cuda"]
    assert not row.available
    assert (
        row.reason == "this version of bnfast has no CUDA kernels yet; a later one will bring them"
    )


def test_loaded_lists_what_was_imported_and_imports_nothing(monkeypatch, write_backend):
    write_backend("late", "def unavailable(): return None")
    monkeypatch.setitem(sys.modules, CYTHON, None)
    names = [module.__name__ for module in registry.loaded()]
    assert "written_late" not in names
    assert CYTHON not in names
    registry.load("late")
    registry.load("numpy")
    names = [module.__name__ for module in registry.loaded()]
    assert {NUMPY, "written_late"} <= set(names)


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
