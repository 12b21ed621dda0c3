/* The kernels for float and for double at one instruction set, BN_TARGET, and their tables. BN_LEVEL
   is what it has: 1 for AVX2 and FMA, 2 for AVX-512 too, 0 for neither.
   Included once per instruction set, on purpose: no include guard.

   FN(mad) and FN(wide_mad) are a * b + c in REAL and in double: one rounding where the instruction
   set has it. They are spelled out, and the compiler's own contraction is off (setup.py), so that
   every path to an element, vector body, tail or special case, gives it the same bits. */

#if BN_LEVEL || defined(__ARM_FEATURE_FMA)
#define BN_MAD(fma, a, b, c) fma(a, b, c)
#else
#define BN_MAD(fma, a, b, c) ((a) * (b) + (c))
#endif

#define REAL float
#define FN(name) BN_JOIN(name, float, BN_TARGET)
#define BN_IS_DOUBLE 0
static inline float FN(mad)(float a, float b, float c) { return BN_MAD(__builtin_fmaf, a, b, c); }
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
#undef REAL
#undef FN
#undef BN_IS_DOUBLE
#undef BN_VECTOR
#undef BN_SMALL_VECTOR
#undef BN_STEPS
#undef BN_EACH
#undef BN_STEP_THROUGH

#define REAL double
#define FN(name) BN_JOIN(name, double, BN_TARGET)
#define BN_IS_DOUBLE 1
static inline double FN(mad)(double a, double b, double c) { return BN_MAD(__builtin_fma, a, b, c); }
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
#undef REAL
#undef FN
#undef BN_IS_DOUBLE
#undef BN_VECTOR
#undef BN_SMALL_VECTOR
#undef BN_STEPS
#undef BN_EACH
#undef BN_STEP_THROUGH

#undef BN_MAD
