"""Memory as kernels see it: addresses, and the ways from there to lanes and back.

A kernel is handed the address of an array's first element and the sizes as numbers. Numba's own
array type is a dozen numbers and a reference count: taking one apart costs 250 ns of a call, an
`Address` 5. None becomes the address 0: the array is absent. Elements have flat indices; an array
that a kernel allocated may stand for its address.

    present(x)                       whether x is not absent
    same(x, y)                       whether two addresses are equal
    itemsize_of(x)                   the bytes of an element: a constant to the optimiser
    room(x, rows, columns)           a new array of the dtype that x is computed in
    load(x, i)                       x[i : i+16]
    load_wide(x, i)                  the same in float64
    load_terms(x, i)                 the same in any order, the same for all arrays of a dtype
    load_some(x, i, count)           x[i : i+count] in the first lanes, zero in the others
    store(y, i, v)                   y[i : i+16] = v, rounded to the dtype of y
    store_some(y, i, v, count)       y[i : i+count] = the first lanes of v
    stream(y, i, v)                  as store, past the cache, where a cache line (or half of one,
                                     which sixteen elements of 16 bits fill) begins
    stream_two(y, i, v, w)           y[i : i+32] likewise, of 16 bits a whole line
    fence()                          waits until what was streamed can be seen
    to_line(y, i)                    how many elements there are from y[i] to where a line begins
    prefetch(x, i)                   asks for x[i : i+16], whether or not it exists
    get(x, i), put(y, i, v)          one element
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import NativeValue, models, overload, register_model, unbox
from numba.np.numpy_support import as_dtype

from bnfast.backends.numba_kernels.lanes import (
    I32,
    I64,
    LANES,
    Lanes,
    call_llvm,
    convert,
    first_of,
    intrinsic,
    suffix,
)
from bnfast.backends.numba_kernels.storage import (
    I16,
    element,
    itemsize,
    raised,
    raised_pairs,
    rounded,
    storage_of,
)

LINE = 64
"""Bytes of a cache line."""

_DATA = object.__basicsize__
_DIMENSIONS = _DATA + 16
"""Where an array object holds the addresses of its first element and of its dimensions, as NumPy's
C interface has it: after Python's own fields; between them is their number."""


class Address(types.Type):
    """Numba type of the address of elements that are computed in one dtype, or 0.

    ``storage`` is the name of a 16-bit dtype in which they are stored; None if it is that dtype.
    """

    def __init__(self, dtype, storage=None):
        self.dtype = dtype
        self.storage = storage
        super().__init__(name=f"Address({storage or dtype})")


@register_model(Address)
class _AddressModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        own = I16 if fe_type.storage else dmm.lookup(fe_type.dtype).get_data_type()
        super().__init__(dmm, fe_type, own.as_pointer())


class Dimensions(Address):
    """Numba type of the address of an array's dimensions."""

    def __init__(self):
        super().__init__(types.intp)
        self.name = "Dimensions"


register_model(Dimensions)(_AddressModel)


def _field(c, array, offset, kind):
    """Return a field of an array object."""
    start = c.builder.bitcast(array, ir.IntType(8).as_pointer())
    return c.builder.load(c.builder.bitcast(c.builder.gep(start, [I64(offset)]), kind.as_pointer()))


@unbox(Address)
def _address_of(kind, array, c):
    """Return the address in an array object; 0 for None. Nothing is checked."""
    pointer = c.context.get_value_type(kind)
    absent = c.builder.icmp_unsigned("==", array, c.pyapi.borrow_none())
    address = _field(c, array, _DATA, pointer)
    return NativeValue(c.builder.select(absent, ir.Constant(pointer, None), address))


@unbox(Dimensions)
def _dimensions_of(kind, array, c):
    """Return where an array object holds its dimensions."""
    return NativeValue(_field(c, array, _DIMENSIONS, c.context.get_value_type(kind)))


def _pointer(context, builder, kind, value, index):
    if isinstance(kind, types.Array):
        value = context.make_array(kind)(context, builder, value).data
    return builder.gep(value, [index])


def _vector_pointer(context, builder, kind, value, index):
    vector = ir.VectorType(element(context, kind), LANES).as_pointer()
    return builder.bitcast(_pointer(context, builder, kind, value, index), vector)


def _to_store(context, builder, kind, value, given):
    """Return lanes of the type ``given`` as an array of ``kind`` holds them."""
    return rounded(builder, kind, convert(context, builder, value, given, Lanes(kind.dtype)))


