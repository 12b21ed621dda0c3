/* y = act((x - mean) * scale + bias + residual), over a stretch of adjacent elements: runs of one
   channel each (rows), or rows of channels (columns).  Needs REAL, STORE, FN, BN_IS_DOUBLE, stream.h. */

/* One element. The mean may have more digits than REAL: its head is subtracted, its tail is in the
   shift. ReLU passes NaN, and makes 0 of -0, as NumPy's maximum does. */
static inline STORE FN(affine_one)(const STORE *x, const STORE *residual, REAL head, REAL scale,
                                   REAL shift, int relu)
{
    const REAL normal = FN(mad)(FN(raise_one)(*x) - head, scale, shift);
    const REAL sum = residual ? normal + FN(raise_one)(*residual) : normal;
    return FN(round_one)(relu && sum <= 0 ? 0 : sum);
}

/* The same in double, rounded where the definition rounds: for channels whose numbers do not fit
   REAL. */
static inline STORE FN(affine_wide)(const STORE *x, const STORE *residual, bn_affine affine,
                                    int relu)
{
    REAL y = (REAL)((FN(raise_one)(*x) - affine.mean) * affine.scale + affine.bias);
    if (residual)
        y += FN(raise_one)(*residual);
    return FN(round_one)(relu && y <= 0 ? 0 : y);
}

static inline int FN(affine_fits)(bn_affine affine)
{
    return BN_IS_DOUBLE || (bn_fits(affine.mean) & bn_fits(affine.scale) &
                            !(fabs(affine.bias) > 0x1p100));
}

static inline bn_affine FN(affine_of)(const bn_affines *of, bn_index column)
{
    const bn_index c = column % of->channels;
    const bn_affine affine = {of->mean[c], of->scale[c], of->bias[c]};
    return affine;
}

/* What REAL leaves of a mean; 0 for float64, where infinity - infinity would be NaN. */
static inline double FN(tail)(double mean) { return BN_IS_DOUBLE ? 0 : mean - (REAL)mean; }

/* scale = weight / sqrt(var / count + eps) of n channels; and what a kernel needs of each in REAL:
   heads, scales `pitch` elements behind them, and shifts as far behind these. Return whether every
   channel fits. */
static int FN(find_affine)(const double *mean, const double *var, double count,
                           const double *weight, const double *bias, double eps, bn_index n,
                           bn_index pitch, double *scale, char *packed)
{
    REAL *head = (REAL *)packed, *scales = head + pitch, *shift = scales + pitch;
    int fits = 1;
    BN_SIMD for (bn_index c = 0; c < n; c++)
        scale[c] = weight[c] / sqrt(var[c] / count + eps);
    BN_SIMD for (bn_index c = 0; c < n; c++) {
        const double tail = FN(tail)(mean[c]), moved = bias[c] - tail * scale[c];
        head[c] = FN(clean)((REAL)mean[c]);
        scales[c] = FN(clean)((REAL)scale[c]);
        shift[c] = FN(clean)((REAL)(tail == 0 ? bias[c] : moved));
    }
    for (bn_index c = 0; c < n; c++) {
        const bn_affine affine = {mean[c], scale[c], bias[c]};
        fits &= FN(affine_fits)(affine);
    }
    return fits;
}

/* SIZE elements from x on. */
BN_INLINE FN(stored) FN(affine_each)(const STORE *x, const STORE *residual, FN(vector) head,
                                         FN(vector) scale, FN(vector) shift, const int add,
                                         const int relu)
{
    FN(vector) sum = FN(mad_each)(FN(get)(x) - head, scale, shift);
    if (add)
        sum += FN(get)(residual);
    return FN(round)(relu ? FN(where)(~(sum <= 0), sum) : sum);
}

/* One channel, or (step 1) a part of a row of channels, for constant `add` and `relu`. The end of a
   run that is no multiple of the vectors is done as one that overlaps the last full one; it is
   computed first and stored last, since y may be x or residual. */
BN_INLINE void FN(affine_run_as)(const STORE *x, const STORE *residual, STORE *y, bn_index n,
                                     const REAL *heads, const REAL *scales, const REAL *shifts,
                                     const int step, const int add, const int relu)
{
    const FN(vector) head = FN(all)(*heads), scale = FN(all)(*scales), shift = FN(all)(*shifts);
#define BN_MAKE(i)                                                                                 \
    FN(affine_each)(x + (i), add ? residual + (i) : NULL, step ? FN(factors)(heads + (i)) : head,      \
                    step ? FN(factors)(scales + (i)) : scale, step ? FN(factors)(shifts + (i)) : shift,    \
                    add, relu)
    if (n < FN(SIZE)) {
        for (bn_index i = 0; i < n; i++)
            y[i] = FN(affine_one)(x + i, add ? residual + i : NULL, heads[step * i],
                                  scales[step * i], shifts[step * i], relu);
    } else {
        const bn_index last = n - FN(SIZE);
        const FN(stored) end = BN_MAKE(last);
        for (bn_index i = 0; i < last; i += FN(SIZE))
            FN(put)(y + i, BN_MAKE(i));
        FN(put)(y + last, end);
    }
#undef BN_MAKE
}

