"""What the registry says: unknown names, backends that cannot run, rows that are added."""

from __future__ import annotations

import re
import sys
import threading

import numpy as np
import pytest
from fresh_python import error_of

import bnfast
from bnfast import BackendUnavailableError, UnknownBackendError, registry

pytestmark = pytest.mark.usefixtures("fresh_registry")

X = np.ones((2, 3, 4, 4), np.float32)
CYTHON = "bnfast.backends.cython_openmp"
NUMPY = "bnfast.backends.numpy_reference"


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
