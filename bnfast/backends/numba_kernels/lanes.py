"""Sixteen numbers side by side: the vector type in which the Numba kernels are written.

`Lanes` is an LLVM vector with operators. A kernel that adds lane by lane vectorises by what it
says, not by what an optimiser may or may not do with it, and so

* the order of every addition is fixed by the source, without any fast-math flag. The same bits
  come out of the serial and the parallel build, in the middle of a loop and at its end;
* in-place calls are as fast as others: no run-time test for overlapping arrays is needed.

LLVM splits sixteen lanes into whatever registers the CPU has. Sixteen float64 are four AVX2
registers: as many independent chains of additions as hide the latency of one.

Arrays are addressed by flat index; a step that is called often takes their addresses, since an
array goes to a function as a dozen numbers. Functions with ``_last`` in their name handle the last
``count < 16`` elements before ``stop``: they fill the last lanes, and the other lanes are zero.

    data(x)                          the address of x, which serves as x below
    load(x, i)                       x[i : i+16]
    load_last(x, stop, count)        the same for x[stop-count : stop]
    prefetch(x, i)                   asks for the cache line of x[i], whether or not it exists
    store(y, i, v)                   y[i : i+16] = v, rounded to the dtype of y
    store_last(y, stop, v, count)    y[stop-count : stop] = the last lanes of v
    get(x, i), put(y, i, v)          one element
    cast(v, like)                    v in the dtype of ``like``, a number, lanes or an array
    + - * /                          lane by lane; a number stands for sixteen of it
    muladd(a, b, c)                  a * b + c: one rounding where the CPU has FMA, else two
    where_positive(t, v)             v where t > 0, else 0
    where_nonzero(t, v, w)           v where t != 0, else w
    unless_zero(t, v)                v where t != 0, else 0
    rectify(v)                       0 where v < 0, else v: NaN passes
    last_lanes(v, count)             v with zero in all but the last ``count`` lanes
    total(v)                         the sum over the lanes, pairwise
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import operator
from typing import Any

import numba.extending
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import models, register_model

LANES = 16

intrinsic: Any = numba.extending.intrinsic
"""Its declared type is that of the Python function, which has one parameter more than the calls."""

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)


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


def _operands(context, builder, args, kinds, result):
    """Return LLVM values of type ``result``, with numbers spread over the lanes."""
    values = []
    for value, kind in zip(args, kinds, strict=True):
        if isinstance(kind, Lanes) or not isinstance(result, Lanes):
            values.append(value)
        else:
            values.append(_spread(builder, context.cast(builder, value, kind, result.dtype)))
    return values


def _spread(builder, value):
    vector = ir.VectorType(value.type, LANES)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, _I32(0))
    zeros = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)


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


@intrinsic
def data(typingctx, x):
    """Return the address of the first element."""

    def codegen(context, builder, sig, args):
        return context.make_array(sig.args[0])(context, builder, args[0]).data

    return types.CPointer(x.dtype)(x), codegen


def _address(context, builder, kind, value, index):
    """Return the address of an element of an array, or of what `data` made of one."""
    if isinstance(kind, types.Array):
        value = context.make_array(kind)(context, builder, value).data
    return builder.gep(value, [index])


@intrinsic
def load(typingctx, x, index):
    """Return x[index : index + 16]."""

    def codegen(context, builder, sig, args):
        kind = sig.args[0]
        address = _address(context, builder, kind, *args)
        vector = context.get_value_type(sig.return_type)
        pointer = builder.bitcast(address, vector.as_pointer())
        return builder.load(pointer, align=kind.dtype.bitwidth // 8)

    return Lanes(x.dtype)(x, types.intp), codegen


@intrinsic
def store(typingctx, y, index, value):
    """Round ``value`` to the dtype of ``y`` and put it into y[index : index + 16]."""

    def codegen(context, builder, sig, args):
        kind = sig.args[0]
        address = _address(context, builder, kind, args[0], args[1])
        rounded = _convert(context, builder, args[2], sig.args[2], Lanes(kind.dtype))
        pointer = builder.bitcast(address, rounded.type.as_pointer())
        builder.store(rounded, pointer, align=kind.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(y, types.intp, value), codegen


@intrinsic
def prefetch(typingctx, x, index):
    """Ask for the cache line of an element, which need not exist, into the L2 cache."""

    def codegen(context, builder, sig, args):
        byte = ir.IntType(8).as_pointer()
        address = builder.bitcast(_address(context, builder, sig.args[0], *args), byte)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [byte] + [_I32] * 3),
            "llvm.prefetch.p0i8",
        )
        builder.call(function, [address, _I32(0), _I32(2), _I32(1)])  # to read, into L2, data
        return context.get_dummy_value()

    return types.void(x, types.intp), codegen


@intrinsic
def load_last(typingctx, x, stop, count):
    """Return x[stop - count : stop] in the last lanes, zero in the others."""

    def codegen(context, builder, sig, args):
        kind = sig.args[0]
        array, stop, count = args
        vector = context.get_value_type(sig.return_type)
        room = cgutils.alloca_once(builder, vector)
        enough = builder.icmp_signed(">=", stop, _I64(LANES))
        with builder.if_else(enough, likely=True) as (whole, piecewise):
            # Sixteen elements can be read wherever they are: what is not asked for is masked.
            with whole:
                start = builder.sub(stop, _I64(LANES))
                address = _address(context, builder, kind, array, start)
                pointer = builder.bitcast(address, vector.as_pointer())
                read = builder.load(pointer, align=kind.dtype.bitwidth // 8)
                masked = _mask_last(builder, read, count)
                after_whole = builder.block
            with piecewise:
                builder.store(ir.Constant(vector, None), room)
                element = builder.bitcast(room, vector.element.as_pointer())
                offset = builder.sub(_I64(LANES), count)
                start = builder.sub(stop, count)
                with cgutils.for_range(builder, count) as loop:
                    index = builder.add(start, loop.index)
                    source = _address(context, builder, kind, array, index)
                    target = builder.gep(element, [builder.add(offset, loop.index)])
                    builder.store(builder.load(source), target)
                pieced = builder.load(room)
                after_piecewise = builder.block
        result = builder.phi(vector)
        result.add_incoming(masked, after_whole)
        result.add_incoming(pieced, after_piecewise)
        return result

    return Lanes(x.dtype)(x, types.intp, types.intp), codegen


@intrinsic
def store_last(typingctx, y, stop, value, count):
    """Put the last ``count`` lanes into y[stop - count : stop], rounded to the dtype of ``y``."""

    def codegen(context, builder, sig, args):
        kind = sig.args[0]
        array, stop, value, count = args
        rounded = _convert(context, builder, value, sig.args[2], Lanes(kind.dtype))
        room = cgutils.alloca_once_value(builder, rounded)
        element = builder.bitcast(room, rounded.type.element.as_pointer())
        offset = builder.sub(_I64(LANES), count)
        start = builder.sub(stop, count)
        with cgutils.for_range(builder, count) as loop:
            source = builder.gep(element, [builder.add(offset, loop.index)])
            target = _address(context, builder, kind, array, builder.add(start, loop.index))
            builder.store(builder.load(source), target)
        return context.get_dummy_value()

    return types.void(y, types.intp, value, types.intp), codegen


@intrinsic
def get(typingctx, x, index):
    """Return the element at a flat index."""

    def codegen(context, builder, sig, args):
        return builder.load(_address(context, builder, sig.args[0], *args))

    return x.dtype(x, types.intp), codegen


@intrinsic
def put(typingctx, y, index, value):
    """Store a number, rounded to the dtype of ``y``, at a flat index."""

    def codegen(context, builder, sig, args):
        kind = sig.args[0]
        rounded = context.cast(builder, args[2], sig.args[2], kind.dtype)
        builder.store(rounded, _address(context, builder, kind, args[0], args[1]))
        return context.get_dummy_value()

    return types.void(y, types.intp, value), codegen


def _convert(context, builder, value, source, target):
    if source.dtype == target.dtype:
        return value
    wider = target.dtype.bitwidth > source.dtype.bitwidth
    convert = builder.fpext if wider else builder.fptrunc
    return convert(value, context.get_value_type(target))


@intrinsic
def cast(typingctx, value, like):
    """Return ``value`` in the dtype of ``like``."""
    dtype = getattr(like, "dtype", like)
    result = Lanes(dtype) if isinstance(value, Lanes) else dtype

    def codegen(context, builder, sig, args):
        if isinstance(value, Lanes):
            return _convert(context, builder, args[0], value, result)
        return context.cast(builder, args[0], value, result)

    return result(value, like), codegen


@intrinsic
def muladd(typingctx, a, b, c):
    """Return a * b + c."""
    kinds = (a, b, c)
    result = _common(*kinds) or c

    def codegen(context, builder, sig, args):
        operands = _operands(context, builder, args, kinds, result)
        # The "fmuladd" of LLVM, not its "fma": the latter calls a library function per element
        # where the CPU has no such instruction.
        operand = operands[0].type
        bits = getattr(result, "dtype", result).bitwidth
        name = f"llvm.fmuladd.{f'v{LANES}' if isinstance(result, Lanes) else ''}f{bits}"
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(operand, [operand] * 3), name
        )
        return builder.call(function, operands)

    return result(*kinds), codegen


@intrinsic
def where_positive(typingctx, test, value):
    """Return ``value`` where ``test`` > 0, else 0."""

    def codegen(context, builder, sig, args):
        positive = builder.fcmp_ordered(">", args[0], ir.Constant(args[0].type, None))
        return builder.select(positive, args[1], ir.Constant(args[1].type, None))

    return value(test, value), codegen


@intrinsic
def where_nonzero(typingctx, test, value, other):
    """Return ``value`` where ``test`` is not 0, else ``other``."""

    def codegen(context, builder, sig, args):
        nonzero = builder.fcmp_unordered("!=", args[0], ir.Constant(args[0].type, None))
        return builder.select(nonzero, args[1], args[2])

    return value(test, value, other), codegen


@intrinsic
def unless_zero(typingctx, test, value):
    """Return ``value`` where ``test`` is not 0, else 0."""

    def codegen(context, builder, sig, args):
        nonzero = builder.fcmp_unordered("!=", args[0], ir.Constant(args[0].type, None))
        return builder.select(nonzero, args[1], ir.Constant(args[1].type, None))

    return value(test, value), codegen


@intrinsic
def rectify(typingctx, value):
    """Return 0 where ``value`` <= 0, else ``value``."""

    def codegen(context, builder, sig, args):
        zero = ir.Constant(args[0].type, None)
        return builder.select(builder.fcmp_ordered("<=", args[0], zero), zero, args[0])

    return value(value), codegen


def _mask_last(builder, value, count):
    lanes = ir.VectorType(_I32, LANES)
    numbers = ir.Constant(lanes, list(range(LANES)))
    first = _spread(builder, builder.trunc(builder.sub(_I64(LANES), count), _I32))
    keep = builder.icmp_signed(">=", numbers, first)
    return builder.select(keep, value, ir.Constant(value.type, None))


@intrinsic
def last_lanes(typingctx, value, count):
    """Return ``value`` with zero in all but the last ``count`` lanes."""

    def codegen(context, builder, sig, args):
        return _mask_last(builder, *args)

    return value(value, types.intp), codegen


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
                    ir.Constant(ir.VectorType(_I32, width), list(range(start, start + width))),
                )
                for start in (0, width)
            ]
            vector = builder.fadd(*halves)
        return builder.extract_element(vector, _I32(0))

    return value.dtype(value), codegen


@intrinsic
def zeros(typingctx):
    """Return sixteen float64 zeros."""

    def codegen(context, builder, sig, args):
        return ir.Constant(context.get_value_type(sig.return_type), None)

    return Lanes(types.float64)(), codegen