/* One channel. */
static inline void FN(affine_run)(const STORE *x, const STORE *residual, STORE *y, bn_index n,
                                  const REAL *head, const REAL *scale, const REAL *shift, int relu)
{
    BN_FUSED(FN(affine_run_as), residual, relu, x, residual, y, n, head, scale, shift, 0);
}

/* Runs of a line or more, of channels that fit, past the cache: see stream.h. */
BN_INLINE void FN(affine_lines)(const STORE *x, const STORE *residual, STORE *y,
                                    bn_index elements, bn_index length, const bn_affines *of,
                                    bn_index c, const int add, const int relu)
{
    const REAL *head = (const REAL *)of->packed, *scale = head + of->pitch;
    const REAL *shift = scale + of->pitch;
    const bn_index width = of->width, ahead = of->ahead;
    bn_index at = FN(to_line)(y, elements);
#define BN_SEND(k, head, scale, shift)                                                             \
    FN(send)(y + at + (k), FN(affine_each)(x + at + (k), add ? residual + at + (k) : NULL, head,   \
                                           scale, shift, add, relu))
    if (at)
        FN(affine_run_as)(x, residual, y, at, head + c, scale + c, shift + c, 0, add, relu);
    for (bn_index end = length, next; at < elements; c = next, end += length) {
        const FN(vector) h = FN(all)(head[c]), s = FN(all)(scale[c]), t = FN(all)(shift[c]);
        next = c + 1 == width ? 0 : c + 1;
        for (; at + FN(LINE) <= end; at += FN(LINE)) {
            if (ahead)
                BN_PREFETCH(x + at + ahead);
            for (bn_index k = 0; k < FN(LINE); k += FN(SIZE))
                BN_SEND(k, h, s, t);
        }
        if (at < end && at + FN(LINE) <= elements) {
            const FN(vector) h2 = FN(all)(head[next]), s2 = FN(all)(scale[next]);
            const FN(vector) t2 = FN(all)(shift[next]);
            for (bn_index k = 0; k < FN(LINE); k += FN(SIZE)) {
                const FN(mask) after = FN(after)(end - at - k);
                BN_SEND(k, FN(either)(after, h, h2), FN(either)(after, s, s2),
                        FN(either)(after, t, t2));
            }
            at += FN(LINE);
        } else if (at < end) {
            FN(affine_run_as)(x + at, add ? residual + at : NULL, y + at, end - at, head + c,
                              scale + c, shift + c, 0, add, relu);
            at = end;
        }
    }
#undef BN_SEND
}

/* Adjacent runs of `length` elements, the first of them of channel c, round and round. */
static void FN(row_normalize)(const char *x_bytes, const char *residual_bytes, char *y_bytes,
                              bn_index elements, bn_index length, bn_affines of, bn_index c)
{
    const STORE *x = (const STORE *)x_bytes, *residual = (const STORE *)residual_bytes;
    const REAL *head = (const REAL *)of.packed, *scale = head + of.pitch;
    const REAL *shift = scale + of.pitch;
    STORE *y = (STORE *)y_bytes;
    const int lines = of.stream && length >= FN(LINE);
    const bn_index step = lines && of.fits ? elements : length;
    for (bn_index at = 0; at < elements; at += step) {
        const STORE *r = residual ? residual + at : NULL;
        if (!of.fits && !FN(affine_fits)(FN(affine_of)(&of, c)))
            for (bn_index i = at; i < at + length; i++)
                y[i] = FN(affine_wide)(x + i, residual ? residual + i : NULL, FN(affine_of)(&of, c),
                                       of.relu);
        else if (lines)
            BN_FUSED(FN(affine_lines), r, of.relu, x + at, r, y + at, step, length, &of, c);
        else
            FN(affine_run)(x + at, r, y + at, length, head + c, scale + c, shift + c, of.relu);
        c = c + 1 == of.width ? 0 : c + 1;
    }
}

/* Rows of n channels, for constant `rows`, `add` and `relu`: the channel vectors are loaded once for
   all of them; in the cache, four rows take three quarters of the time of four times one. Where
   memory is read and rows lie a page or more apart, one by one is faster, by up to a third. */
