/* dx = g * g_scale + ((x - mean) * x_scale + shift), and dresidual = g: dy where y is absent or
   positive, else 0. Stretches as in affine.h.  Needs REAL, STORE, FN, BN_IS_DOUBLE, affine.h. */

static inline STORE FN(masked)(const STORE *dy, const STORE *y, bn_index i)
{
    return !y || FN(positive)(y[i]) ? dy[i] : 0;
}

BN_INLINE FN(vector) FN(masked_each)(const STORE *dy, const STORE *y, bn_index i)
{
    const FN(vector) g = FN(get)(dy + i);
    return y ? FN(where)(FN(get)(y + i) > 0, g) : g;
}

/* Where x_scale is 0, as in eval mode, x does not matter, whatever it holds. */
static inline STORE FN(gradient)(STORE g, STORE x, REAL head, REAL g_scale, REAL x_scale,
                                 REAL shift)
{
    const REAL off = x_scale == 0 ? 0 : FN(raise_one)(x) - head;
    return FN(round_one)(FN(mad)(FN(raise_one)(g), g_scale, FN(mad)(off, x_scale, shift)));
}

static inline STORE FN(gradient_wide)(STORE g, STORE x, bn_gradient gradient)
{
    const double spread =
        gradient.x_scale == 0 ? 0 : (FN(raise_one)(x) - gradient.mean) * gradient.x_scale;
    return FN(round_one)((REAL)(FN(raise_one)(g) * gradient.g_scale + (spread + gradient.shift)));
}

static inline int FN(gradient_fits)(bn_gradient gradient)
{
    return BN_IS_DOUBLE || (bn_fits(gradient.mean) & bn_fits(gradient.g_scale) &
                            bn_fits(gradient.x_scale) & bn_fits(gradient.shift));
}

static inline bn_gradient FN(gradient_of)(const bn_gradients *of, bn_index column)
{
    const bn_index c = column % of->channels;
    const bn_gradient gradient = {of->mean[c], of->g_scale[c], of->x_scale[c], of->shift[c]};
    return gradient;
}

/* As find_affine: heads, g_scales, x_scales, shifts in REAL. */
static int FN(pack_gradient)(const double *mean, const double *g_scale, const double *x_scale,
                             const double *shift, bn_index n, bn_index pitch, char *packed)
{
    REAL *head = (REAL *)packed, *g_scales = head + pitch, *x_scales = g_scales + pitch;
    REAL *shifts = x_scales + pitch;
    int fits = 1;
    BN_SIMD for (bn_index c = 0; c < n; c++) {
        const double tail = FN(tail)(mean[c]), moved = shift[c] - tail * x_scale[c];
        head[c] = FN(clean)((REAL)mean[c]);
        g_scales[c] = FN(clean)((REAL)g_scale[c]);
        x_scales[c] = FN(clean)((REAL)x_scale[c]);
        shifts[c] = FN(clean)((REAL)(((tail == 0) | (x_scale[c] == 0)) ? shift[c] : moved));
    }
    for (bn_index c = 0; c < n; c++) {
        const bn_gradient gradient = {mean[c], g_scale[c], x_scale[c], shift[c]};
        fits &= FN(gradient_fits)(gradient);
    }
    return fits;
}

/* SIZE elements from i on; `uses` is set where x_scale is not 0. */
BN_INLINE FN(stored) FN(gradient_each)(const STORE *dy, const STORE *x, const STORE *y, bn_index i,
                                           FN(vector) head, FN(vector) g_scale,
                                           FN(vector) x_scale, FN(vector) shift, FN(mask) uses)
{
    const FN(vector) off = FN(where)(uses, FN(get)(x + i) - head);
    const FN(vector) g = FN(masked_each)(dy, y, i);
    return FN(round)(FN(mad_each)(g, g_scale, FN(mad_each)(off, x_scale, shift)));
}

