"""Sixteen numbers side by side: the vector type in which the Numba kernels are written.

`Lanes` is an LLVM vector with operators. A kernel that adds lane by lane vectorises by what it
says, not by what an optimiser may or may not do with it, and so

* the order of every addition is fixed by the source, without any fast-math flag. The same bits
  come out of the serial and the parallel build, in the middle of a loop and at its end;
* in-place calls are as fast as others: no run-time test for overlapping arrays is needed.

LLVM splits sixteen lanes into whatever registers the CPU has. Sixteen float64 are four AVX2
registers: as many independent chains of additions as hide the latency of one. They are only two of
AVX-512, of which there are enough for two sets of lanes: `PAIRED`.

`addresses` has the ways between lanes and memory. Here::

    cast(v, like)                    v in the dtype of ``like``: a number, lanes or an address
    + - * /                          lane by lane; a number stands for sixteen of it
    muladd(a, b, c)                  a * b + c: one rounding where the CPU has FMA, else two
    square_root(v)
    difference(a, b)                 a - b, and 0 where they are equal, infinities too
    where_positive(t, v)             v where t > 0, else 0
    where_nonzero(t, v, w)           v where t != 0, else w
    rectify(v)                       0 where v <= 0, else v: NaN passes
    settle(v, low)                   v + low where low is finite, else v
    quiet(v)                         v, any NaN being the same one, with no lower bits
    opaque(a)                        the number a, of which the optimiser does not know what it is
    misfit(v, least, most)           1 where least <= abs(v) <= most does not hold, else 0
    first_lanes(count, v, w)         v in the first ``count`` lanes, w in the others
    total(v)                         the sum over the lanes, pairwise
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import operator
from typing import Any

import numba.extending
from llvmlite import binding, ir
from numba.core import cgutils, config, types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import models, register_model

LANES = 16

_config: Any = config  # which does not declare its settings to type checkers


def cpu_features() -> list[str]:
    """Return what Numba compiles for here, as LLVM spells it."""
    features = _config.CPU_FEATURES  # what the user set, else None
    if features is None:
        features = binding.get_host_cpu_features().flatten()
    named: list[str] = features.split(",")
    return named


def instruction_set() -> str:
    """Return the widest vector extension that Numba compiles for here."""
    present = cpu_features()
    for name in ("avx512f", "avx2", "avx", "neon"):
        if f"+{name}" in present:
            return name
    return "baseline"


PAIRED = instruction_set() == "avx512f"
"""Whether sums of runs are taken in two sets of lanes, for even and for odd steps."""

intrinsic: Any = numba.extending.intrinsic
"""Its declared type is that of the Python function, which has one parameter more than the calls."""

I32 = ir.IntType(32)
I64 = ir.IntType(64)


class Lanes(types.Type):
    """Numba type of sixteen numbers of one dtype."""

    def __init__(self, dtype):
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        element = dmm.lookup(fe_type.dtype).get_value_type()
        super().__init__(dmm, fe_type, ir.VectorType(element, LANES))


def call_llvm(builder, name, result, arguments):
    """Call an intrinsic function of LLVM."""
    kinds = [argument.type for argument in arguments]
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, kinds), name)
    return builder.call(function, arguments)


def suffix(kind):
    """Return how LLVM's intrinsic functions spell a type."""
    if isinstance(kind, ir.VectorType):
        return f"v{kind.count}{suffix(kind.element)}"
    return {ir.DoubleType(): "f64", ir.FloatType(): "f32"}.get(kind, "i16")


def spread(builder, value):
    """Return lanes that all hold ``value``."""
    vector = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
    zeros = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


def first_of(builder, count):
    """Return the mask of the first ``count`` lanes."""
    numbers = ir.Constant(ir.VectorType(I32, LANES), list(range(LANES)))
    return builder.icmp_signed("<", numbers, spread(builder, builder.trunc(count, I32)))


def convert(context, builder, value, source, target):
    """Round or widen lanes, or a number, to the dtype of ``target``, of the same shape."""
    old, new = (getattr(kind, "dtype", kind) for kind in (source, target))
    if old == new:
        return value
    change = builder.fpext if new.bitwidth > old.bitwidth else builder.fptrunc
    return change(value, context.get_value_type(target))


def _operands(context, builder, args, kinds, result):
    """Return LLVM values of type ``result``, with numbers spread over the lanes."""
    values = []
    for value, kind in zip(args, kinds, strict=True):
        if isinstance(kind, Lanes) or not isinstance(result, Lanes):
            values.append(value)
        else:
            values.append(spread(builder, context.cast(builder, value, kind, result.dtype)))
    return values


def _common(*kinds):
    """Return the lanes among some argument types; lanes of different dtypes do not mix."""
    lanes = {kind for kind in kinds if isinstance(kind, Lanes)}
    return lanes.pop() if len(lanes) == 1 else None


def _define_operator(function, instruction):
    @infer_global(function)
    class Typing(AbstractTemplate):
        def generic(self, args, kws):
            result = _common(*args) if len(args) == 2 and not kws else None
            return result and signature(result, *args)

    def lower(context, builder, sig, args):
        operands = _operands(context, builder, args, sig.args, sig.return_type)
        return getattr(builder, instruction)(*operands)

    for left, right in ((Lanes, Lanes), (Lanes, types.Number), (types.Number, Lanes)):
        lower_builtin(function, left, right)(lower)