BN_INLINE void FN(affine_rows_as)(const STORE *x, const STORE *residual, STORE *y, bn_index n,
                                      const REAL *head, const REAL *scale, const REAL *shift,
                                      const int rows, const int add, const int relu)
{
    bn_index c = 0;
    for (; c + FN(SIZE) <= n; c += FN(SIZE)) {
        const FN(vector) h = FN(factors)(head + c), s = FN(factors)(scale + c), t = FN(factors)(shift + c);
        _Pragma("GCC unroll 4") for (int row = 0; row < rows; row++)
        {
            const bn_index i = row * n + c;
            FN(put)(y + i, FN(affine_each)(x + i, add ? residual + i : NULL, h, s, t, add, relu));
        }
    }
    for (; c < n; c++)
        for (bn_index i = c; i < rows * n; i += n)
            y[i] = FN(affine_one)(x + i, add ? residual + i : NULL, head[c], scale[c], shift[c],
                                  relu);
}

static inline void FN(affine_rows)(const STORE *x, const STORE *residual, STORE *y, bn_index n,
                                   const REAL *head, const REAL *scale, const REAL *shift,
                                   const int rows, int relu)
{
    BN_FUSED(FN(affine_rows_as), residual, relu, x, residual, y, n, head, scale, shift, rows);
}

/* A part of a row where some channels do not fit: these take the double path alone, so that no
   other channel's bits change. */
static inline void FN(affine_mixed)(const STORE *x, const STORE *residual, STORE *y, bn_index n,
                                    const REAL *head, const REAL *scale, const REAL *shift,
                                    const bn_affines *of)
{
    for (bn_index c = 0; c < n; c++) {
        const STORE *r = residual ? residual + c : NULL;
        const bn_affine affine = FN(affine_of)(of, c);
        if (FN(affine_fits)(affine))
            FN(affine_run)(x + c, r, y + c, 1, head + c, scale + c, shift + c, of->relu);
        else
            y[c] = FN(affine_wide)(x + c, r, affine, of->relu);
    }
}

/* Rows of channels that all fit, past the cache. The first factors are packed again behind the last
   ones, so that those of a line are adjacent wherever it begins. */
BN_INLINE void FN(affine_wide_lines)(const STORE *x, const STORE *residual, STORE *y,
                                         bn_index elements, const bn_affines *of, const int add,
                                         const int relu)
{
    const REAL *head = (const REAL *)of->packed, *scale = head + of->pitch;
    const REAL *shift = scale + of->pitch;
    const bn_index width = of->width, ahead = of->ahead;
    bn_index at = FN(to_line)(y, elements), c = at;
    if (at)
        FN(affine_run_as)(x, residual, y, at, head, scale, shift, 1, add, relu);
    for (; at + FN(LINE) <= elements; c -= width)
        for (; c < width && at + FN(LINE) <= elements; c += FN(LINE), at += FN(LINE)) {
            BN_PREFETCH(x + at + ahead);
            for (bn_index k = 0; k < FN(LINE); k += FN(SIZE))
                FN(send)(y + at + k,
                         FN(affine_each)(x + at + k, add ? residual + at + k : NULL,
                                         FN(factors)(head + c + k), FN(factors)(scale + c + k),
                                         FN(factors)(shift + c + k), add, relu));
        }
    if (at < elements) {
        c = at % width;
        FN(affine_run_as)(x + at, add ? residual + at : NULL, y + at, elements - at, head + c,
                          scale + c, shift + c, 1, add, relu);
    }
}

/* Adjacent elements from the first column on; they may end within a row. */
static void FN(column_normalize)(const char *x_bytes, const char *residual_bytes, char *y_bytes,
                                 bn_index elements, bn_affines of)
{
    const STORE *x = (const STORE *)x_bytes, *residual = (const STORE *)residual_bytes;
    const REAL *head = (const REAL *)of.packed, *scale = head + of.pitch;
    const REAL *shift = scale + of.pitch;
    STORE *y = (STORE *)y_bytes;
    if (of.stream && of.fits && of.width >= FN(LINE)) {
        BN_FUSED(FN(affine_wide_lines), residual, of.relu, x, residual, y, elements, &of);
        return;
    }
    for (bn_index at = 0, n; at < elements; at += n) {
        const STORE *r = residual ? residual + at : NULL;
        n = bn_min(of.width, elements - at);
        if (!of.fits) {
            FN(affine_mixed)(x + at, r, y + at, n, head, scale, shift, &of);
        } else if (of.one_by_one || at + 4 * n > elements) {
            FN(affine_rows)(x + at, r, y + at, n, head, scale, shift, 1, of.relu);
        } else {
            FN(affine_rows)(x + at, r, y + at, n, head, scale, shift, 4, of.relu);
            n *= 4;
        }
    }
}
