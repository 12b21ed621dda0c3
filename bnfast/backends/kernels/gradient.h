/* dx = g * g_scale + ((x - mean) * x_scale + shift), and dresidual = g: dy where y is absent or
   positive, else 0. Stretches as in affine.h.  Needs REAL, FN, BN_IS_DOUBLE, affine.h. */

/* dy is read in any case: a load that hangs on y would keep the loop from being vectorised. Where
   y is NULL it is a constant of the loop this stands in. */
static inline REAL FN(masked)(const REAL *dy, const REAL *y, bn_index i)
{
    const REAL g = dy[i];
    return !y || y[i] > 0 ? g : 0;
}

/* Where x_scale is 0, as in eval mode, x does not matter, whatever it holds. */
static inline REAL FN(gradient)(REAL g, REAL x, REAL head, REAL g_scale, REAL x_scale, REAL shift)
{
    const REAL spread = FN(mad)(x - head, x_scale, shift);
    return FN(mad)(g, g_scale, x_scale == 0 ? shift : spread);
}

static inline REAL FN(gradient_wide)(REAL g, REAL x, bn_gradient gradient)
{
    const double spread = gradient.x_scale == 0 ? 0 : (x - gradient.mean) * gradient.x_scale;
    return (REAL)(g * gradient.g_scale + (spread + gradient.shift));
}

static inline int FN(gradient_fits)(bn_gradient gradient)
{
    return BN_IS_DOUBLE || (bn_fits(gradient.mean) && bn_fits(gradient.g_scale) &&
                            bn_fits(gradient.x_scale) && bn_fits(gradient.shift));
}

/* As pack_affine: all heads, g_scales, x_scales, shifts. */
static int FN(pack_gradient)(const bn_gradient *gradient, bn_index count, bn_index width,
                             char *packed)
{
    REAL *head = (REAL *)packed, *g_scale = head + width, *x_scale = g_scale + width;
    REAL *shift = x_scale + width;
    int fits = 1;
    for (bn_index c = 0; c < count; c++) {
        const bn_gradient one = gradient[c];
        const double tail = FN(tail)(one.mean);
        head[c] = (REAL)one.mean;
        g_scale[c] = (REAL)one.g_scale;
        x_scale[c] = (REAL)one.x_scale;
        shift[c] = (REAL)(tail == 0 || one.x_scale == 0 ? one.shift : one.shift - tail * one.x_scale);
        fits &= FN(gradient_fits)(one);
    }
    return fits;
}

/* One channel, its end as in affine_run_as: dx may be dy. */
static inline void FN(gradient_run)(const REAL *dy, const REAL *x, const REAL *y, REAL *dx,
                                    bn_index n, REAL head, REAL g_scale, REAL x_scale, REAL shift)
{
    const bn_index last = n - BN_LANES;
    REAL end[BN_LANES];
    if (n < BN_LANES) {
        for (bn_index i = 0; i < n; i++)
            dx[i] = FN(gradient)(FN(masked)(dy, y, i), x[i], head, g_scale, x_scale, shift);
        return;
    }
    BN_SIMD for (int k = 0; k < BN_LANES; k++)
        end[k] = FN(gradient)(FN(masked)(dy, y, last + k), x[last + k], head, g_scale, x_scale,
                              shift);
    if (x_scale == 0)
        BN_SIMD for (bn_index i = 0; i < last; i++)
            dx[i] = FN(mad)(FN(masked)(dy, y, i), g_scale, shift);
    else
        for (bn_index i = 0; i < last; i += BN_LANES)
            BN_SIMD for (bn_index k = i; k < i + BN_LANES; k++)
                dx[k] = FN(mad)(FN(masked)(dy, y, k), g_scale,
                                FN(mad)(x[k] - head, x_scale, shift));
    memcpy(dx + last, end, sizeof end);
}

/* A part of a row of channels. */
static inline void FN(gradient_row)(const REAL *dy, const REAL *x, const REAL *y, REAL *dx,
                                    bn_index n, const REAL *head, const REAL *g_scale,
                                    const REAL *x_scale, const REAL *shift)
{
    BN_SIMD for (bn_index c = 0; c < n; c++)
        dx[c] = FN(gradient)(FN(masked)(dy, y, c), x[c], head[c], g_scale[c], x_scale[c], shift[c]);
}

/* A part of a row of channels some of which do not fit. */
static inline void FN(gradient_mixed)(const REAL *dy, const REAL *x, const REAL *y, REAL *dx,
                                      bn_index n, const REAL *head, const REAL *g_scale,
                                      const REAL *x_scale, const REAL *shift,
                                      const bn_gradient *gradient)
{
    for (bn_index c = 0; c < n; c++) {
        const REAL g = FN(masked)(dy, y, c);
        dx[c] = FN(gradient_fits)(gradient[c])
                    ? FN(gradient)(g, x[c], head[c], g_scale[c], x_scale[c], shift[c])
                    : FN(gradient_wide)(g, x[c], gradient[c]);
    }
}

