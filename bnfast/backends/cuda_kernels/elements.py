"""Elements as arrays hold them, and as they are computed: the way from one to the other.

What is stored in 16 bits is computed in float32. bfloat16 is the upper half of one, so to read it
takes a shift. To round it takes an instruction from compute capability 8.0 on, and integers before:
kernels for it are compiled for two element types, which stand for the one or the other.

    element_type   the dtype of an array, and a device -> what kernels are compiled for
    computed_in    such a type -> float32 or float64
    get            one element, as it is computed
    put            the way back
    load_vector    `VECTOR` adjacent elements, by loads of 16 bytes (of 8, where they are no more),
                   into a local array
    store_vector   the way back
    flat           a NumPy array -> what is copied to a device in its place

As `driver`, everything is here twice: for a GPU, and for the simulator.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,attr-defined,misc"

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from bnfast.backends.cuda_kernels import driver
from bnfast.backends.cuda_kernels.driver import SIMULATED, VECTOR, float32, float64

if SIMULATED:
    float16: Any = np.float16
    bfloat16: Any = np.int16
    bfloat16_by_integers: Any = np.uint16

    def flat(array: Any) -> Any:
        """Return all elements in a row."""
        return array.reshape(-1)

    def get(pointer: Any, i: int) -> Any:
        """Return element ``i``, as it is computed."""
        value = pointer[i]
        return float32(value) if value.itemsize == 2 else value

    def put(pointer: Any, i: int, value: Any) -> None:
        """Replace element ``i``: NumPy and ml_dtypes round to nearest, ties to even."""
        pointer[i] = value

    def load_vector(pointer: Any, i: int, values: Any, at: int) -> None:
        """Copy ``pointer[i : i + VECTOR]`` to ``values[at : at + VECTOR]``."""
        for k in range(VECTOR):
            values[at + k] = pointer[i + k]

    def store_vector(pointer: Any, i: int, values: Any, at: int) -> None:
        """Copy ``values[at : at + VECTOR]`` to ``pointer[i : i + VECTOR]``."""
        for k in range(VECTOR):
            pointer[i + k] = values[at + k]

else:
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    float16, bfloat16, bfloat16_by_integers = types.float16, types.int16, types.uint16

    def flat(array):
        """Return all elements in a row; NumPy lends nobody its memory of bfloat16, but of bits."""
        row = array.reshape(-1)
        return row.view(np.uint16) if row.dtype.itemsize == 2 else row

    _BITS, _WORD, _FLOAT = ir.IntType(16), ir.IntType(32), ir.FloatType()

    def _stored(context, pointer):
        """Return what an element is in memory: 16 bits are an integer."""
        is_small = pointer.dtype.bitwidth == 16
        return _BITS if is_small else context.get_value_type(pointer.dtype)

    def _address(builder, stored, address, index):
        """Return the address of an element."""
        return builder.gep(builder.bitcast(address, stored.as_pointer()), [index])

    def _vector(stored):
        """Return the type that a vector is moved as: of 16 bits, pairs.

        NVVM 3.1 would make loads of 4 bytes of a vector of float16.
        """
        if stored == _BITS:
            return ir.VectorType(_WORD, VECTOR // 2)
        return ir.VectorType(stored, VECTOR)

    def _raised(builder, kind, stored):
        """Return what an element is computed as."""
        if kind == float16:
            return builder.fpext(builder.bitcast(stored, ir.HalfType()), _FLOAT)
        if kind in (bfloat16, bfloat16_by_integers):
            word = builder.shl(builder.zext(stored, _WORD), ir.Constant(_WORD, 16))
            return builder.bitcast(word, _FLOAT)
        return stored

    def _rounded(builder, kind, value):
        """Return what an element is stored as: the nearest, of two the even one; NaN is NaN."""
        if kind == float16:
            return builder.bitcast(builder.fptrunc(value, ir.HalfType()), _BITS)
        if kind == bfloat16:
            convert = ir.FunctionType(_BITS, [_FLOAT])
            return builder.asm(convert, "cvt.rn.bf16.f32 $0, $1;", "=h,f", [value], False)
        if kind == bfloat16_by_integers:
            word = builder.bitcast(value, _WORD)
            odd = builder.and_(builder.lshr(word, _WORD(16)), _WORD(1))
            nearest = builder.add(word, builder.add(odd, _WORD(0x7FFF)))
            quiet = builder.or_(word, _WORD(0x400000))
            result = builder.select(builder.fcmp_unordered("uno", value, value), quiet, nearest)
            return builder.trunc(builder.lshr(result, _WORD(16)), _BITS)
        return value

    def _local_element(context, builder, array_type, array, at):
        """Return the address of element ``at`` of a local array."""
        struct = context.make_array(array_type)(context, builder, value=array)
        return builder.gep(struct.data, [at])

    @intrinsic
    def get(typing_context, pointer, i):
        """Return element ``i``, as it is computed."""

        def generate(context, builder, signature, arguments):
            source = _address(builder, _stored(context, pointer), *arguments)
            return _raised(builder, pointer.dtype, builder.load(source))

        return computed_in(pointer.dtype)(pointer, i), generate

    @intrinsic
    def put(typing_context, pointer, i, value):
        """Replace element ``i`` by a number of the type that it is computed in."""

        def generate(context, builder, signature, arguments):
            address, index, number = arguments
            target = _address(builder, _stored(context, pointer), address, index)
            builder.store(_rounded(builder, pointer.dtype, number), target)
            return context.get_dummy_value()

        return types.void(pointer, i, computed_in(pointer.dtype)), generate

    @intrinsic
    def load_vector(typing_context, pointer, i, values, at):
        """Copy ``pointer[i : i + VECTOR]`` to ``values[at : at + VECTOR]``."""

        def generate(context, builder, signature, arguments):
            address, index, array, start = arguments
            stored = _stored(context, pointer)
            vector = _vector(stored)
            source = _address(builder, stored, address, index)
            loaded = builder.load(builder.bitcast(source, vector.as_pointer()))
            loaded.align = alignment(pointer.dtype.bitwidth // 8)
            target = _local_element(context, builder, values, array, start)
            for k in range(VECTOR):
                if stored == _BITS:
                    pair = builder.extract_element(loaded, _WORD(k // 2))
                    one = builder.trunc(builder.lshr(pair, _WORD(k % 2 * 16)), _BITS)
                else:
                    one = builder.extract_element(loaded, _WORD(k))
                value = _raised(builder, pointer.dtype, one)
                builder.store(value, builder.gep(target, [_WORD(k)]))
            return context.get_dummy_value()

        return types.void(pointer, i, values, at), generate

    @intrinsic
    def store_vector(typing_context, pointer, i, values, at):
        """Copy ``values[at : at + VECTOR]`` to ``pointer[i : i + VECTOR]``."""

        def generate(context, builder, signature, arguments):
            address, index, array, start = arguments
            stored = _stored(context, pointer)
            vector = _vector(stored)
            source = _local_element(context, builder, values, array, start)
            made = [
                _rounded(builder, pointer.dtype, builder.load(builder.gep(source, [_WORD(k)])))
                for k in range(VECTOR)
            ]
            if stored == _BITS:
                words = [builder.zext(one, _WORD) for one in made]
                made = [
                    builder.or_(low, builder.shl(high, _WORD(16)))
                    for low, high in zip(words[::2], words[1::2], strict=True)
                ]
            whole = ir.Constant(vector, ir.Undefined)
            for k, piece in enumerate(made):
                whole = builder.insert_element(whole, piece, _WORD(k))
            target = _address(builder, stored, address, index)
            target = builder.bitcast(target, vector.as_pointer())
            builder.store(whole, target).align = alignment(pointer.dtype.bitwidth // 8)
            return context.get_dummy_value()

        return types.void(pointer, i, values, at), generate


ELEMENT_TYPES: dict[str, Any] = {
    "float16": float16,
    "bfloat16": bfloat16,
    "float32": float32,
    "float64": float64,
}
"""What kernels are compiled for, by the name of a dtype."""

ROUNDS_BFLOAT16 = (8, 0)
"""The lowest compute capability that has an instruction to round to bfloat16."""


def computed_in(element: Any) -> Any:
    """Return the type that elements of a type are computed in."""
    return float64 if element == float64 else float32


def alignment(itemsize: int) -> int:
    """Return the bytes that the address of a vector is a multiple of."""
    return min(16, VECTOR * itemsize)


@functools.cache
def element_type(dtype: np.dtype[Any], device: int) -> Any:
    """Return the type that kernels are compiled for on a device, for arrays of a dtype."""
    if dtype.name == "bfloat16" and driver.capability(device) < ROUNDS_BFLOAT16:
        return bfloat16_by_integers
    return ELEMENT_TYPES[dtype.name]
