/* Channels-last kernels. Adjacent elements belong to adjacent channels, so loops run along a row
   and vectorise by themselves; sums of a column are kept in arrays on the stack:

       |<-width->|
       abcdefghij....other columns....     row 0
       abcdefghij....other columns....     row 1
       |<------------stride---------->|

   A width of few channels is folded by the driver: several rows are taken as one wide row, and
   every vector that goes with it is repeated. Needs REAL, FN, and rows.h. */

/* Block moments of up to BN_COLUMNS columns, four rows at a time, so that the sums are loaded and
   stored once for four additions. */
static inline void FN(block_moments)(const REAL *x, bn_index rows, bn_index width, bn_index stride,
                                     bn_moments *moments)
{
    double first[BN_COLUMNS], off[BN_COLUMNS], square[BN_COLUMNS];
    for (bn_index c = 0; c < width; c++)
        first[c] = off[c] = square[c] = 0.0;
    bn_index row = 0;
    for (; row + 4 <= rows; row += 4) {
        const REAL *p = x + row * stride, *q = p + stride, *r = q + stride, *s = r + stride;
        for (bn_index c = 0; c < width; c++)
            first[c] += ((double)p[c] + q[c]) + ((double)r[c] + s[c]);
    }
    for (; row < rows; row++)
        for (bn_index c = 0; c < width; c++)
            first[c] += x[row * stride + c];
    for (bn_index c = 0; c < width; c++)
        first[c] /= (double)rows;
    for (row = 0; row + 4 <= rows; row += 4) {
        const REAL *p = x + row * stride, *q = p + stride, *r = q + stride, *s = r + stride;
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
    const bn_index rows = BN_BLOCK_ELEMENTS / (width ? width : 1);
    return rows < BN_BLOCK_ROWS_MIN ? BN_BLOCK_ROWS_MIN : rows;
}

/* Moments of up to BN_COLUMNS columns: blocks are merged about the mean of the first one. */
static void FN(column_moments)(const char *x_bytes, bn_index rows, bn_index width, bn_index stride,
                               bn_moments *moments)
{
    const REAL *x = (const REAL *)x_bytes;
    const bn_index step = FN(block_rows)(width);
    double shifted[BN_COLUMNS];
    bn_moments block[BN_COLUMNS];
    FN(block_moments)(x, bn_min(step, rows), width, stride, moments);
    for (bn_index c = 0; c < width; c++)
        shifted[c] = 0.0;
    for (bn_index row = step; row < rows; row += step) {
        const bn_index n = bn_min(step, rows - row);
        FN(block_moments)(x + row * stride, n, width, stride, block);
        for (bn_index c = 0; c < width; c++) {
            const double d = bn_distance(block[c], moments[c]);
            shifted[c] += (double)n * d;
            moments[c].m2 += block[c].m2 + (double)n * d * d;
        }
    }
    for (bn_index c = 0; rows > step && c < width; c++) {
        const double d = shifted[c] / (double)rows;
        const double m2 = moments[c].m2 - shifted[c] * d;
        moments[c].low += d;
        moments[c].m2 = m2 < 0.0 ? 0.0 : m2;
    }
}

static inline void FN(block_sums)(const REAL *dy, const REAL *x, const REAL *y, bn_index rows,
                                  bn_index width, bn_index stride, const double *mean,
                                  double *sum_dy, double *sum_dy_x)
{
    double g_sum[BN_COLUMNS], gx_sum[BN_COLUMNS];
    for (bn_index c = 0; c < width; c++)
        g_sum[c] = gx_sum[c] = 0.0;
    bn_index row = 0;
    for (; row + 2 <= rows; row += 2) {
        const bn_index i = row * stride, j = i + stride;
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
                            bn_index rows, bn_index width, bn_index stride, const double *mean,
                            double *sum_dy, double *sum_dy_x)
{
    const REAL *dy = (const REAL *)dy_bytes, *x = (const REAL *)x_bytes;
    const REAL *y = (const REAL *)y_bytes;
    const bn_index step = FN(block_rows)(width);
    for (bn_index c = 0; c < width; c++)
        sum_dy[c] = sum_dy_x[c] = 0.0;
    for (bn_index row = 0; row < rows; row += step) {
        const bn_index n = bn_min(step, rows - row), at = row * stride;
        if (y)
            FN(block_sums)(dy + at, x + at, y + at, n, width, stride, mean, sum_dy, sum_dy_x);
        else
            FN(block_sums)(dy + at, x + at, NULL, n, width, stride, mean, sum_dy, sum_dy_x);
    }
}

/* The channel vectors of an elementwise kernel in REAL, one after the other, then one REAL that
   says whether every channel fits. */
static void FN(pack_affine)(const bn_affine *affine, bn_index width, char *packed)
{
    REAL *head = (REAL *)packed, *scale = head + width, *shift = scale + width;
    int fits = 1;
    for (bn_index c = 0; c < width; c++) {
        head[c] = (REAL)affine[c].mean;
        scale[c] = (REAL)affine[c].scale;
        shift[c] = FN(affine_shift)(affine[c]);
        fits &= FN(affine_fits)(affine[c]);
    }
    shift[width] = (REAL)fits;
}

static inline void FN(affine_row)(const REAL *x, const REAL *residual, REAL *y, bn_index n,
                                  const REAL *head, const REAL *scale, const REAL *shift, int relu)
{
    BN_AFFINE_LOOPS(head[i], scale[i], shift[i])
}

/* `elements` adjacent elements from column 0 on; the last row may be a part of one. Channels whose
   numbers do not fit take the double path alone, so that no other channel's bits change. */
static void FN(column_normalize)(const char *x_bytes, const char *residual_bytes, char *y_bytes,
                                 bn_index elements, bn_index width, const bn_affine *affine,
                                 const char *packed, int relu)
{
    const REAL *x = (const REAL *)x_bytes, *residual = (const REAL *)residual_bytes;
    REAL *y = (REAL *)y_bytes;
    const REAL *head = (const REAL *)packed, *scale = head + width, *shift = scale + width;
    const int fits = shift[width] != 0;
    for (bn_index at = 0; at < elements; at += width) {
        const bn_index n = bn_min(width, elements - at);
        const REAL *r = residual ? residual + at : NULL;
        for (bn_index c = 0; !fits && c < n; c++)
            if (FN(affine_fits)(affine[c]))
                FN(affine_run)(x + at + c, r ? r + c : NULL, y + at + c, 1, head[c], scale[c],
                               shift[c], relu);
            else
                y[at + c] = FN(affine_wide)(x[at + c], r ? r + c : NULL, affine[c], relu);
        if (fits)
            FN(affine_row)(x + at, r, y + at, n, head, scale, shift, relu);
    }
}

static void FN(pack_gradient)(const bn_gradient *gradient, bn_index width, char *packed)
{
    REAL *head = (REAL *)packed, *g_scale = head + width, *x_scale = g_scale + width;
    REAL *shift = x_scale + width;
    int fits = 1;
    for (bn_index c = 0; c < width; c++) {
        head[c] = (REAL)gradient[c].mean;
        g_scale[c] = (REAL)gradient[c].g_scale;
        x_scale[c] = (REAL)gradient[c].x_scale;
        shift[c] = FN(gradient_shift)(gradient[c]);
        fits &= FN(gradient_fits)(gradient[c]);
    }
    shift[width] = (REAL)fits;
}

static inline void FN(gradient_row)(const REAL *dy, const REAL *x, const REAL *y, REAL *dx,
                                    REAL *dresidual, bn_index width, const REAL *head,
                                    const REAL *g_scale, const REAL *x_scale, const REAL *shift)
{
    if (dresidual)
        BN_SIMD for (bn_index c = 0; c < width; c++)
            dresidual[c] = FN(masked)(dy, y, c);
    BN_SIMD for (bn_index c = 0; c < width; c++) {
        const REAL spread = FN(mad)(x[c] - head[c], x_scale[c], shift[c]);
        dx[c] = FN(mad)(FN(masked)(dy, y, c), g_scale[c], x_scale[c] == 0 ? shift[c] : spread);
    }
}

static void FN(column_gradient)(const char *dy_bytes, const char *x_bytes, const char *y_bytes,
                                char *dx_bytes, char *dresidual_bytes, bn_index elements,
                                bn_index width, const bn_gradient *gradient, const char *packed)
{
    const REAL *dy = (const REAL *)dy_bytes, *x = (const REAL *)x_bytes;
    const REAL *y = (const REAL *)y_bytes;
    REAL *dx = (REAL *)dx_bytes, *dresidual = (REAL *)dresidual_bytes;
    const REAL *head = (const REAL *)packed, *g_scale = head + width, *x_scale = g_scale + width;
    const REAL *shift = x_scale + width;
    const int fits = shift[width] != 0;
    for (bn_index at = 0; at < elements; at += width) {
        const bn_index n = bn_min(width, elements - at);
        REAL *dr = dresidual ? dresidual + at : NULL;
        const REAL *ya = y ? y + at : NULL;
        for (bn_index c = 0; !fits && c < n; c++) {
            const REAL g = FN(masked)(dy + at, ya, c);
            if (!FN(gradient_fits)(gradient[c])) {
                if (dr)
                    dr[c] = g;
                dx[at + c] = FN(gradient_wide)(g, x[at + c], gradient[c]);
            } else
                FN(gradient_row)(dy + at + c, x + at + c, ya ? ya + c : NULL, dx + at + c,
                                 dr ? dr + c : NULL, 1, head + c, g_scale + c, x_scale + c,
                                 shift + c);
        }
        if (!fits)
            continue;
        if (y)
            FN(gradient_row)(dy + at, x + at, ya, dx + at, dr, n, head, g_scale, x_scale, shift);
        else
            FN(gradient_row)(dy + at, x + at, NULL, dx + at, dr, n, head, g_scale, x_scale, shift);
    }
}

#undef BN_AFFINE_LOOPS