/* As affine_run_as: dx may be dy. */
BN_INLINE void FN(gradient_run)(const STORE *dy, const STORE *x, const STORE *y, STORE *dx,
                                    bn_index n, const REAL *heads, const REAL *g_scales,
                                    const REAL *x_scales, const REAL *shifts, const int step)
{
    const FN(vector) head = FN(all)(*heads), g_scale = FN(all)(*g_scales);
    const FN(vector) x_scale = FN(all)(*x_scales), shift = FN(all)(*shifts);
    const FN(mask) uses = x_scale != 0;
    if (!step && *x_scales == 0)
        x = dy; /* which is read anyway */
#define BN_MAKE(i)                                                                                 \
    FN(gradient_each)(dy, x, y, i, step ? FN(factors)(heads + (i)) : head,                             \
                      step ? FN(factors)(g_scales + (i)) : g_scale,                                    \
                      step ? FN(factors)(x_scales + (i)) : x_scale,                                    \
                      step ? FN(factors)(shifts + (i)) : shift,                                        \
                      step ? FN(factors)(x_scales + (i)) != 0 : uses)
    if (n < FN(SIZE)) {
        for (bn_index i = 0; i < n; i++)
            dx[i] = FN(gradient)(FN(masked)(dy, y, i), x[i], heads[step * i], g_scales[step * i],
                                 x_scales[step * i], shifts[step * i]);
    } else {
        const bn_index last = n - FN(SIZE);
        const FN(stored) end = BN_MAKE(last);
        for (bn_index i = 0; i < last; i += FN(SIZE))
            FN(put)(dx + i, BN_MAKE(i));
        FN(put)(dx + last, end);
    }
#undef BN_MAKE
}

/* Runs of a line or more, of channels that fit, past the cache. */
BN_INLINE void FN(gradient_lines)(const STORE *dy, const STORE *x, const STORE *y, STORE *dx,
                                      bn_index elements, bn_index length, const bn_gradients *of,
                                      bn_index c)
{
    const REAL *head = (const REAL *)of->packed, *g_scale = head + of->pitch;
    const REAL *x_scale = g_scale + of->pitch, *shift = x_scale + of->pitch;
    const bn_index width = of->width, ahead = of->ahead;
    bn_index at = FN(to_line)(dx, elements);
#define BN_SEND(k, x, head, g_scale, x_scale, shift)                                               \
    FN(send)(dx + at + (k), FN(gradient_each)(dy, x, y, at + (k), head, g_scale, x_scale, shift,   \
                                              (x_scale) != 0))
    if (at)
        FN(gradient_run)(dy, x, y, dx, at, head + c, g_scale + c, x_scale + c, shift + c, 0);
    for (bn_index end = length, next; at < elements; c = next, end += length) {
        const STORE *const from = x_scale[c] == 0 ? dy : x; /* which is read anyway */
        const FN(vector) h = FN(all)(head[c]), g = FN(all)(g_scale[c]);
        const FN(vector) s = FN(all)(x_scale[c]), t = FN(all)(shift[c]);
        next = c + 1 == width ? 0 : c + 1;
        for (; at + FN(LINE) <= end; at += FN(LINE)) {
            if (ahead) {
                BN_PREFETCH(dy + at + ahead);
                BN_PREFETCH(from + at + ahead);
            }
            for (bn_index k = 0; k < FN(LINE); k += FN(SIZE))
                BN_SEND(k, from, h, g, s, t);
        }
        if (at < end && at + FN(LINE) <= elements) {
            const FN(vector) h2 = FN(all)(head[next]), g2 = FN(all)(g_scale[next]);
            const FN(vector) s2 = FN(all)(x_scale[next]), t2 = FN(all)(shift[next]);
            const STORE *const either = x_scale[next] == 0 ? from : x;
            for (bn_index k = 0; k < FN(LINE); k += FN(SIZE)) {
                const FN(mask) after = FN(after)(end - at - k);
                BN_SEND(k, either, FN(either)(after, h, h2), FN(either)(after, g, g2),
                        FN(either)(after, s, s2), FN(either)(after, t, t2));
            }
            at += FN(LINE);
        } else if (at < end) {
            FN(gradient_run)(dy + at, x + at, y ? y + at : NULL, dx + at, end - at, head + c,
                             g_scale + c, x_scale + c, shift + c, 0);
            at = end;
        }
    }
#undef BN_SEND
}

