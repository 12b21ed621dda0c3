"""The number of threads that Numba gives to a parallel region, which belongs to the calling thread.

Asked for and set by Numba's functions, from Python, that takes 1.2 microseconds; by these 0.1.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,no-any-return"

from __future__ import annotations

from llvmlite import ir
from numba.core import types

from bnfast.backends.numba_kernels.lanes import I64, call_llvm, intrinsic


@intrinsic
def _exchange(typingctx, threads):
    def codegen(context, builder, sig, args):
        before = call_llvm(builder, "get_num_threads", I64, [])
        call_llvm(builder, "set_num_threads", ir.VoidType(), list(args))
        return before

    return types.intp(types.intp), codegen


def exchange(threads: int) -> int:
    """Set the number of Numba's threads; return what it was. They must have been started."""
    return _exchange(threads)
