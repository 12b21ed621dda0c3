/* The row kernels, compiled once per instruction set and dtype, and the table to choose from.

   dispatch.h    this file: instruction sets, the table of function pointers, the choice
   precision.h   included once per instruction set: the files below for every dtype
   instance.h    these files, for one dtype
   vectors.h     vectors of elements and of sums
   storage.h     from what arrays hold to what is computed in, and back
   stream.h      stores past the cache
   affine.h      the result of the forward pass
   gradient.h    the result of the backward pass
   rows.h        channels-first sums: runs of adjacent elements that belong to one channel
   columns.h     channels-last sums: adjacent elements belong to adjacent channels

   Elements are addressed by `char *`, so that the driver is the same for every dtype.

   The kernels are GNU C: vector types, which gcc and clang have. GCC compiles a region for an
   instruction set with `#pragma GCC target`; clang ignores that and has its own pragma, under which
   the predefined macros (__AVX2__ ...) stay those of the baseline: BN_LEVEL tells the kernels what
   they may use. Both name features, not arch=, which would take away what the file is compiled for:
   with -march=native GCC then refuses the intrinsics. */

#ifndef BNFAST_DISPATCH_H
#define BNFAST_DISPATCH_H

#if defined(__SSE2__)
#include <immintrin.h>
#endif
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef ptrdiff_t bn_index;

static inline bn_index bn_ceil(bn_index a, bn_index b) { return (a + b - 1) / b; }
static inline bn_index bn_min(bn_index a, bn_index b) { return a < b ? a : b; }
static inline bn_index bn_max(bn_index a, bn_index b) { return a > b ? a : b; }

/* 16 partial sums, whatever the vector width: they fill two AVX-512 registers of doubles, four
   AVX2, eight SSE2. */
#define BN_LANES 16

/* Elements that go through the lanes before these are emptied: 64 additions in a row each, and
   fewer than 128 in the last piece of a run. */
#define BN_CHAIN 1024

/* Elements of dresidual, at least, that are sent before the dx of the same. */
#define BN_STRETCH 1024

/* Channels whose sums are taken side by side. */
#define BN_GROUP 64

/* Runs of so many elements that are summed at once. */
static inline bn_index bn_runs(bn_index length) { return length < 64 ? 8 : length < 256 ? 4 : 1; }

/* Into the first-level cache (training takes 0.74 to 1.1 of its time with the second: AMD Zen 5). */
#define BN_PREFETCH(address) __builtin_prefetch(address, 0, 3)
#define BN_NOINLINE __attribute__((noinline))
#define BN_INLINE static inline __attribute__((always_inline))

/* BN_INLINE marks what must be inlined for a constant argument to take effect. */

/* The loop that follows may be vectorised: no iteration reads what another one writes. */
#define BN_SIMD _Pragma("omp simd")

/* Channels-last loops keep their sums on the stack, this many columns at a time (4 KiB each), and
   add this many rows to them at once. */
#define BN_COLUMNS 512
#define BN_ROWS 8

/* Rows of a channels-last block, whose sums are then added to those before; at least. Moments of
   float64 read it twice, the second time from the cache. Those of float32 read it once, with an
   error to spare, and merging the results of 32 rows would take a quarter of the time. */
#define BN_BLOCK_ELEMENTS 16384
#define BN_BLOCK_ROWS 32
#define BN_BLOCK_ROWS_ONCE 512

/* The moments of a part of a channel. The mean is mean + low: parts are merged by the differences
   of their means, and at mean/std = 1e6 a mean in one double would cost these six digits. */
typedef struct {
    double mean, low, m2;
} bn_moments;

/* One channel's y = (x - mean) * scale + bias. */
typedef struct {
    double mean, scale, bias;
} bn_affine;

/* One channel's dx = g * g_scale + (x - mean) * x_scale + shift. */
typedef struct {
    double mean, g_scale, x_scale, shift;
} bn_gradient;

/* The two sums of the backward pass over a part of a channel. */
typedef struct {
    double dy, dy_x;
} bn_sums;

