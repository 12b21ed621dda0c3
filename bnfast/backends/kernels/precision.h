/* The kernels for float and for double at one instruction set, BN_TARGET, and their tables.
   Included once per instruction set, on purpose: no include guard.

   FN(mad) and FN(wide_mad) are a * b + c in REAL and in double: one rounding where the instruction
   set has it. They are spelled out, and the compiler's own contraction is off (setup.py), so that
   every path to an element, vector body, tail or special case, gives it the same bits. */

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define BN_MAD(fma, a, b, c) fma(a, b, c)
#else
#define BN_MAD(fma, a, b, c) ((a) * (b) + (c))
#endif

/* Write one cache line past the cache: an ordinary store reads the line from memory first. */
static inline void BN_JOIN(stream, line, BN_TARGET)(void *to, const void *from)
{
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i *)to, _mm512_loadu_si512((const __m512i *)from));
#elif defined(__AVX__)
    for (int i = 0; i < 2; i++)
        _mm256_stream_si256((__m256i *)to + i, _mm256_loadu_si256((const __m256i *)from + i));
#elif defined(__SSE2__)
    for (int i = 0; i < 4; i++)
        _mm_stream_si128((__m128i *)to + i, _mm_loadu_si128((const __m128i *)from + i));
#else
    memcpy(to, from, 64);
#endif
}

#define REAL float
#define FN(name) BN_JOIN(name, float, BN_TARGET)
#define BN_IS_DOUBLE 0
static inline float FN(mad)(float a, float b, float c) { return BN_MAD(__builtin_fmaf, a, b, c); }
static inline double FN(wide_mad)(double a, double b, double c)
{
    return BN_MAD(__builtin_fma, a, b, c);
}
#include "lanes.h"
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
#include "lanes.h"
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
#undef BN_STEPS
#undef BN_EACH
#undef BN_STEP_THROUGH

#undef BN_MAD