def _stream(context, builder, kind, place, stored):
    """Store a vector past the cache; ``place`` begins with an address and an index."""
    pointer = builder.bitcast(
        _pointer(context, builder, kind, *place[:2]), stored.type.as_pointer()
    )
    filled = min(LINE, stored.type.count * itemsize(kind))
    written = builder.store(stored, pointer, align=filled)
    written.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))


@intrinsic
def present(typingctx, x):
    """Return whether there is an array."""

    def codegen(context, builder, sig, args):
        return builder.icmp_unsigned("!=", args[0], ir.Constant(args[0].type, None))

    return types.boolean(x), codegen


@intrinsic
def same(typingctx, x, y):
    """Return whether two addresses are equal."""

    def codegen(context, builder, sig, args):
        return builder.icmp_unsigned("==", *args)

    return types.boolean(x, y), codegen


@intrinsic
def itemsize_of(typingctx, x):
    """Return the bytes of an element."""

    def codegen(context, builder, sig, args):
        return I64(itemsize(sig.args[0]))

    return types.intp(x), codegen


def room(x, rows, columns):
    """Return a new array of the dtype that x is computed in."""
    raise NotImplementedError("only in compiled code")


@overload(room, inline="always")
def _room(x, rows, columns):
    dtype = as_dtype(x.dtype).type
    return lambda x, rows, columns: np.empty((rows, columns), dtype)


@intrinsic
def load(typingctx, x, index):
    """Return x[index : index + 16]."""

    def codegen(context, builder, sig, args):
        pointer = _vector_pointer(context, builder, x, *args)
        return raised(builder, x, builder.load(pointer, align=itemsize(x)))

    return Lanes(x.dtype)(x, types.intp), codegen


