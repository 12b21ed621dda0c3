/* Channels-last kernels. Adjacent elements belong to adjacent channels, so loops run along a row
   and vectorise by themselves; sums of a column are kept in arrays on the stack:

       |<-width->|
       abcdefghij....other columns....     row 0
       abcdefghij....other columns....     row 1
       |<------------stride---------->|

   A width of few channels is folded by the driver: several rows are taken as one wide row, and
   every vector that goes with it is repeated. Needs REAL, FN, and rows.h. */

static inline void FN(prefetch_rows)(const REAL *x, bn_index rows, bn_index width, bn_index stride)
{
    for (bn_index row = 0; row < rows; row++)
        for (bn_index c = 0; c < width; c += 64 / (bn_index)sizeof(REAL))
            BN_PREFETCH(x + row * stride + c);
}

/* Block moments of up to BN_COLUMNS columns, four rows at a time, so that the sums are loaded and
   stored once for four additions. The first mean is that of the block, or, for float32, of its
   first rows: see row_moments. */
static inline void FN(block_moments)(const REAL *x, bn_index rows, bn_index width, bn_index stride,
                                     bn_index ahead, bn_moments *moments)
{
    double first[BN_COLUMNS], off[BN_COLUMNS], square[BN_COLUMNS];
    const bn_index sample = BN_IS_DOUBLE ? rows : bn_min(rows, 4);
    for (bn_index c = 0; c < width; c++)
        first[c] = off[c] = square[c] = 0.0;
    bn_index row = 0;
    for (; row + 4 <= sample; row += 4) {
        const REAL *p = x + row * stride, *q = p + stride, *r = q + stride, *s = r + stride;
        for (bn_index c = 0; c < width; c++)
            first[c] += ((double)p[c] + q[c]) + ((double)r[c] + s[c]);
    }
    for (; row < sample; row++)
        for (bn_index c = 0; c < width; c++)
            first[c] += x[row * stride + c];
    for (bn_index c = 0; c < width; c++)
        first[c] /= (double)sample;
    for (row = 0; row + 4 <= rows; row += 4) {
        const REAL *p = x + row * stride, *q = p + stride, *r = q + stride, *s = r + stride;
        FN(prefetch_rows)(p + ahead, ahead ? 4 : 0, width, stride);
        for (bn_index c = 0; c < width; c++) {
            const double dp = p[c] - first[c], dq = q[c] - first[c];
            const double dr = r[c] - first[c], ds = s[c] - first[c];
            off[c] += (dp + dq) + (dr + ds);
            square[c] += FN(wide_mad)(dp, dp, dq * dq) + FN(wide_mad)(dr, dr, ds * ds);
        }
    }
    for (; row < rows; row++)
        for (bn_index c = 0; c < width; c++) {
            const double d = x[row * stride + c] - first[c];
            off[c] += d;
            square[c] = FN(wide_mad)(d, d, square[c]);
        }
    for (bn_index c = 0; c < width; c++)
        moments[c] = bn_corrected(first[c], off[c], square[c], (double)rows);
}

static inline bn_index FN(block_rows)(bn_index width)
{
    const bn_index rows = BN_BLOCK_ELEMENTS / width;
    return rows < BN_BLOCK_ROWS_MIN ? BN_BLOCK_ROWS_MIN : rows;
}

/* Moments of up to BN_COLUMNS columns: one block after the other is merged into those before. */
static void FN(column_moments)(const char *x_bytes, bn_index rows, bn_index width, bn_index stride,
                               bn_index ahead, bn_moments *moments)
{
    const REAL *x = (const REAL *)x_bytes;
    const bn_index step = FN(block_rows)(width);
    if (rows <= step) {
        FN(block_moments)(x, rows, width, stride, ahead, moments);
        return;
    }
    bn_moments block[BN_COLUMNS];
    FN(block_moments)(x, step, width, stride, ahead, moments);
    for (bn_index row = step; row < rows; row += step) {
        const bn_index n = bn_min(step, rows - row);
        const double share = (double)n / (double)(row + n);
        FN(block_moments)(x + row * stride, n, width, stride, ahead, block);
        for (bn_index c = 0; c < width; c++) {
            const double d = bn_distance(block[c], moments[c]) - moments[c].low;
            moments[c] = bn_moved(moments[c], d * share);
            moments[c].m2 += block[c].m2 + (double)row * share * d * d;
        }
    }
}