/* gradient_run (step 0) and gradient_row (step 1) past the cache, for a line or more. */
static inline void FN(gradient_send)(const REAL *dy, const REAL *x, const REAL *y, REAL *dx,
                                     bn_index n, const REAL *head, const REAL *g_scale,
                                     const REAL *x_scale, const REAL *shift, FN(pending) *pending,
                                     const int step)
{
#define BN_MAKE(i, to)                                                                             \
    BN_SIMD for (bn_index k = 0; k < FN(LINE); k++)(to)[k] =                                       \
        FN(gradient)(FN(masked)(dy, y, (i) + k), x[(i) + k], head[step * ((i) + k)],               \
                     g_scale[step * ((i) + k)], x_scale[step * ((i) + k)], shift[step * ((i) + k)])
    BN_SEND(pending, dx, n, BN_MAKE);
#undef BN_MAKE
}

/* dresidual of a stretch. It is written before dx, which may be dy. */
static inline void FN(pass_on)(const REAL *dy, const REAL *y, REAL *dresidual, bn_index n,
                               int stream)
{
    FN(pending) pending = {.fill = 0};
#define BN_MAKE(i, to)                                                                             \
    BN_SIMD for (bn_index k = 0; k < FN(LINE); k++)(to)[k] = FN(masked)(dy, y, (i) + k)
    if (stream && n >= FN(LINE)) {
        BN_SEND(&pending, dresidual, n, BN_MAKE);
        FN(end)(&pending, dresidual + n);
        return;
    }
#undef BN_MAKE
    BN_SIMD for (bn_index i = 0; i < n; i++)
        dresidual[i] = FN(masked)(dy, y, i);
}

/* Adjacent runs of `length` elements, the first of them of channel c, round and round. */
static inline void FN(row_gradient_as)(const REAL *dy, const REAL *x, const REAL *y, REAL *dx,
                                       REAL *dresidual, bn_index elements, bn_index length,
                                       bn_gradients of, bn_index c)
{
    const REAL *head = (const REAL *)of.packed, *g_scale = head + of.width;
    const REAL *x_scale = g_scale + of.width, *shift = x_scale + of.width;
    FN(pending) pending = {.fill = 0};
    for (bn_index at = 0; at < elements; at += length) {
        const REAL *mask = y ? y + at : NULL;
        const int fits = of.fits || FN(gradient_fits)(of.gradient[c]);
        if (dresidual)
            FN(pass_on)(dy + at, mask, dresidual + at, length, of.stream);
        if (of.stream && fits && length >= FN(LINE))
            FN(gradient_send)(dy + at, x + at, mask, dx + at, length, head + c, g_scale + c,
                              x_scale + c, shift + c, &pending, 0);
        else if (fits)
            FN(gradient_run)(dy + at, x + at, mask, dx + at, length, head[c], g_scale[c],
                             x_scale[c], shift[c]);
        else {
            FN(end)(&pending, dx + at);
            for (bn_index i = at; i < at + length; i++)
                dx[i] = FN(gradient_wide)(FN(masked)(dy, y, i), x[i], of.gradient[c]);
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
        FN(row_gradient_as)((const REAL *)dy, (const REAL *)x, (const REAL *)y, (REAL *)dx,
                            (REAL *)dresidual, elements, length, of, c);
    else
        FN(row_gradient_as)((const REAL *)dy, (const REAL *)x, NULL, (REAL *)dx, (REAL *)dresidual,
                            elements, length, of, c);
}

/* Adjacent elements from the first column on; they may end within a row. */
static inline void FN(column_gradient_as)(const REAL *dy, const REAL *x, const REAL *y, REAL *dx,
                                          REAL *dresidual, bn_index elements, bn_gradients of)
{
    const bn_index width = of.width;
    const REAL *head = (const REAL *)of.packed, *g_scale = head + width;
    const REAL *x_scale = g_scale + width, *shift = x_scale + width;
    FN(pending) pending = {.fill = 0};
    for (bn_index at = 0; at < elements; at += width) {
        const bn_index n = bn_min(width, elements - at);
        const REAL *mask = y ? y + at : NULL;
        if (dresidual)
            FN(pass_on)(dy + at, mask, dresidual + at, n, of.stream);
        if (of.stream && of.fits && n >= FN(LINE))
            FN(gradient_send)(dy + at, x + at, mask, dx + at, n, head, g_scale, x_scale, shift,
                              &pending, 1);
        else if (of.fits) {
            FN(end)(&pending, dx + at);
            FN(gradient_row)(dy + at, x + at, mask, dx + at, n, head, g_scale, x_scale, shift);
        } else
            FN(gradient_mixed)(dy + at, x + at, mask, dx + at, n, head, g_scale, x_scale, shift,
                               of.gradient);
    }
    FN(end)(&pending, dx + elements);
}

static void FN(column_gradient)(const char *dy, const char *x, const char *y, char *dx,
                                char *dresidual, bn_index elements, bn_gradients of)
{
    if (y)
        FN(column_gradient_as)((const REAL *)dy, (const REAL *)x, (const REAL *)y, (REAL *)dx,
                               (REAL *)dresidual, elements, of);
    else
        FN(column_gradient_as)((const REAL *)dy, (const REAL *)x, NULL, (REAL *)dx,
                               (REAL *)dresidual, elements, of);
}
