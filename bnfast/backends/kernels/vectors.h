/* Vectors as wide as the instruction set's registers: of REAL, and of sums in double.

   Explicit vectors, because whether gcc 12 vectorises a loop, and how well, changes with what it is
   inlined into: the same two lines were three times slower in one place than in the other. Sums are
   taken in 16 lanes. Lane k takes the elements k, 16 + k, ... of a run, whatever the vector width
   (but of bfloat16 see get_part). Where there are registers for it (AVX-512) even and odd steps of
   16 have sums of their own, since an addition takes longer than a step otherwise needs.  Needs
   REAL, STORE, FN, BN_IS_DOUBLE, BN_STORAGE. */

#if BN_LEVEL == 2
#define BN_VECTOR 64
#define BN_STEPS 2
#elif BN_LEVEL == 1
#define BN_VECTOR 32
#define BN_STEPS 1
#else
#define BN_VECTOR 16
#define BN_STEPS 1
#endif

/* Results are stored in at most 32 bytes at a time: on runs that do not begin with a line every
   access to 64 takes two lines (7x7 planes, in the cache: 1.3 times slower), and on others nothing
   is gained. What is stored in 16 bits is made in twice that. */
#if BN_LEVEL == 2 && BN_STORAGE == BN_PLAIN
#define BN_SMALL_VECTOR 32
#else
#define BN_SMALL_VECTOR BN_VECTOR
#endif

/* Elements of a vector of REAL and of a cache line; elements of a vector of double, such vectors in
   16 lanes, those whose elements fill a cache line of x, and the first one for what is left behind
   the last step. */
enum {
    FN(SIZE) = BN_SMALL_VECTOR / sizeof(REAL),
    FN(LINE) = 64 / sizeof(STORE),
    FN(WIDTH) = BN_VECTOR / 8,
    FN(VECTORS) = BN_LANES / FN(WIDTH),
    FN(PER_LINE) = FN(LINE) / FN(WIDTH),
    FN(REST) = (BN_STEPS - 1) * FN(VECTORS)
};

typedef REAL FN(vector) __attribute__((vector_size(BN_SMALL_VECTOR)));
typedef STORE FN(stored) __attribute__((vector_size(BN_SMALL_VECTOR / sizeof(REAL) * sizeof(STORE))));
typedef __typeof__((FN(vector)){0} > (FN(vector)){0}) FN(mask);
typedef double FN(wide) __attribute__((vector_size(BN_VECTOR)));
typedef REAL FN(narrow) __attribute__((vector_size(BN_VECTOR / 8 * sizeof(REAL))));

#include "storage.h"

/* ---- of REAL -----------------------------------------------------------------------------------*/

static inline FN(stored) FN(peek)(const STORE *x)
{
    FN(stored) some;
    memcpy(&some, x, sizeof some);
    return some;
}

static inline FN(vector) FN(get)(const STORE *x) { return FN(raise)(FN(peek)(x)); }

/* Factors and offsets are packed in REAL, whatever arrays hold. */
static inline FN(vector) FN(factors)(const REAL *packed)
{
    FN(vector) some;
    memcpy(&some, packed, sizeof some);
    return some;
}

static inline void FN(put)(STORE *y, FN(stored) some) { memcpy(y, &some, sizeof some); }

/* Store past the cache; y is aligned. */
static inline void FN(send)(STORE *y, FN(stored) some)
{
#if BN_LEVEL == 2 || BN_LEVEL && BN_STORAGE == BN_PLAIN
    _mm256_stream_si256((__m256i *)y, (__m256i)some);
#elif BN_LEVEL || defined(__SSE2__) && BN_STORAGE == BN_PLAIN
    _mm_stream_si128((__m128i *)y, (__m128i)some);
#elif defined(__SSE2__) && defined(__x86_64__)
    _mm_stream_si64((long long *)y, (long long)some);
#else
    FN(put)(y, some);
#endif
}

static inline FN(vector) FN(all)(REAL value) { return value - (FN(vector)){0}; }