static inline void FN(block_sums)(const REAL *dy, const REAL *x, const REAL *y, bn_index rows,
                                  bn_index width, bn_index stride, bn_index ahead,
                                  const double *mean, double *sum_dy, double *sum_dy_x)
{
    double g_sum[BN_COLUMNS], gx_sum[BN_COLUMNS];
    for (bn_index c = 0; c < width; c++)
        g_sum[c] = gx_sum[c] = 0.0;
    bn_index row = 0;
    for (; row + 2 <= rows; row += 2) {
        const bn_index i = row * stride, j = i + stride;
        FN(prefetch_rows)(dy + i + ahead, ahead ? 2 : 0, width, stride);
        FN(prefetch_rows)(x + i + ahead, ahead ? 2 : 0, width, stride);
        for (bn_index c = 0; c < width; c++) {
            const double g = FN(masked)(dy, y, i + c), h = FN(masked)(dy, y, j + c);
            g_sum[c] += g + h;
            gx_sum[c] += FN(wide_mad)(g, x[i + c] - mean[c], h * (x[j + c] - mean[c]));
        }
    }
    for (; row < rows; row++)
        for (bn_index c = 0; c < width; c++) {
            const double g = FN(masked)(dy, y, row * stride + c);
            g_sum[c] += g;
            gx_sum[c] = FN(wide_mad)(g, x[row * stride + c] - mean[c], gx_sum[c]);
        }
    for (bn_index c = 0; c < width; c++) {
        sum_dy[c] += g_sum[c];
        sum_dy_x[c] += gx_sum[c];
    }
}

static void FN(column_sums)(const char *dy_bytes, const char *x_bytes, const char *y_bytes,
                            bn_index rows, bn_index width, bn_index stride, bn_index ahead,
                            const double *mean, double *sum_dy, double *sum_dy_x)
{
    const REAL *dy = (const REAL *)dy_bytes, *x = (const REAL *)x_bytes;
    const REAL *y = (const REAL *)y_bytes;
    const bn_index step = FN(block_rows)(width);
    for (bn_index c = 0; c < width; c++)
        sum_dy[c] = sum_dy_x[c] = 0.0;
    for (bn_index row = 0; row < rows; row += step) {
        const bn_index n = bn_min(step, rows - row), at = row * stride;
        if (y)
            FN(block_sums)(dy + at, x + at, y + at, n, width, stride, ahead, mean, sum_dy,
                           sum_dy_x);
        else
            FN(block_sums)(dy + at, x + at, NULL, n, width, stride, ahead, mean, sum_dy,
                           sum_dy_x);
    }
}

/* `rows` rows at once, so that the channel vectors are loaded once for all of them: in the cache,
   four take three quarters of the time of four times one. */
static inline void FN(affine_rows_as)(const REAL *x, const REAL *residual, REAL *y, bn_index width,
                                      bn_index n, const REAL *head, const REAL *scale,
                                      const REAL *shift, const int rows, const int add,
                                      const int relu)
{
    BN_SIMD for (bn_index c = 0; c < n; c++) {
        const REAL h = head[c], s = scale[c], t = shift[c];
        for (int row = 0; row < rows; row++) {
            const bn_index i = row * width + c;
            y[i] = FN(affine)(x[i], add ? residual[i] : 0, h, s, t, add, relu);
        }
    }
}

/* Four wide rows, or (with `n` columns) one that may be a part of one. */
static inline void FN(affine_rows)(const REAL *x, const REAL *residual, REAL *y, bn_index width,
                                   bn_index n, const REAL *head, const REAL *scale,
                                   const REAL *shift, const int rows, int relu)
{
    if (residual && relu)
        FN(affine_rows_as)(x, residual, y, width, n, head, scale, shift, rows, 1, 1);
    else if (residual)
        FN(affine_rows_as)(x, residual, y, width, n, head, scale, shift, rows, 1, 0);
    else if (relu)
        FN(affine_rows_as)(x, NULL, y, width, n, head, scale, shift, rows, 0, 1);
    else
        FN(affine_rows_as)(x, NULL, y, width, n, head, scale, shift, rows, 0, 0);
}

/* One row, its whole cache lines past the cache. y is neither x nor residual. */
static inline void FN(affine_row_streamed)(const REAL *x, const REAL *residual, REAL *y,
                                           bn_index n, const REAL *head, const REAL *scale,
                                           const REAL *shift, int relu)
{
    enum { LINE = 64 / sizeof(REAL) };
    const bn_index first = bn_min(n, (bn_index)(-(uintptr_t)y % 64 / sizeof(REAL)));
    bn_index c = first;
    FN(affine_rows)(x, residual, y, n, first, head, scale, shift, 1, relu);
    for (; c + LINE <= n; c += LINE) {
        _Alignas(64) REAL line[LINE];
        FN(affine_rows)(x + c, residual ? residual + c : NULL, line, LINE, LINE, head + c, scale + c,
                        shift + c, 1, relu);
        BN_JOIN(stream, line, BN_TARGET)(y + c, line);
    }
    FN(affine_rows)(x + c, residual ? residual + c : NULL, y + c, n, n - c, head + c, scale + c,
                    shift + c, 1, relu);
}

/* `elements` adjacent elements from column 0 on; the last row may be a part of one. Channels whose
   numbers do not fit take the double path alone, so that no other channel's bits change. */