/* Call a function with constants for whether a residual is added and whether ReLU is applied. */
#define BN_FUSED(function, residual, relu, ...)                                                    \
    do {                                                                                           \
        if ((residual) && (relu))                                                                  \
            function(__VA_ARGS__, 1, 1);                                                           \
        else if (residual)                                                                         \
            function(__VA_ARGS__, 1, 0);                                                           \
        else if (relu)                                                                             \
            function(__VA_ARGS__, 0, 1);                                                           \
        else                                                                                       \
            function(__VA_ARGS__, 0, 0);                                                           \
    } while (0)

/* Channels-first elements to sum: `runs` runs of `length` adjacent elements, a run `stride` behind
   the one before, of each of `channels` channels, a channel `apart` from the next. */
typedef struct {
    bn_index runs, length, stride, channels, apart;
} bn_tile;

/* What an elementwise kernel multiplies with and adds: in REAL for each of `width` columns of a wide
   row (or channels), each vector `pitch` elements behind the one before (of a row, with its first
   elements once more at its end); and in double for each channel. While a kernel sends results
   past the cache it asks for what lies `ahead`, if that is not 0. Rows are taken several at a time, or
   one by one. */
typedef struct {
    const char *packed;
    bn_index width, pitch, channels, ahead;
    int fits, relu, stream, one_by_one;
    const double *mean, *scale, *bias;
} bn_affines;

typedef struct {
    const char *packed;
    bn_index width, pitch, channels, ahead;
    int fits, stream;
    const double *mean, *g_scale, *x_scale, *shift;
} bn_gradients;

typedef struct {
    bn_index itemsize;     /* bytes of an element */
    bn_index factor_size;  /* and of a factor or an offset */
    void (*row_moments)(const char *x, bn_tile tile, bn_index ahead, bn_moments *moments);
    void (*row_sums)(const char *dy, const char *x, const char *y, bn_tile tile, bn_index ahead,
                     const double *mean, bn_sums *sums);
    void (*column_moments)(const char *x, bn_index rows, bn_index width, bn_index stride,
                           bn_index ahead, bn_moments *moments);
    void (*column_sums)(const char *dy, const char *x, const char *y, bn_index rows,
                        bn_index width, bn_index stride, bn_index ahead, const double *mean,
                        double *sum_dy, double *sum_dy_x);
    void (*row_normalize)(const char *x, const char *residual, char *y, bn_index elements,
                          bn_index length, bn_affines of, bn_index c);
    void (*column_normalize)(const char *x, const char *residual, char *y, bn_index elements,
                             bn_affines of);
    void (*row_gradient)(const char *dy, const char *x, const char *y, char *dx, char *dresidual,
                         bn_index elements, bn_index length, bn_gradients of, bn_index c);
    void (*column_gradient)(const char *dy, const char *x, const char *y, char *dx,
                            char *dresidual, bn_index elements, bn_gradients of);
    int (*find_affine)(const double *mean, const double *var, double count, const double *weight,
                       const double *bias, double eps, bn_index n, bn_index pitch, double *scale,
                       char *packed);
    int (*pack_gradient)(const double *mean, const double *g_scale, const double *x_scale,
                         const double *shift, bn_index n, bn_index pitch, char *packed);
} bn_kernels;

/* Whether float32 holds a factor or an offset without leaving its comfortable range. Outside it
   (or at an infinity) a channel is computed in double; NaN is as well computed either way. No
   branches, so that a loop over channels vectorises. */
static inline int bn_fits(double value)
{
    const double magnitude = fabs(value), limit = 0x1p100;
    return !((magnitude > limit) | ((magnitude < 1.0 / limit) & (magnitude != 0.0)));
}

/* An initialiser would become `rep stos`, which takes longer than the sum of 49 elements. */
#define BN_ZERO(lane) BN_SIMD for (int zero = 0; zero < BN_LANES; zero++) (lane)[zero] = 0.0

/* From bn_keep + rest on: 0 for all lanes but the last `rest`, 1 for these. */
static const double bn_keep[2 * BN_LANES] = {[BN_LANES] = 1, 1, 1, 1, 1, 1, 1, 1,
                                             1, 1, 1, 1, 1, 1, 1, 1};

/* Where the 16-bit words of a vector come from when each becomes the upper half of 32 bits, whose
   lower half is 0 by the mask BN_UPPER; and on the way back, when these halves are gathered. */