/* As affine_rows_as. */
BN_INLINE void FN(gradient_rows)(const STORE *dy, const STORE *x, const STORE *y, STORE *dx,
                                     bn_index n, const REAL *head, const REAL *g_scale,
                                     const REAL *x_scale, const REAL *shift, const int rows)
{
    bn_index c = 0;
    for (; c + FN(SIZE) <= n; c += FN(SIZE)) {
        const FN(vector) h = FN(factors)(head + c), g = FN(factors)(g_scale + c);
        const FN(vector) s = FN(factors)(x_scale + c), t = FN(factors)(shift + c);
        const FN(mask) uses = s != 0;
        _Pragma("GCC unroll 4") for (int row = 0; row < rows; row++)
            FN(put)(dx + row * n + c, FN(gradient_each)(dy, x, y, row * n + c, h, g, s, t, uses));
    }
    for (; c < n; c++)
        for (bn_index i = c; i < rows * n; i += n)
            dx[i] = FN(gradient)(FN(masked)(dy, y, i), x[i], head[c], g_scale[c], x_scale[c],
                                 shift[c]);
}

/* A part of a row of channels some of which do not fit. */
static inline void FN(gradient_mixed)(const STORE *dy, const STORE *x, const STORE *y, STORE *dx,
                                      bn_index n, const REAL *head, const REAL *g_scale,
                                      const REAL *x_scale, const REAL *shift,
                                      const bn_gradients *of)
{
    for (bn_index c = 0; c < n; c++) {
        const STORE g = FN(masked)(dy, y, c);
        const bn_gradient gradient = FN(gradient_of)(of, c);
        dx[c] = FN(gradient_fits)(gradient)
                    ? FN(gradient)(g, x[c], head[c], g_scale[c], x_scale[c], shift[c])
                    : FN(gradient_wide)(g, x[c], gradient);
    }
}

/* dresidual of a stretch. It is written before dx, which may be dy. */
static inline void FN(pass_on)(const STORE *dy, const STORE *y, STORE *dresidual, bn_index n,
                               int stream)
{
    const bn_index begin = stream ? FN(to_line)(dresidual, n) : n;
    const bn_index end = begin + (n - begin) / FN(LINE) * FN(LINE);
    for (bn_index i = 0; i < begin; i++)
        dresidual[i] = FN(masked)(dy, y, i);
    for (bn_index i = begin; i < end; i += FN(SIZE))
        FN(send)(dresidual + i, FN(round)(FN(masked_each)(dy, y, i)));
    for (bn_index i = end; i < n; i++)
        dresidual[i] = FN(masked)(dy, y, i);
}

/* Elements that are passed on before their dx is made from the same lines: whole runs. */
static inline bn_index FN(stretch)(bn_index length, const STORE *dresidual, bn_index elements)
{
    return dresidual ? bn_min(bn_ceil(BN_STRETCH, length) * length, elements) : elements;
}

/* Adjacent runs of `length` elements, the first of them of channel c, round and round. */
BN_INLINE void FN(row_gradient_as)(const STORE *dy, const STORE *x, const STORE *y, STORE *dx,
                                       STORE *dresidual, bn_index elements, bn_index length,
                                       bn_gradients of, bn_index c)
{
    const REAL *head = (const REAL *)of.packed, *g_scale = head + of.pitch;
    const REAL *x_scale = g_scale + of.pitch, *shift = x_scale + of.pitch;
    const int lines = of.stream && length >= FN(LINE);
    const bn_index step = lines && of.fits ? FN(stretch)(length, dresidual, elements) : length;
    for (bn_index at = 0, n; at < elements; at += n) {
        const STORE *mask = y ? y + at : NULL;
        n = bn_min(step, elements - at);
        if (dresidual)
            FN(pass_on)(dy + at, mask, dresidual + at, n, of.stream);
        if (!of.fits && !FN(gradient_fits)(FN(gradient_of)(&of, c)))
            for (bn_index i = at; i < at + n; i++)
                dx[i] = FN(gradient_wide)(FN(masked)(dy, y, i), x[i], FN(gradient_of)(&of, c));
        else if (lines)
            FN(gradient_lines)(dy + at, x + at, mask, dx + at, n, length, &of, c);
        else
            FN(gradient_run)(dy + at, x + at, mask, dx + at, n, head + c, g_scale + c, x_scale + c,
                             shift + c, 0);
        c += step == length ? 1 : n / length;
        c = c < of.width ? c : c % of.width;
    }
}