def _halves(context, builder, kind, array, index):
    """Return x[index : index + 8] and the next eight."""
    half = ir.VectorType(element(context, kind), LANES // 2)
    halves = []
    for offset in (0, LANES // 2):
        at = _pointer(context, builder, kind, array, builder.add(index, I64(offset)))
        read = builder.load(builder.bitcast(at, half.as_pointer()), align=itemsize(kind))
        halves.append(raised(builder, kind, read))
    return halves


def _widened(builder, halves):
    """Return sixteen numbers in float64."""
    wide = ir.VectorType(ir.DoubleType(), LANES // 2)
    halves = [half if half.type == wide else builder.fpext(half, wide) for half in halves]
    order = ir.Constant(ir.VectorType(I32, LANES), list(range(LANES)))
    return builder.shuffle_vector(*halves, order)


@intrinsic
def load_wide(typingctx, x, index):
    """Return x[index : index + 16] in float64.

    It is read in two halves, because a conversion of eight numbers can read them itself, while one
    of sixteen would have to take them apart in registers.
    """

    def codegen(context, builder, sig, args):
        return _widened(builder, _halves(context, builder, x, *args))

    return Lanes(types.float64)(x, types.intp), codegen


@intrinsic
def load_terms(typingctx, x, index):
    """Return x[index : index + 16] in float64, in any order.

    Two adjacent bfloat16 are 32 bits, of which a float32 is the upper half or, shifted up, the
    lower: the terms of a sum take half the instructions (0.8 of the time of moments).
    """

    def codegen(context, builder, sig, args):
        if storage_of(x) != "bfloat16":
            return _widened(builder, _halves(context, builder, x, *args))
        pairs = ir.VectorType(I32, LANES // 2)
        at = builder.bitcast(_pointer(context, builder, x, *args), pairs.as_pointer())
        return _widened(builder, raised_pairs(builder, builder.load(at, align=itemsize(x))))

    return Lanes(types.float64)(x, types.intp), codegen


@intrinsic
def load_some(typingctx, x, index, count):
    """Return x[index : index + count] in the first lanes, zero in the others."""

    def codegen(context, builder, sig, args):
        kind = sig.args[0]
        pointer = _vector_pointer(context, builder, kind, *args[:2])
        vector = pointer.type.pointee
        align = I32(itemsize(kind))
        arguments = [pointer, align, first_of(builder, args[2]), ir.Constant(vector, None)]
        some = call_llvm(builder, f"llvm.masked.load.{suffix(vector)}.p0", vector, arguments)
        return raised(builder, kind, some)

    return Lanes(x.dtype)(x, types.intp, types.intp), codegen


@intrinsic
def store(typingctx, y, index, value):
    """Round ``value`` to the dtype of ``y`` and put it into y[index : index + 16]."""

    def codegen(context, builder, sig, args):
        kind = sig.args[0]
        stored = _to_store(context, builder, kind, args[2], sig.args[2])
        pointer = _vector_pointer(context, builder, kind, *args[:2])
        builder.store(stored, pointer, align=itemsize(kind))
        return context.get_dummy_value()

    return types.void(y, types.intp, value), codegen


@intrinsic
def store_some(typingctx, y, index, value, count):
    """Put the first ``count`` lanes into y[index : index + count], rounded to the dtype of y."""

    def codegen(context, builder, sig, args):
        kind = sig.args[0]
        stored = _to_store(context, builder, kind, args[2], sig.args[2])
        pointer = _vector_pointer(context, builder, kind, *args[:2])
        arguments = [stored, pointer, I32(itemsize(kind)), first_of(builder, args[3])]
        name = f"llvm.masked.store.{suffix(stored.type)}.p0"
        call_llvm(builder, name, ir.VoidType(), arguments)
        return context.get_dummy_value()

    return types.void(y, types.intp, value, types.intp), codegen


@intrinsic
def stream(typingctx, y, index, value):
    """As `store`, past the cache: `to_line` of y[index] must be 0, or 16 elements of 16 bits."""

    def codegen(context, builder, sig, args):
        stored = _to_store(context, builder, y, args[2], sig.args[2])
        _stream(context, builder, y, args, stored)
        return context.get_dummy_value()

    return types.void(y, types.intp, value), codegen


@intrinsic
def stream_two(typingctx, y, index, value, other):
    """As `stream`, of twice as many elements."""

    def codegen(context, builder, sig, args):
        halves = [_to_store(context, builder, y, half, sig.args[2]) for half in args[2:]]
        order = ir.Constant(ir.VectorType(I32, 2 * LANES), list(range(2 * LANES)))
        _stream(context, builder, y, args, builder.shuffle_vector(*halves, order))
        return context.get_dummy_value()

    return types.void(y, types.intp, value, value), codegen


@intrinsic
def fence(typingctx):
    """Wait until what this thread has streamed can be seen by others."""

    def codegen(context, builder, sig, args):
        if builder.module.triple.startswith("x86_64"):
            call_llvm(builder, "llvm.x86.sse.sfence", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def to_line(typingctx, y, index):
    """Return how many elements there are from y[index] to the next where a cache line begins."""

    def codegen(context, builder, sig, args):
        address = builder.ptrtoint(_pointer(context, builder, y, *args), I64)
        missing = builder.and_(builder.neg(address), I64(LINE - 1))
        return builder.udiv(missing, I64(itemsize(y)))

    return types.intp(y, types.intp), codegen


@intrinsic
def prefetch(typingctx, x, index):
    """Ask for the cache lines of x[index : index + 16], which need not exist, into the L1 cache.

    They are those of every sixteenth element and, of float64, every eighth from ``index`` on.
    """

    def codegen(context, builder, sig, args):
        kind, (array, index) = sig.args[0], args
        for offset in range(0, LANES, LINE // itemsize(kind)):
            at = _pointer(context, builder, kind, array, builder.add(index, I64(offset)))
            address = builder.bitcast(at, ir.IntType(8).as_pointer())
            # To read, into the first level, data.
            how = [I32(0), I32(3), I32(1)]
            call_llvm(builder, "llvm.prefetch.p0", ir.VoidType(), [address, *how])
        return context.get_dummy_value()

    return types.void(x, types.intp), codegen


@intrinsic
def get(typingctx, x, index):
    """Return the element at a flat index."""

    def codegen(context, builder, sig, args):
        return raised(builder, x, builder.load(_pointer(context, builder, x, *args)))

    return x.dtype(x, types.intp), codegen


@intrinsic
def put(typingctx, y, index, value):
    """Store a number, rounded to the dtype of ``y``, at a flat index."""

    def codegen(context, builder, sig, args):
        kind = sig.args[0]
        number = context.cast(builder, args[2], sig.args[2], kind.dtype)
        stored = rounded(builder, kind, number)
        builder.store(stored, _pointer(context, builder, kind, *args[:2]))
        return context.get_dummy_value()

    return types.void(y, types.intp, value), codegen