/* `some` where the mask is set, else 0. */
static inline FN(vector) FN(where)(FN(mask) mask, FN(vector) some)
{
    return (FN(vector))((FN(mask))some & mask);
}

/* a * b + c, rounded once where the instruction set can. */
static inline FN(vector) FN(mad_each)(FN(vector) a, FN(vector) b, FN(vector) c)
{
#if BN_SMALL_VECTOR == 64
    return (FN(vector))_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif BN_LEVEL && BN_IS_DOUBLE
    return (FN(vector))_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif BN_LEVEL
    return (FN(vector))_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    for (int k = 0; k < FN(SIZE); k++)
        c[k] = FN(mad)(a[k], b[k], c[k]);
    return c;
#endif
}

/* ---- of double ---------------------------------------------------------------------------------*/

typedef struct {
    FN(wide) part[BN_STEPS * FN(VECTORS)];
} FN(lanes);

/* Vector k of `steps` steps: a loop that the compiler must unroll, so that the lanes stay in
   registers. */
#define BN_EACH(k, steps) _Pragma("GCC unroll 8") for (int k = 0; k < (steps) * FN(VECTORS); k++)

/* Do `one(i, k)` for every vector k of the steps from element i on, of those in n elements. */
#define BN_STEP_THROUGH(n, one)                                                                    \
    do {                                                                                           \
        bn_index i_ = 0;                                                                           \
        for (; i_ + BN_STEPS * BN_LANES <= (n); i_ += BN_STEPS * BN_LANES)                         \
            BN_EACH(k, BN_STEPS) one(i_, k);                                                       \
        if (BN_STEPS > 1 && i_ + BN_LANES <= (n))                                                  \
            BN_EACH(k, 1) one(i_, k);                                                              \
    } while (0)

/* Vectors of REAL in double; gcc 12 makes four instructions of a conversion that is one. */
static inline FN(wide) FN(widened)(FN(narrow) some)
{
#if BN_IS_DOUBLE
    return some;
#elif BN_LEVEL == 2
    return (FN(wide))_mm512_cvtps_pd((__m256)some);
#elif BN_LEVEL == 1
    return (FN(wide))_mm256_cvtps_pd((__m128)some);
#else
    return __builtin_convertvector(some, FN(wide));
#endif
}

static inline FN(narrow) FN(get_narrow)(const STORE *x)
{
#if BN_STORAGE == BN_PLAIN
    FN(narrow) some;
    memcpy(&some, x, sizeof some);
    return some;
#elif BN_LEVEL == 2 && BN_STORAGE == BN_HALF
    return (FN(narrow))_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x));
#elif BN_LEVEL == 2
    const __m256i words = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)x));
    const __m256i from = _mm512_castsi512_si256((__m512i)bn_upper_from);
    return (FN(narrow))_mm256_maskz_permutexvar_epi16((__mmask16)BN_UPPER, from, words);
#elif BN_LEVEL == 1 && BN_STORAGE == BN_HALF
    return (FN(narrow))_mm_cvtph_ps(_mm_loadl_epi64((const __m128i *)x));
#elif BN_LEVEL == 1
    const __m128i words = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)x));
    return (FN(narrow))_mm_slli_epi32(words, 16);
#else
    FN(narrow) some;
    for (int k = 0; k < FN(WIDTH); k++)
        some[k] = FN(raise_one)(x[k]);
    return some;
#endif
}

static inline FN(wide) FN(load)(const STORE *x) { return FN(widened)(FN(get_narrow)(x)); }

/* Vector k of a step whose elements begin at x, in an order of its own: two adjacent bfloat16 are 32
   bits, of which a float is the upper half or, shifted up, the lower. Vectors 2 m and 2 m + 1 take one
   element each of the pairs that both have read. */
static inline FN(narrow) FN(get_part)(const STORE *x, int k)
{
#if BN_LEVEL && BN_STORAGE == BN_BFLOAT
    typedef uint32_t pairs __attribute__((vector_size(FN(WIDTH) * sizeof(uint32_t))));
    pairs both;
    memcpy(&both, x + k / 2 * 2 * FN(WIDTH), sizeof both);
    return (FN(narrow))(k % 2 ? both & 0xffff0000u : both << 16);
#else
    return FN(get_narrow)(x + k * FN(WIDTH));
#endif
}

