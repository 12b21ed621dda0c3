"""`KernelConformance`, the suite that a backend's test class inherits."""

from __future__ import annotations

import contextlib
import decimal
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import ClassVar, cast

import numpy as np
import pytest

from bnfast import registry
from bnfast.errors import BackendUnavailableError, UnknownBackendError
from bnfast.spec import Kernels
from bnfast.testing import cases, guard, reference, seeding
from bnfast.testing.contract import ContractTests
from bnfast.testing.determinism import DeterminismTests
from bnfast.testing.robustness import RobustnessTests
from bnfast.testing.storage import StorageTests


class KernelConformance(ContractTests, RobustnessTests, StorageTests, DeterminismTests):
    """Everything that `bnfast.spec` asks of a backend, as tests.

    Derive a class whose name starts with ``Test`` and set `backend`; pytest collects the rest.
    Where the backend cannot run, its tests are skipped with its own sentence. Those on float16 and
    bfloat16 are left out unless the kernels name these in ``STORAGE_DTYPES`` when the class is
    made; those on bfloat16 are skipped without the package ml_dtypes.

    Attributes
    ----------
    backend : str or module
        A name that `bnfast.register_backend` or bnfast itself put into the table, or the module
        with the kernels.
    fma : bool
        Whether the kernels use fused multiply-add here. Without it float32 outputs get
        `bnfast.spec.Y_ULPS_FLOAT32_WITHOUT_FMA`.
    most_elements : int or None
        Of arrays. Tests on larger ones are left out of the class, for a backend that runs in an
        emulator: about 1000 keep a case of nearly every test. None leaves out none.
    dtypes : tuple of str or None
        Names of the dtypes to test, of those that the backend takes: to give some of them smaller
        arrays. None tests all.
    seed : int or None
        The seed of the random inputs; None draws a fresh one per run, which the report of a
        failed test prints.

    Examples
    --------
    >>> class TestReference(KernelConformance):
    ...     backend = "numpy"
    """

    backend: ClassVar[str | ModuleType]
    fma: bool = True
    most_elements: ClassVar[int | None] = None
    dtypes: ClassVar[tuple[str, ...] | None] = None
    seed: ClassVar[int | None] = None

    def __init_subclass__(cls) -> None:
        """Leave out what the backend does not take, and what is larger than `most_elements`."""
        backend = vars(cls).get("backend")
        if isinstance(backend, str):
            with contextlib.suppress(BackendUnavailableError, UnknownBackendError):
                backend = registry.load(backend)
        if backend is not None and not isinstance(backend, str):
            plain = tuple(cases.dtype_name(dtype) for dtype in cases.DTYPES)
            cases.leave_out_dtypes(cls, plain + getattr(backend, "STORAGE_DTYPES", ()))
        if vars(cls).get("dtypes") is not None:
            cases.leave_out_dtypes(cls, cls.dtypes or ())
        if "most_elements" in vars(cls) and cls.most_elements is not None:
            cases.leave_out_larger(cls, cls.most_elements)

    @pytest.fixture
    def kernels(self, record_property: Callable[[str, object], None]) -> Kernels:
        """Return the kernels under test, and note in the test's report whose they are."""
        backend = self.backend
        if isinstance(backend, str):
            try:
                kernels = registry.load(backend)
            except BackendUnavailableError:
                pytest.skip(f"{backend}: {registry.list_backends()[backend].reason}")
        else:
            kernels = cast("Kernels", backend)
            reason = kernels.unavailable()
            if isinstance(reason, str):
                pytest.skip(reason)
        name = backend if isinstance(backend, str) else backend.__name__
        record_property("conformance_backend", name)
        return kernels

    @pytest.fixture
    def run(self, kernels: Kernels) -> Iterator[guard.Run]:
        """Return `guard.run` for the kernels under test."""
        with decimal.localcontext(reference.DECIMAL_CONTEXT):
            yield functools.partial(guard.run, kernels)

    @pytest.fixture
    def rng(self, request: pytest.FixtureRequest) -> np.random.Generator:
        """Return this test's own generator of random inputs."""
        return seeding.generator(request, self.seed)
