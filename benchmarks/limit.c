/* The limit: what it takes to move the bytes of a call, and nothing else.
 *
 *     limit_move(target, first, second, lines, streams, threads, repeat)
 *
 * copies `first` to `target`, or, where `second` is not null, reads both and writes one (the
 * exclusive or, which costs nothing beside the memory). Everything is counted in cache lines of 64
 * bytes and aligned to them. `streams` chooses stores past the cache. Each thread moves one
 * contiguous share. `repeat` moves happen in one call, so that reading a clock and calling through
 * ctypes do not weigh on small arrays; each enters its own parallel region, as a call would.
 */
#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

/* One row per instruction set: a load and an exclusive or for each vector of the line, then the
 * stores. The compiler cannot merge or skip moves: the stores are intrinsics on memory that another
 * function owns. */
#define ROW(NAME, TARGET, VECTOR, LOAD, XOR, STORE, STREAM)                                        \
    __attribute__((target(TARGET), noinline)) static void NAME(                                    \
        char *target, const char *first, const char *second, ptrdiff_t lines, int streams)         \
    {                                                                                              \
        enum { WIDTH = sizeof(VECTOR) };                                                           \
        const ptrdiff_t bytes = 64 * lines;                                                        \
        if (second && streams)                                                                     \
            for (ptrdiff_t i = 0; i < bytes; i += WIDTH)                                           \
                STREAM((void *)(target + i), XOR(LOAD((const void *)(first + i)),                  \
                                                 LOAD((const void *)(second + i))));               \
        else if (second)                                                                           \
            for (ptrdiff_t i = 0; i < bytes; i += WIDTH)                                           \
                STORE((void *)(target + i), XOR(LOAD((const void *)(first + i)),                   \
                                                LOAD((const void *)(second + i))));                \
        else if (streams)                                                                          \
            for (ptrdiff_t i = 0; i < bytes; i += WIDTH)                                           \
                STREAM((void *)(target + i), LOAD((const void *)(first + i)));                     \
        else                                                                                       \
            for (ptrdiff_t i = 0; i < bytes; i += WIDTH)                                           \
                STORE((void *)(target + i), LOAD((const void *)(first + i)));                      \
        _mm_sfence();                                                                              \
    }

ROW(row_avx512, "avx512f", __m512i, _mm512_load_si512, _mm512_xor_si512, _mm512_store_si512,
    _mm512_stream_si512)
ROW(row_avx2, "avx2", __m256i, _mm256_load_si256, _mm256_xor_si256, _mm256_store_si256,
    _mm256_stream_si256)
ROW(row_sse2, "sse2", __m128i, _mm_load_si128, _mm_xor_si128, _mm_store_si128, _mm_stream_si128)

typedef void (*row_function)(char *, const char *, const char *, ptrdiff_t, int);

static row_function best_row(void)
{
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f"))
        return row_avx512;
    return __builtin_cpu_supports("avx2") ? row_avx2 : row_sse2;
}

const char *limit_instruction_set(void)
{
    row_function row = best_row();
    return row == row_avx512 ? "AVX-512" : row == row_avx2 ? "AVX2" : "SSE2";
}

int limit_can_stream(void) { return 1; }

#else /* another processor: the compiler's vectors, and no stores past the cache */

typedef void (*row_function)(char *, const char *, const char *, ptrdiff_t, int);

static void row_portable(char *target, const char *first, const char *second, ptrdiff_t lines,
                         int streams)
{
    uint64_t *to = (uint64_t *)target;
    const uint64_t *from = (const uint64_t *)first, *other = (const uint64_t *)second;
    (void)streams;
    if (other)
        for (ptrdiff_t i = 0; i < 8 * lines; i++)
            to[i] = from[i] ^ other[i];
    else
        for (ptrdiff_t i = 0; i < 8 * lines; i++)
            to[i] = from[i];
}

static row_function best_row(void) { return row_portable; }

const char *limit_instruction_set(void) { return "the compiler's choice"; }

int limit_can_stream(void) { return 0; }

#endif

void limit_move(char *target, const char *first, const char *second, ptrdiff_t lines, int streams,
                int threads, ptrdiff_t repeat)
{
    row_function row = best_row();
    for (ptrdiff_t turn = 0; turn < repeat; turn++) {
        if (threads == 1) {
            row(target, first, second, lines, streams);
            continue;
        }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int part = 0; part < threads; part++) {
            const ptrdiff_t start = lines * part / threads, stop = lines * (part + 1) / threads;
            row(target + 64 * start, first + 64 * start, second ? second + 64 * start : NULL,
                stop - start, streams);
        }
    }
}
