/* The kernels for one dtype at one instruction set: see precision.h.

   FN(mad) and FN(wide_mad) are a * b + c in REAL and in double: one rounding where the instruction
   set has it. They are spelled out, and the compiler's own contraction is off (setup.py), so that
   every path to an element, vector body, tail or special case, gives it the same bits. */

#if BN_LEVEL || defined(__ARM_FEATURE_FMA)
#define BN_MAD(fma, a, b, c) fma(a, b, c)
#else
#define BN_MAD(fma, a, b, c) ((a) * (b) + (c))
#endif

static inline REAL FN(mad)(REAL a, REAL b, REAL c)
{
#if BN_IS_DOUBLE
    return BN_MAD(__builtin_fma, a, b, c);
#else
    return BN_MAD(__builtin_fmaf, a, b, c);
#endif
}

static inline double FN(wide_mad)(double a, double b, double c)
{
    return BN_MAD(__builtin_fma, a, b, c);
}

#include "vectors.h"
#include "stream.h"
#include "affine.h"
#include "gradient.h"
#include "rows.h"
#include "columns.h"
#include "table.h"
#undef STORE
#undef FN
#undef BN_STORAGE
#undef BN_MAD
#undef BN_VECTOR
#undef BN_SMALL_VECTOR
#undef BN_STEPS
#undef BN_EACH
#undef BN_STEP_THROUGH
