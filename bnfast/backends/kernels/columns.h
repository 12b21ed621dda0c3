/* Channels-last reductions. Adjacent elements belong to adjacent channels, so loops run along a row
   and vectorise by themselves; sums of a column are kept in arrays on the stack:

       |<-width->|
       abcdefghij....other columns....     row 0
       abcdefghij....other columns....     row 1
       |<------------stride---------->|

   A width of few channels is folded by the driver: several rows are taken as one wide row, and
   every vector that goes with it is repeated.  Needs STORE, FN, BN_IS_DOUBLE, gradient.h. */

/* The sums over `rows` rows of x of the deviations from `first` and of their squares are added to
   those of each column: these are loaded and stored once for all of the rows. */
BN_INLINE void FN(add_rows)(const STORE *x, bn_index width, bn_index stride, bn_index ahead,
                                const double *first, double *off, double *square, const int rows)
{
    bn_index c = 0;
    for (; c + FN(WIDTH) <= width; c += FN(WIDTH)) {
        const FN(wide) from = FN(load_wide)(first + c);
        FN(wide) deviations = {0}, squares = {0};
        _Pragma("GCC unroll 8") for (int row = 0; row < rows; row++)
        {
            const STORE *const at = x + row * stride + c;
            const FN(wide) d = FN(plus)(FN(load)(at), -1, from);
            if (ahead && c % FN(LINE) == 0)
                BN_PREFETCH(at + ahead);
            deviations = FN(plus)(deviations, 1, d);
            squares = FN(wide_mad_each)(d, d, squares);
        }
        FN(add_vector)(off + c, deviations);
        FN(add_vector)(square + c, squares);
    }
    for (; c < width; c++)
        for (int row = 0; row < rows; row++) {
            const double d = FN(raise_one)(x[row * stride + c]) - first[c];
            off[c] += d;
            square[c] = FN(wide_mad)(d, d, square[c]);
        }
}

/* The same for dy, where y is NULL or positive, and for its products with x - mean. */
BN_INLINE void FN(add_product_rows)(const STORE *dy, const STORE *x, const STORE *y,
                                        bn_index width, bn_index stride, bn_index ahead,
                                        const double *mean, double *sum_dy, double *sum_dy_x,
                                        const int rows)
{
    bn_index c = 0;
    for (; c + FN(WIDTH) <= width; c += FN(WIDTH)) {
        const FN(wide) from = FN(load_wide)(mean + c);
        FN(wide) sum = {0}, products = {0};
        _Pragma("GCC unroll 8") for (int row = 0; row < rows; row++)
        {
            const bn_index at = row * stride + c;
            const FN(wide) g = y ? FN(load_masked)(dy + at, y + at) : FN(load)(dy + at);
            if (ahead && c % FN(LINE) == 0) {
                BN_PREFETCH(dy + at + ahead);
                BN_PREFETCH(x + at + ahead);
            }
            sum += g;
            products = FN(wide_mad_each)(g, FN(load)(x + at) - from, products);
        }
        FN(add_vector)(sum_dy + c, sum);
        FN(add_vector)(sum_dy_x + c, products);
    }
    for (; c < width; c++)
        for (int row = 0; row < rows; row++) {
            const bn_index at = row * stride + c;
            const double g = FN(raise_one)(FN(masked)(dy, y, at));
            sum_dy[c] += g;
            sum_dy_x[c] = FN(wide_mad)(g, FN(raise_one)(x[at]) - mean[c], sum_dy_x[c]);
        }
}

static inline void FN(add_row)(const STORE *x, bn_index width, double *sum)
{
    bn_index c = 0;
    for (; c + FN(WIDTH) <= width; c += FN(WIDTH))
        FN(add_vector)(sum + c, FN(load)(x + c));
    for (; c < width; c++)
        sum[c] += FN(raise_one)(x[c]);
}

/* Moments of a block of up to BN_COLUMNS columns, about the mean of the block, or, for float32, of
   its first rows where it has more than a few: see first_mean. */
static inline void FN(block_moments)(const STORE *x, bn_index rows, bn_index width, bn_index stride,
                                     bn_index ahead, bn_moments *moments)
{
    double first[BN_COLUMNS], off[BN_COLUMNS], square[BN_COLUMNS];
    const bn_index sample = BN_IS_DOUBLE || rows <= BN_LANES ? rows : 4;
    for (bn_index c = 0; c < width; c++)
        first[c] = off[c] = square[c] = 0.0;
    for (bn_index row = 0; row < sample; row++)
        FN(add_row)(x + row * stride, width, first);
    for (bn_index c = 0; c < width; c++)
        first[c] = (double)(REAL)(first[c] / (double)sample);
    bn_index row = 0;
    if (ahead) /* where nothing is asked for, a constant leaves the question out of the loop */
        for (; row + BN_ROWS <= rows; row += BN_ROWS)
            FN(add_rows)(x + row * stride, width, stride, ahead, first, off, square, BN_ROWS);
    for (; row + BN_ROWS <= rows; row += BN_ROWS)
        FN(add_rows)(x + row * stride, width, stride, 0, first, off, square, BN_ROWS);
    for (; row < rows; row++)
        FN(add_rows)(x + row * stride, width, stride, 0, first, off, square, 1);
    for (bn_index c = 0; c < width; c++)
        moments[c] = bn_corrected(first[c], off[c], square[c], (double)rows);
}

static inline bn_index FN(block_rows)(bn_index width)
{
    return bn_max(BN_BLOCK_ROWS, BN_BLOCK_ELEMENTS / width);
}

/* Moments of up to BN_COLUMNS columns: one block after the other is merged into those before. */
static void FN(column_moments)(const char *x_bytes, bn_index rows, bn_index width, bn_index stride,
                               bn_index ahead, bn_moments *moments)
{
    const STORE *x = (const STORE *)x_bytes;
    const bn_index step = BN_IS_DOUBLE ? FN(block_rows)(width) : BN_BLOCK_ROWS_ONCE;
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

/* The two sums of a block of up to BN_COLUMNS columns. Beyond the cache one row at a time would take
   0.9 times the time, but then the bits would tell the size of the cache. */
BN_INLINE void FN(block_sums)(const STORE *dy, const STORE *x, const STORE *y, bn_index rows,
                                  bn_index width, bn_index stride, bn_index ahead,
                                  const double *mean, double *sum_dy, double *sum_dy_x)
{
    double g_sum[BN_COLUMNS], gx_sum[BN_COLUMNS];
    for (bn_index c = 0; c < width; c++)
        g_sum[c] = gx_sum[c] = 0.0;
    bn_index row = 0;
    for (; row + BN_ROWS <= rows; row += BN_ROWS) {
        const bn_index at = row * stride;
        FN(add_product_rows)(dy + at, x + at, y ? y + at : NULL, width, stride, ahead, mean, g_sum,
                             gx_sum, BN_ROWS);
    }
    for (; row < rows; row++) {
        const bn_index at = row * stride;
        FN(add_product_rows)(dy + at, x + at, y ? y + at : NULL, width, stride, 0, mean, g_sum,
                             gx_sum, 1);
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
    const STORE *dy = (const STORE *)dy_bytes, *x = (const STORE *)x_bytes;
    const STORE *y = (const STORE *)y_bytes;
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