typedef uint16_t bn_words __attribute__((vector_size(64)));
#define BN_UPPER 0xaaaaaaaau
static const bn_words bn_upper_from = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                       0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
static const bn_words bn_upper_to = {1,  3,  5,  7,  9,  11, 13, 15,
                                     17, 19, 21, 23, 25, 27, 29, 31};

/* Turn a block's first mean, and the sums of deviations from it and of their squares, into its
   moments. The first mean is a guess, or carries the rounding of a long sum; the deviations tell
   by how much it is off. */
static inline bn_moments bn_corrected(double first, double deviation, double squares, double count)
{
    const double low = deviation / count, m2 = squares - deviation * low;
    const bn_moments moments = {first, low, m2 < 0.0 ? 0.0 : m2};
    return moments;
}

/* Move the mean. Its first part follows, so that the second stays small beside it: a first guess
   that was far off must not coarsen what is added later. */
static inline bn_moments bn_moved(bn_moments moments, double by)
{
    const double low = moments.low + by, mean = moments.mean + low, back = mean - moments.mean;
    const bn_moments moved = {mean, (moments.mean - (mean - back)) + (low - back), moments.m2};
    return moved;
}

/* How far the mean of `a` is from the first mean of `b`. */
static inline double bn_distance(bn_moments a, bn_moments b) { return (a.mean - b.mean) + a.low; }

#define BN_TO_NEAREST (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)

/* BN_STORAGE: what arrays hold. */
#define BN_PLAIN 0
#define BN_HALF 1
#define BN_BFLOAT 2

#define BN_JOIN_(a, b, c) a##_##b##_##c
#define BN_JOIN(a, b, c) BN_JOIN_(a, b, c)

/* The baseline is what the file is compiled for. */
#if defined(__AVX512F__)
#define BN_LEVEL 2
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define BN_LEVEL 1
#else
#define BN_LEVEL 0
#endif
#define BN_TARGET baseline
#include "precision.h"
#undef BN_TARGET
#undef BN_LEVEL

#if defined(__x86_64__)
#define BN_HAVE_X86_LEVELS 1

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("sse4.2,popcnt,avx2,fma,f16c,bmi,bmi2,lzcnt,movbe")
#endif
#define BN_TARGET v3
#define BN_LEVEL 1
#include "precision.h"
#undef BN_TARGET
#undef BN_LEVEL
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512cd,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("sse4.2,popcnt,avx2,fma,f16c,bmi,bmi2,lzcnt,movbe")
#pragma GCC target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define BN_TARGET v4
#define BN_LEVEL 2
#include "precision.h"
#undef BN_TARGET
#undef BN_LEVEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

/* Row i: instruction set i; columns: float, double, float16, bfloat16. */
#define BN_ROW(target)                                                                             \
    {&BN_JOIN(kernels, float, target), &BN_JOIN(kernels, double, target),                          \
     &BN_JOIN(kernels, half, target), &BN_JOIN(kernels, bfloat, target)}
static const bn_kernels *const bn_table[][4] = {
    BN_ROW(baseline),
#ifdef BN_HAVE_X86_LEVELS
    BN_ROW(v3),
    BN_ROW(v4),
#endif
};

/* The highest row of the table that this CPU can run. Clang 14 knows no levels by name, so
   clang is asked for what the regions above were compiled for. */
static inline int bn_highest_level(void)
{
#ifdef BN_HAVE_X86_LEVELS
    __builtin_cpu_init();
#if defined(__clang__)
#define BN_HAS(feature) (__builtin_cpu_supports(feature) != 0)
    const int v3 = BN_HAS("avx2") & BN_HAS("fma") & BN_HAS("bmi") & BN_HAS("bmi2");
    const int v4 = v3 & BN_HAS("avx512f") & BN_HAS("avx512bw") & BN_HAS("avx512cd") &
                   BN_HAS("avx512dq") & BN_HAS("avx512vl");
#undef BN_HAS
#else
    const int v3 = __builtin_cpu_supports("x86-64-v3") != 0;
    const int v4 = __builtin_cpu_supports("x86-64-v4") != 0;
#endif
    return v4 ? 2 : v3 ? 1 : 0;
#else
    return 0;
#endif
}

#endif