static void FN(row_gradient)(const char *dy, const char *x, const char *y, char *dx,
                             char *dresidual, bn_index elements, bn_index length, bn_gradients of,
                             bn_index c)
{
    if (y)
        FN(row_gradient_as)((const STORE *)dy, (const STORE *)x, (const STORE *)y, (STORE *)dx,
                            (STORE *)dresidual, elements, length, of, c);
    else
        FN(row_gradient_as)((const STORE *)dy, (const STORE *)x, NULL, (STORE *)dx, (STORE *)dresidual,
                            elements, length, of, c);
}

/* Rows of channels that all fit, past the cache: as affine_wide_lines. */
BN_INLINE void FN(gradient_wide_lines)(const STORE *dy, const STORE *x, const STORE *y, STORE *dx,
                                           bn_index elements, const bn_gradients *of)
{
    const REAL *head = (const REAL *)of->packed, *g_scale = head + of->pitch;
    const REAL *x_scale = g_scale + of->pitch, *shift = x_scale + of->pitch;
    const bn_index width = of->width;
    bn_index at = FN(to_line)(dx, elements), c = at;
    if (at)
        FN(gradient_run)(dy, x, y, dx, at, head, g_scale, x_scale, shift, 1);
    for (; at + FN(LINE) <= elements; c -= width)
        for (; c < width && at + FN(LINE) <= elements; c += FN(LINE), at += FN(LINE))
            for (bn_index k = 0; k < FN(LINE); k += FN(SIZE)) {
                const FN(vector) factor = FN(factors)(x_scale + c + k);
                FN(send)(dx + at + k,
                         FN(gradient_each)(dy, x, y, at + k, FN(factors)(head + c + k),
                                           FN(factors)(g_scale + c + k), factor,
                                           FN(factors)(shift + c + k), factor != 0));
            }
    if (at < elements) {
        c = at % width;
        FN(gradient_run)(dy + at, x + at, y ? y + at : NULL, dx + at, elements - at, head + c,
                         g_scale + c, x_scale + c, shift + c, 1);
    }
}

/* Adjacent elements from the first column on; they may end within a row. */
BN_INLINE void FN(column_gradient_as)(const STORE *dy, const STORE *x, const STORE *y, STORE *dx,
                                          STORE *dresidual, bn_index elements, bn_gradients of)
{
    const REAL *head = (const REAL *)of.packed, *g_scale = head + of.pitch;
    const REAL *x_scale = g_scale + of.pitch, *shift = x_scale + of.pitch;
    const int lines = of.stream && of.fits && of.width >= FN(LINE);
    const bn_index step = lines ? FN(stretch)(of.width, dresidual, elements) : of.width;
    for (bn_index at = 0, n; at < elements; at += n) {
        const STORE *mask = y ? y + at : NULL;
        n = bn_min(step, elements - at);
        if (of.fits && !lines && at + 4 * n <= elements)
            n *= 4;
        if (dresidual)
            FN(pass_on)(dy + at, mask, dresidual + at, n, of.stream);
        if (lines)
            FN(gradient_wide_lines)(dy + at, x + at, mask, dx + at, n, &of);
        else if (!of.fits)
            FN(gradient_mixed)(dy + at, x + at, mask, dx + at, n, head, g_scale, x_scale, shift,
                               &of);
        else if (n <= of.width)
            FN(gradient_rows)(dy + at, x + at, mask, dx + at, n, head, g_scale, x_scale, shift, 1);
        else
            FN(gradient_rows)(dy + at, x + at, mask, dx + at, n / 4, head, g_scale, x_scale, shift,
                              4);
    }
}

static void FN(column_gradient)(const char *dy, const char *x, const char *y, char *dx,
                                char *dresidual, bn_index elements, bn_gradients of)
{
    if (y)
        FN(column_gradient_as)((const STORE *)dy, (const STORE *)x, (const STORE *)y, (STORE *)dx,
                               (STORE *)dresidual, elements, of);
    else
        FN(column_gradient_as)((const STORE *)dy, (const STORE *)x, NULL, (STORE *)dx,
                               (STORE *)dresidual, elements, of);
}