static void FN(column_normalize)(const char *x_bytes, const char *residual_bytes, char *y_bytes,
                                 bn_index elements, bn_index width, int stream,
                                 const bn_affine *affine, const char *packed, int relu)
{
    const REAL *x = (const REAL *)x_bytes, *residual = (const REAL *)residual_bytes;
    REAL *y = (REAL *)y_bytes;
    const REAL *head = (const REAL *)packed, *scale = head + width, *shift = scale + width;
    const int fits = shift[width] != 0;
    bn_index at = 0;
    for (; fits && stream && at + width <= elements; at += width)
        FN(affine_row_streamed)(x + at, residual ? residual + at : NULL, y + at, width, head, scale,
                                shift, relu);
    for (; fits && at + 4 * width <= elements; at += 4 * width)
        FN(affine_rows)(x + at, residual ? residual + at : NULL, y + at, width, width, head, scale,
                        shift, 4, relu);
    for (; at < elements; at += width) {
        const bn_index n = bn_min(width, elements - at);
        const REAL *r = residual ? residual + at : NULL;
        if (fits)
            FN(affine_rows)(x + at, r, y + at, width, n, head, scale, shift, 1, relu);
        for (bn_index c = 0; !fits && c < n; c++)
            if (FN(affine_fits)(affine[c]))
                FN(affine_run)(x + at + c, r ? r + c : NULL, y + at + c, 1, head[c], scale[c],
                               shift[c], relu);
            else
                y[at + c] = FN(affine_wide)(x[at + c], r ? r + c : NULL, affine[c], relu);
    }
#if defined(__SSE2__)
    if (stream)
        _mm_sfence();
#endif
}

/* As affine_rows, for one row: four were slower. dresidual is written first, so that dx may be dy. */
static inline void FN(gradient_row)(const REAL *dy, const REAL *x, const REAL *y, REAL *dx,
                                    REAL *dresidual, bn_index n, const REAL *head,
                                    const REAL *g_scale, const REAL *x_scale, const REAL *shift)
{
    if (dresidual)
        BN_SIMD for (bn_index c = 0; c < n; c++)
            dresidual[c] = FN(masked)(dy, y, c);
    BN_SIMD for (bn_index c = 0; c < n; c++)
        dx[c] = FN(gradient)(FN(masked)(dy, y, c), x[c], head[c], g_scale[c], x_scale[c],
                             shift[c]);
}

static inline void FN(gradient_one)(const REAL *dy, const REAL *x, const REAL *y, REAL *dx,
                                    REAL *dresidual, const bn_gradient *gradient,
                                    const REAL *head, const REAL *g_scale, const REAL *x_scale,
                                    const REAL *shift)
{
    const REAL g = FN(masked)(dy, y, 0);
    if (dresidual)
        *dresidual = g;
    *dx = FN(gradient_fits)(*gradient) ? FN(gradient)(g, *x, *head, *g_scale, *x_scale, *shift)
                                       : FN(gradient_wide)(g, *x, *gradient);
}

static inline void FN(column_gradient_as)(const REAL *dy, const REAL *x, const REAL *y, REAL *dx,
                                          REAL *dresidual, bn_index elements, bn_index width,
                                          const bn_gradient *gradient, const REAL *head)
{
    const REAL *g_scale = head + width, *x_scale = g_scale + width, *shift = x_scale + width;
    const int fits = shift[width] != 0;
    for (bn_index at = 0; at < elements; at += width) {
        const bn_index n = bn_min(width, elements - at);
        if (fits)
            FN(gradient_row)(dy + at, x + at, y ? y + at : NULL, dx + at,
                             dresidual ? dresidual + at : NULL, n, head, g_scale, x_scale, shift);
        for (bn_index c = 0; !fits && c < n; c++)
            FN(gradient_one)(dy + at + c, x + at + c, y ? y + at + c : NULL, dx + at + c,
                             dresidual ? dresidual + at + c : NULL, gradient + c, head + c,
                             g_scale + c, x_scale + c, shift + c);
    }
}

static void FN(column_gradient)(const char *dy_bytes, const char *x_bytes, const char *y_bytes,
                                char *dx_bytes, char *dresidual_bytes, bn_index elements,
                                bn_index width, const bn_gradient *gradient, const char *packed)
{
    const REAL *dy = (const REAL *)dy_bytes, *x = (const REAL *)x_bytes;
    const REAL *y = (const REAL *)y_bytes, *head = (const REAL *)packed;
    REAL *dx = (REAL *)dx_bytes, *dresidual = (REAL *)dresidual_bytes;
    if (y)
        FN(column_gradient_as)(dy, x, y, dx, dresidual, elements, width, gradient, head);
    else
        FN(column_gradient_as)(dy, x, NULL, dx, dresidual, elements, width, gradient, head);
}
