/* Elements as arrays hold them, and as they are computed: the way from one to the other.

   float16 and bfloat16 become float, which holds them all, and are rounded to nearest, ties to even.
   F16C does that for float16. Elsewhere it is done in integers: bfloat16 is the upper half of a
   float; float16 has its own exponent, and subnormals, which a multiplication and an addition of
   powers of two bring into place. With AVX-512 bfloat16 goes up and down by one permutation of
   16-bit words, which is a conversion and a shift in one. Rounding to it adds to the bits, which
   would carry a NaN whose upper bits are all set on to zero. None gets there: arithmetic hands on
   the bits of the operand that is NaN, or makes one with no lower bits; elements have none either,
   and what they are computed with is `clean`.  Needs REAL, STORE, FN, BN_STORAGE, the vector types
   of vectors.h. */

/* The number; of bfloat16 any NaN becomes the one with no lower bits. */
static inline REAL FN(clean)(REAL value)
{
    return BN_STORAGE == BN_BFLOAT && value != value ? (REAL)NAN : value;
}

#if BN_STORAGE == BN_PLAIN

static inline FN(vector) FN(raise)(FN(stored) some) { return some; }
static inline FN(stored) FN(round)(FN(vector) some) { return some; }
static inline REAL FN(raise_one)(STORE value) { return value; }
static inline STORE FN(round_one)(REAL value) { return value; }
static inline int FN(positive)(STORE value) { return value > 0; }

#else

typedef int32_t FN(words) __attribute__((vector_size(BN_SMALL_VECTOR)));
typedef uint32_t FN(bits) __attribute__((vector_size(BN_SMALL_VECTOR)));

/* 16 bits as 32 and back: gcc 12 makes five instructions of the first conversion, which is one. */
static inline FN(bits) FN(spread_bits)(FN(stored) some)
{
#if BN_LEVEL == 2
    return (FN(bits))_mm512_cvtepu16_epi32((__m256i)some);
#elif BN_LEVEL
    return (FN(bits))_mm256_cvtepu16_epi32((__m128i)some);
#else
    return __builtin_convertvector(some, FN(bits));
#endif
}

static inline FN(stored) FN(pack_bits)(FN(bits) some)
{
#if BN_LEVEL == 2
    return (FN(stored))_mm512_cvtepi32_epi16((__m512i)some);
#elif BN_LEVEL
    return (FN(stored))_mm_packus_epi32(_mm256_castsi256_si128((__m256i)some),
                                        _mm256_extracti128_si256((__m256i)some, 1));
#else
    return __builtin_convertvector(some, FN(stored));
#endif
}

/* `some` where the mask is set, else `other`. */
static inline FN(words) FN(choose)(FN(words) mask, FN(words) some, FN(words) other)
{
    return (some & mask) | (other & ~mask);
}

static inline FN(vector) FN(raise)(FN(stored) some)
{
#if BN_STORAGE == BN_HALF && BN_LEVEL == 2
    return (FN(vector))_mm512_cvtph_ps((__m256i)some);
#elif BN_STORAGE == BN_HALF && BN_LEVEL
    return (FN(vector))_mm256_cvtph_ps((__m128i)some);
#elif BN_STORAGE == BN_HALF
    const FN(words) bits = (FN(words))FN(spread_bits)(some);
    const FN(vector) scaled = (FN(vector))((bits & 0x7fff) << 13) * 0x1p112f;
    const FN(words) infinite = (scaled >= 0x1p16f) & 0x7f800000;
    return (FN(vector))((FN(words))scaled | infinite | (bits & 0x8000) << 16);
#elif BN_LEVEL == 2
    return (FN(vector))_mm512_maskz_permutexvar_epi16(BN_UPPER, (__m512i)bn_upper_from,
                                                      _mm512_castsi256_si512((__m256i)some));
#else
    return (FN(vector))(FN(spread_bits)(some) << 16);
#endif
}

static inline FN(stored) FN(round)(FN(vector) some)
{
#if BN_STORAGE == BN_HALF && BN_LEVEL == 2
    return (FN(stored))_mm512_cvtps_ph((__m512)some, BN_TO_NEAREST);
#elif BN_STORAGE == BN_HALF && BN_LEVEL
    return (FN(stored))_mm256_cvtps_ph((__m256)some, BN_TO_NEAREST);
#elif BN_STORAGE == BN_HALF
    const FN(words) bits = (FN(words))some, size = bits & 0x7fffffff;
    const FN(words) normal = (size + (0xfff - (112 << 23)) + (size >> 13 & 1)) >> 13;
    const FN(words) subnormal = (FN(words))((FN(vector))size + 0.5f) - 0x3f000000;
    const FN(words) finite = FN(choose)(size < 0x38800000, subnormal, normal);
    const FN(words) infinite = ((some != some) & 0x200) | 0x7c00; /* or NaN */
    const FN(words) number = FN(choose)(size < 0x47800000, finite, infinite);
    return FN(pack_bits)((FN(bits))(number | (bits >> 16 & 0x8000)));
#elif BN_LEVEL == 2
    const __m512i bits = (__m512i)some;
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    __m512i nearest = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    nearest = _mm512_mask_add_epi32(nearest, odd, bits, _mm512_set1_epi32(0x8000));
    nearest = _mm512_permutexvar_epi16((__m512i)bn_upper_to, nearest);
    return (FN(stored))_mm512_castsi512_si256(nearest);
#else
    const FN(bits) bits = (FN(bits))some;
    return FN(pack_bits)((bits + ((bits >> 16 & 1) + 0x7fff)) >> 16);
#endif
}

static inline REAL FN(raise_one)(STORE value)
{
    const FN(stored) some = {value};
    return FN(raise)(some)[0];
}

static inline STORE FN(round_one)(REAL value)
{
    const FN(vector) some = {FN(clean)(value)};
    return FN(round)(some)[0];
}

/* Whether a number is more than 0, NaN being none: by its bits, of which a loop takes many. */
static inline int FN(positive)(STORE value)
{
    return (uint16_t)(value - 1) < (BN_STORAGE == BN_HALF ? 0x7c00 : 0x7f80);
}

#endif