static inline FN(wide) FN(load_part)(const STORE *x, int k) { return FN(widened)(FN(get_part)(x, k)); }

static inline FN(wide) FN(load_wide)(const double *x)
{
    FN(wide) some;
    memcpy(&some, x, sizeof some);
    return some;
}

static inline FN(wide) FN(spread)(double value) { return value - (FN(wide)){0}; }

/* a * b + c, rounded once where the instruction set can. */
static inline FN(wide) FN(wide_mad_each)(FN(wide) a, FN(wide) b, FN(wide) c)
{
#if BN_LEVEL == 2
    return (FN(wide))_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif BN_LEVEL == 1
    return (FN(wide))_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
    for (int k = 0; k < FN(WIDTH); k++)
        c[k] = FN(wide_mad)(a[k], b[k], c[k]);
    return c;
#endif
}

/* b + a, or with the sign -1 b - a. Of 16 bits it is done where products are: converting keeps the
   units that add busy, and a sum of float16 takes 0.9 of the time. */
BN_INLINE FN(wide) FN(plus)(FN(wide) b, const double sign, FN(wide) a)
{
#if BN_LEVEL == 2 && BN_STORAGE != BN_PLAIN
    FN(wide) factor = FN(spread)(sign);
    __asm__("" : "+v"(factor)); /* or the compiler adds after all */
    return FN(wide_mad_each)(a, factor, b);
#else
    return sign < 0 ? b - a : b + a;
#endif
}

static inline void FN(add_vector)(double *sum, FN(wide) value)
{
    value += FN(load_wide)(sum);
    memcpy(sum, &value, sizeof value);
}

static inline void FN(add_lanes)(double *sum, FN(lanes) lanes)
{
    BN_EACH(k, 1) {
        const FN(wide) total =
            BN_STEPS > 1 ? lanes.part[k] + lanes.part[FN(REST) + k] : lanes.part[k];
        FN(add_vector)(sum + k * FN(WIDTH), total);
    }
}

/* The sum of 16 lanes, as a tree: k and 8 + k, then k and 4 + k, ... */
static inline double FN(total)(const double *sum)
{
    FN(lanes) lanes;
    double some[FN(WIDTH)];
    BN_EACH(k, 1) lanes.part[k] = FN(load_wide)(sum + k * FN(WIDTH));
    for (int half = FN(VECTORS) / 2; half; half /= 2)
        for (int k = 0; k < half; k++)
            lanes.part[k] += lanes.part[k + half];
    memcpy(some, lanes.part, sizeof some);
    for (int half = FN(WIDTH) / 2; half; half /= 2)
        for (int k = 0; k < half; k++)
            some[k] += some[k + half];
    return some[0];
}

/* `dy`, or 0 where y is not positive, NaN included. */
static inline FN(wide) FN(widened_where)(FN(narrow) dy, FN(narrow) y)
{
    const __typeof__(y > (FN(narrow)){0}) passes = y > (FN(narrow)){0};
    return FN(widened)((FN(narrow))((__typeof__(passes))dy & passes));
}

static inline FN(wide) FN(load_masked)(const STORE *dy, const STORE *y)
{
    return FN(widened_where)(FN(get_narrow)(dy), FN(get_narrow)(y));
}

static inline FN(wide) FN(load_part_masked)(const STORE *dy, const STORE *y, int k)
{
    return FN(widened_where)(FN(get_part)(dy, k), FN(get_part)(y, k));
}

/* Whether vector k of a step holds any of its last `rest` lanes. */
static inline int FN(has_fresh)(bn_index rest, int k)
{
    return rest > BN_LANES - (k + 1) * FN(WIDTH);
}

/* Part k of the last step of a run, which may overlap the one before: only its last `rest` lanes
   count. */
static inline FN(wide) FN(fresh)(FN(wide) value, bn_index rest, int k)
{
    return value * FN(load_wide)(bn_keep + rest + k * FN(WIDTH));
}

