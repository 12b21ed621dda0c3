"""Is the module a backend at all: the functions, their signatures, the array hooks."""

# ruff: noqa: D102  (the name of a test is its description)

from __future__ import annotations

import inspect

import numpy as np

from bnfast import layout
from bnfast.spec import Kernels
from bnfast.testing.cases import over

FUNCTIONS = tuple(
    name for name, member in vars(Kernels).items() if inspect.isfunction(member) and name[0] != "_"
)


class ContractTests:
    """What can be said of a backend without computing anything."""

    def test_unavailable_is_none_or_one_sentence(self, kernels: Kernels) -> None:
        reason = kernels.unavailable()
        assert reason is None or (isinstance(reason, str) and reason.strip() != "")

    def test_instruction_set_is_a_name(self, kernels: Kernels) -> None:
        name = kernels.instruction_set()
        assert isinstance(name, str)
        assert name.strip() != ""

    @over("function", FUNCTIONS)
    def test_signature_is_that_of_the_protocol(self, kernels: Kernels, function: str) -> None:
        def parameters(member: object) -> list[tuple[str, object]]:
            signature = inspect.signature(member)  # type: ignore[arg-type]
            return [(p.name, p.kind) for p in signature.parameters.values()]

        own = parameters(getattr(kernels, function))
        assert own == parameters(getattr(Kernels, function))[1:]

    def test_accepts_only_arrays(self, kernels: Kernels) -> None:
        assert kernels.accepts(np.zeros((1, 1), np.float32)) is True
        assert kernels.accepts([[0.0]]) is False
        assert kernels.accepts(None) is False

    def test_view_has_the_planned_form(self, kernels: Kernels, rng: np.random.Generator) -> None:
        dense = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
        for x in (
            dense,
            dense.transpose(0, 3, 1, 2),
            np.asfortranarray(dense),
            dense[::-1, :, ::2],
            dense.astype(dense.dtype.newbyteorder()),
            np.broadcast_to(dense[:, :, :1, :1], dense.shape),
        ):
            plan = layout.plan(x.shape, x.strides, x.dtype)
            form = kernels.view(x, plan)
            assert (form.shape, form.dtype) == (plan.kernel_shape, plan.dtype)
            assert form.flags.c_contiguous
            assert form.flags.aligned
            if plan.dense and x.dtype.isnative:
                assert np.shares_memory(form, x)
            in_memory_order = x if plan.axes is None else x.transpose(plan.axes)
            assert np.array_equal(form.ravel(), in_memory_order.ravel())

    def test_empty_has_the_planned_layout(self, kernels: Kernels) -> None:
        for x in (
            np.zeros((2, 3, 4, 5), np.float32),
            np.zeros((2, 4, 5, 3), np.float64).transpose(0, 3, 1, 2),
            np.zeros((5, 4, 3, 2), np.float32).T,
            np.zeros((0, 3, 4, 5), np.float32),
        ):
            plan = layout.plan(x.shape, x.strides, x.dtype)
            y = kernels.empty(plan, x)
            assert (y.shape, y.dtype) == (x.shape, x.dtype)
            assert x.size == 0 or y.strides == x.strides
            assert y.flags.writeable
