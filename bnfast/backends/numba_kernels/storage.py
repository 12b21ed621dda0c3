"""What arrays hold, and how it becomes what is computed with: float16 and bfloat16 are 16 bits.

Numba knows neither on the CPU, so a kernel reads and writes integers, and these become float32 in
registers: float16 by LLVM's conversion, which is one instruction where the CPU has it; bfloat16,
the upper half of a float32, by shifting. Results are rounded to nearest, ties to even. Rounding to
bfloat16 adds to the bits, which would carry a NaN whose upper bits are all set on to zero. None
gets there: arithmetic hands on the bits of the operand that is NaN, or makes one with no lower
bits; elements have none either, and of what they are computed with any NaN is made `quiet`.

The functions take the Numba type of an address or array, and numbers or vectors of LLVM alike.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import platform

from llvmlite import ir

from bnfast.backends.numba_kernels.lanes import I32, cpu_features

I16 = ir.IntType(16)

STORAGE_DTYPES: tuple[str, ...] = ("float16", "bfloat16")
"""float16 only where the CPU converts it: LLVM would call a function that Numba has not."""

if platform.machine().lower() in ("x86_64", "amd64") and "+f16c" not in cpu_features():
    STORAGE_DTYPES = ("bfloat16",)


def storage_of(kind):
    """Return the name of the 16-bit dtype of an address; None for any other, and for an array."""
    return getattr(kind, "storage", None)


def itemsize(kind):
    """Return the bytes of an element in memory."""
    return 2 if storage_of(kind) else kind.dtype.bitwidth // 8


def element(context, kind):
    """Return LLVM's type of an element in memory."""
    return I16 if storage_of(kind) else context.get_value_type(kind.dtype)


def raised(builder, kind, value):
    """Return what was read from memory as it is computed with."""
    if not storage_of(kind):
        return value
    if storage_of(kind) == "float16":
        return builder.fpext(builder.bitcast(value, _like(value, ir.HalfType())), _floats(value))
    bits = builder.shl(builder.zext(value, _like(value, I32)), _all(value, 16))
    return builder.bitcast(bits, _floats(value))


def raised_pairs(builder, pairs):
    """Return the first and the second of each pair of bfloat16: two vectors of float32."""
    floats = _like(pairs, ir.FloatType())
    first, second = builder.shl(pairs, _all(pairs, 16)), builder.and_(pairs, _all(pairs, -1 << 16))
    return builder.bitcast(first, floats), builder.bitcast(second, floats)


def rounded(builder, kind, value):
    """Return a result, in the dtype that is computed in, as it goes to memory."""
    if not storage_of(kind):
        return value
    if storage_of(kind) == "float16":
        return builder.bitcast(
            builder.fptrunc(value, _like(value, ir.HalfType())), _like(value, I16)
        )
    bits = builder.bitcast(value, _like(value, I32))
    even = builder.icmp_unsigned("==", builder.and_(bits, _all(value, 0x10000)), _all(value, 0))
    half = builder.select(even, _all(value, 0x7FFF), _all(value, 0x8000))
    nearest = builder.add(bits, half)
    return builder.trunc(builder.lshr(nearest, _all(value, 16)), _like(value, I16))


def _like(value, kind):
    """Return the type of a number, or of a vector as long as ``value``."""
    return ir.VectorType(kind, value.type.count) if isinstance(value.type, ir.VectorType) else kind


def _floats(value):
    return _like(value, ir.FloatType())


def _all(value, number):
    """Return a 32-bit integer, or a vector of it as long as ``value``."""
    kind = _like(value, I32)
    return ir.Constant(kind, number if kind == I32 else [number] * kind.count)