_define_operator(operator.add, "fadd")
_define_operator(operator.sub, "fsub")
_define_operator(operator.mul, "fmul")
_define_operator(operator.truediv, "fdiv")


def _define(emit, number):
    """Return an intrinsic of lanes and numbers, all lanes if any is: ``emit(builder, *values)``."""

    def typed(kinds):
        result = _common(*kinds) or kinds[-1]

        def codegen(context, builder, sig, args):
            return emit(builder, *_operands(context, builder, args, kinds, result))

        return result(*kinds), codegen

    def one(typingctx, a):
        return typed((a,))

    def two(typingctx, a, b):
        return typed((a, b))

    def three(typingctx, a, b, c):
        return typed((a, b, c))

    return intrinsic((one, two, three)[number - 1])


def _zero(value):
    return ir.Constant(value.type, None)


def _muladd(builder, a, b, c):
    # The "fmuladd" of LLVM, not its "fma": the latter calls a library function per element where
    # the CPU has no such instruction.
    return call_llvm(builder, f"llvm.fmuladd.{suffix(c.type)}", c.type, [a, b, c])


def _square_root(builder, v):
    return call_llvm(builder, f"llvm.sqrt.{suffix(v.type)}", v.type, [v])


def _magnitude(builder, v):
    return call_llvm(builder, f"llvm.fabs.{suffix(v.type)}", v.type, [v])


def _difference(builder, a, b):
    equal = builder.fcmp_ordered("==", a, b)
    return builder.select(equal, _zero(a), builder.fsub(a, b))


def _where_nonzero(builder, test, value, other):
    return builder.select(builder.fcmp_unordered("!=", test, _zero(test)), value, other)


def _rectify(builder, v):
    return builder.select(builder.fcmp_ordered("<=", v, _zero(v)), _zero(v), v)


def _quiet(builder, v):
    nan = ir.Constant(v.type, [float("nan")] * LANES)
    return builder.select(builder.fcmp_unordered("uno", v, v), nan, v)


def _settle(builder, v, low):
    finite = builder.fcmp_ordered("==", builder.fsub(low, low), _zero(low))
    return builder.select(finite, builder.fadd(v, low), v)


def _misfit(builder, v, least, most):
    size = _magnitude(builder, v)
    small = builder.fcmp_ordered("<", size, least)
    bad = builder.or_(small, builder.fcmp_ordered(">", size, most))
    kind = ir.VectorType(ir.DoubleType(), LANES) if isinstance(v.type, ir.VectorType) else v.type
    return builder.uitofp(bad, kind)


muladd = _define(_muladd, 3)
square_root = _define(_square_root, 1)
difference = _define(_difference, 2)
where_nonzero = _define(_where_nonzero, 3)
rectify = _define(_rectify, 1)
settle = _define(_settle, 2)
quiet = _define(_quiet, 1)
misfit = _define(_misfit, 3)


@intrinsic
def cast(typingctx, value, like):
    """Return ``value`` in the dtype of ``like``."""
    dtype = getattr(like, "dtype", like)
    result = Lanes(dtype) if isinstance(value, Lanes) else dtype

    def codegen(context, builder, sig, args):
        if isinstance(value, Lanes):
            return convert(context, builder, args[0], value, result)
        return context.cast(builder, args[0], value, result)

    return result(value, like), codegen


@intrinsic
def opaque(typingctx, value):
    """Return a number, of which the optimiser does not know what it is, on x86."""

    def codegen(context, builder, sig, args):
        if not builder.module.triple.startswith("x86_64"):
            return args[0]
        kind = args[0].type
        return builder.asm(ir.FunctionType(kind, [kind]), "", "=x,0", args, side_effect=False)

    return value(value), codegen


@intrinsic
def where_positive(typingctx, test, value):
    """Return ``value`` where ``test`` > 0, else 0."""

    def codegen(context, builder, sig, args):
        positive = builder.fcmp_ordered(">", args[0], _zero(args[0]))
        return builder.select(positive, args[1], _zero(args[1]))

    return value(test, value), codegen


@intrinsic
def first_lanes(typingctx, count, value, other):
    """Return lanes: ``value`` in the first ``count`` of them, ``other`` in the rest."""
    kinds = (value, other)
    result = _common(*kinds) or Lanes(value)

    def codegen(context, builder, sig, args):
        values = _operands(context, builder, args[1:], kinds, result)
        return builder.select(first_of(builder, args[0]), *values)

    return result(types.intp, *kinds), codegen


@intrinsic
def total(typingctx, value):
    """Return the sum over the lanes: halves are added to each other until one number is left."""

    def codegen(context, builder, sig, args):
        vector = args[0]
        width = LANES
        while width > 1:
            width //= 2
            halves = [
                builder.shuffle_vector(
                    vector,
                    ir.Constant(vector.type, ir.Undefined),
                    ir.Constant(ir.VectorType(I32, width), list(range(start, start + width))),
                )
                for start in (0, width)
            ]
            vector = builder.fadd(*halves)
        return builder.extract_element(vector, I32(0))

    return value.dtype(value), codegen


@intrinsic
def zeros(typingctx):
    """Return sixteen float64 zeros."""

    def codegen(context, builder, sig, args):
        return ir.Constant(context.get_value_type(sig.return_type), None)

    return Lanes(types.float64)(), codegen
