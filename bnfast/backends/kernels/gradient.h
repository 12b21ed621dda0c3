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

/* As find_affine: all heads, g_scales, x_scales, shifts in REAL. */
static int FN(pack_gradient)(const double *mean, const double *g_scale, const double *x_scale,
                             const double *shift, bn_index n, bn_index width, char *packed)
{
    REAL *head = (REAL *)packed, *g_scales = head + width, *x_scales = g_scales + width;
    REAL *shifts = x_scales + width;
    int fits = 1;
    BN_SIMD for (bn_index c = 0; c < n; c++) {
        const double tail = FN(tail)(mean[c]), moved = shift[c] - tail * x_scale[c];
        head[c] = (REAL)mean[c];
        g_scales[c] = (REAL)g_scale[c];
        x_scales[c] = (REAL)x_scale[c];
        shifts[c] = (REAL)(((tail == 0) | (x_scale[c] == 0)) ? shift[c] : moved);
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
                                    const REAL *x_scales, const REAL *shifts,
                                    bn_index ahead, FN(pending) *pending, const int step)
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
#define BN_ASK(i)                                                                                  \
    if (ahead) {                                                                                   \
        BN_PREFETCH(dy + (i) + ahead);                                                             \
        BN_PREFETCH(x + (i) + ahead);                                                              \
    }
    if (pending) {
        BN_SEND(pending, dx, n, BN_MAKE, BN_ASK);
    } else if (n < FN(SIZE)) {
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
#undef BN_ASK
#undef BN_MAKE
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
    FN(pending) pending;
    FN(begin)(&pending);
#define BN_MAKE(i) FN(round)(FN(masked_each)(dy, y, i))
    if (stream && n >= FN(LINE))
        BN_SEND(&pending, dresidual, n, BN_MAKE, (void));
    else
        for (bn_index i = 0; i < n; i++)
            dresidual[i] = FN(masked)(dy, y, i);
#undef BN_MAKE
    FN(end)(&pending, dresidual + n);
}

/* Adjacent runs of `length` elements, the first of them of channel c, round and round. */
BN_INLINE void FN(row_gradient_as)(const STORE *dy, const STORE *x, const STORE *y, STORE *dx,
                                       STORE *dresidual, bn_index elements, bn_index length,
                                       bn_gradients of, bn_index c)
{
    const REAL *head = (const REAL *)of.packed, *g_scale = head + of.width;
    const REAL *x_scale = g_scale + of.width, *shift = x_scale + of.width;
    FN(pending) pending;
    FN(pending) *const stream = of.stream && length >= FN(LINE) ? &pending : NULL;
    FN(begin)(&pending);
    for (bn_index at = 0; at < elements; at += length) {
        const STORE *mask = y ? y + at : NULL;
        if (dresidual)
            FN(pass_on)(dy + at, mask, dresidual + at, length, of.stream);
        if (of.fits || FN(gradient_fits)(FN(gradient_of)(&of, c))) {
            FN(gradient_run)(dy + at, x + at, mask, dx + at, length, head + c, g_scale + c,
                             x_scale + c, shift + c, of.ahead, stream, 0);
        } else {
            FN(end)(&pending, dx + at);
            for (bn_index i = at; i < at + length; i++)
                dx[i] = FN(gradient_wide)(FN(masked)(dy, y, i), x[i], FN(gradient_of)(&of, c));
        }
        c = c + 1 == of.width ? 0 : c + 1;
    }
    FN(end)(&pending, dx + elements);
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

/* Adjacent elements from the first column on; they may end within a row. */
BN_INLINE void FN(column_gradient_as)(const STORE *dy, const STORE *x, const STORE *y, STORE *dx,
                                          STORE *dresidual, bn_index elements, bn_gradients of)
{
    const REAL *head = (const REAL *)of.packed, *g_scale = head + of.width;
    const REAL *x_scale = g_scale + of.width, *shift = x_scale + of.width;
    FN(pending) pending;
    FN(pending) *const stream = of.stream && of.width >= FN(LINE) ? &pending : NULL;
    FN(begin)(&pending);
    for (bn_index at = 0, n; at < elements; at += n) {
        const STORE *mask = y ? y + at : NULL;
        n = bn_min(of.width, elements - at);
        if (of.fits && !stream && at + 4 * n <= elements)
            n *= 4;
        if (dresidual)
            FN(pass_on)(dy + at, mask, dresidual + at, n, of.stream);
        if (of.fits && stream && n == of.width) {
            FN(gradient_run)(dy + at, x + at, mask, dx + at, n, head, g_scale, x_scale, shift,
                             0, stream, 1);
            continue;
        }
        FN(end)(&pending, dx + at);
        if (!of.fits)
            FN(gradient_mixed)(dy + at, x + at, mask, dx + at, n, head, g_scale, x_scale, shift,
                               &of);
        else if (n <= of.width)
            FN(gradient_rows)(dy + at, x + at, mask, dx + at, n, head, g_scale, x_scale, shift, 1);
        else
            FN(gradient_rows)(dy + at, x + at, mask, dx + at, n / 4, head, g_scale, x_scale, shift,
                              4);
    }
    FN(end)(&pending, dx + elements);
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
