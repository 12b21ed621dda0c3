/* Channels-first kernels. A tile is `runs` runs of `length` adjacent elements, `stride` apart:

       |<-length->|
       xxxxxxxxxxxx....other channels....xxxxxxxxxxxx....other channels....xxxxxxxxxxxx
       |<-------------stride------------>|

   Sums are taken over about BN_CHAIN elements at a time, a piece of a run or several short runs, in
   16 lanes, each of which takes 64 to 128 additions before it is emptied: float32 data at a large
   mean has few distinct deviations, whose squares round the same way each time, and an error that
   grows with the length of a chain must not find a long one. What is left at the end of a run is a
   step of 16 that overlaps the one before; the lanes that were counted already are multiplied by 0.
   Runs below 16 elements are gathered into one.

   What makes gcc 12 keep the lanes in vector registers: BN_SIMD at the inner loops, functions of
   their own, and other lanes for the ends of runs. Without them a float32 pass for the squares took
   0.31 and 0.15 ns an element; as it is 0.09 with AVX2 and 0.06 with AVX-512.
   Needs REAL, FN, BN_IS_DOUBLE. */

static inline bn_index FN(piece)(bn_index left) { return left < 2 * BN_CHAIN ? left : BN_CHAIN; }

/* Runs to take at a time, so that they have about BN_CHAIN elements. */
static inline bn_index FN(group)(bn_index length) { return bn_max(1, BN_CHAIN / bn_max(1, length)); }

/* Room for a group of short runs, behind 16 zeros: the overlapping step may begin in these. */
typedef struct {
    REAL zeros[BN_LANES], elements[BN_CHAIN];
} FN(short_runs);

static const REAL *FN(gather)(const REAL *x, bn_index runs, bn_index n, bn_index stride,
                              FN(short_runs) *gathered)
{
    REAL *to = gathered->elements;
    BN_ZERO(gathered->zeros);
    for (bn_index run = 0; run < runs; run++, x += stride)
        for (bn_index i = 0; i < n; i++)
            *to++ = x[i];
    return gathered->elements;
}

BN_NOINLINE static void FN(add)(const REAL *x, bn_index runs, bn_index n, bn_index stride,
                                double *sum)
{
    const bn_index rest = n % BN_LANES;
    double lane[BN_LANES], end[BN_LANES];
    BN_ZERO(lane);
    BN_ZERO(end);
    for (bn_index run = 0; run < runs; run++, x += stride) {
        for (bn_index i = 0; i < n - rest; i += BN_LANES)
            BN_SIMD for (int k = 0; k < BN_LANES; k++)
                lane[k] += x[i + k];
        if (rest)
            BN_SIMD for (int k = 0; k < BN_LANES; k++)
                end[k] += bn_keep[rest + k] * x[n - BN_LANES + k];
    }
    BN_SIMD for (int k = 0; k < BN_LANES; k++)
        sum[k] += lane[k] + end[k];
}

BN_NOINLINE static void FN(add_squares)(const REAL *x, bn_index runs, bn_index n, bn_index stride,
                                        bn_index ahead, double first, double *deviation,
                                        double *square)
{
    const bn_index rest = n % BN_LANES;
    double off[BN_LANES], off_end[BN_LANES], squares[BN_LANES], squares_end[BN_LANES];
    BN_ZERO(off);
    BN_ZERO(off_end);
    BN_ZERO(squares);
    BN_ZERO(squares_end);
    for (bn_index run = 0; run < runs; run++, x += stride) {
        for (bn_index i = 0; i < n - rest; i += BN_LANES) {
            if (ahead)
                BN_PREFETCH(x + i + ahead);
            BN_SIMD for (int k = 0; k < BN_LANES; k++) {
                const double d = x[i + k] - first;
                off[k] += d;
                squares[k] = FN(wide_mad)(d, d, squares[k]);
            }
        }
        if (rest)
            BN_SIMD for (int k = 0; k < BN_LANES; k++) {
                const double d = bn_keep[rest + k] * (x[n - BN_LANES + k] - first);
                off_end[k] += d;
                squares_end[k] = FN(wide_mad)(d, d, squares_end[k]);
            }
    }
    BN_SIMD for (int k = 0; k < BN_LANES; k++) {
        deviation[k] += off[k] + off_end[k];
        square[k] += squares[k] + squares_end[k];
    }
}

static inline double FN(total)(const REAL *x, bn_index runs, bn_index length, bn_index stride)
{
    const bn_index group = FN(group)(length);
    FN(short_runs) gathered;
    double sum[BN_LANES];
    BN_ZERO(sum);
    for (bn_index run = 0, n; run < runs; run += group)
        for (bn_index i = 0; i < length; i += n) {
            const REAL *p = x + run * stride + i;
            const bn_index some = bn_min(group, runs - run);
            n = FN(piece)(length - i);
            if (n >= BN_LANES)
                FN(add)(p, some, n, stride, sum);
            else
                FN(add)(FN(gather)(p, some, n, stride, &gathered), 1, some * n, 0, sum);
        }
    return bn_total(sum);
}

/* Sums of the deviations from a first mean and of their squares. For float64 that is the mean of
   the tile, which takes a pass of its own. For float32 the mean of its first elements will do: the
   deviations are exact in double, and the worst that one outlier among these can cost (10 bits, if
   it is the only one of a run of 1) leaves m2 within M2_RELATIVE_FLOAT32 of spec.py. */
static void FN(row_moments)(const char *x_bytes, bn_index runs, bn_index length, bn_index stride,
                            bn_index ahead, bn_moments *moments)
{
    const REAL *x = (const REAL *)x_bytes;
    const bn_index group = FN(group)(length);
    const bn_index sample_runs = BN_IS_DOUBLE ? runs : 1;
    const bn_index sample_length = BN_IS_DOUBLE ? length : bn_min(length, BN_LANES);
    const double first = FN(total)(x, sample_runs, sample_length, stride) /
                         ((double)sample_runs * (double)sample_length);
    FN(short_runs) gathered;
    double deviation[BN_LANES], square[BN_LANES];
    BN_ZERO(deviation);
    BN_ZERO(square);
    for (bn_index run = 0, n; run < runs; run += group)
        for (bn_index i = 0; i < length; i += n) {
            const REAL *p = x + run * stride + i;
            const bn_index some = bn_min(group, runs - run);
            n = FN(piece)(length - i);
            if (n >= BN_LANES)
                FN(add_squares)(p, some, n, stride, ahead, first, deviation, square);
            else
                FN(add_squares)(FN(gather)(p, some, n, stride, &gathered), 1, some * n, 0, 0, first,
                                deviation, square);
        }
    *moments = bn_corrected(first, bn_total(deviation), bn_total(square),
                            (double)runs * (double)length);
}

/* y = act((x - head) * scale + shift + residual). The mean may have more digits than REAL: its head
   is subtracted, its tail is in the shift. */
static inline REAL FN(affine)(REAL x, REAL residual, REAL head, REAL scale, REAL shift, int add,
                              int relu)
{
    const REAL normal = FN(mad)(x - head, scale, shift);
    const REAL sum = add ? normal + residual : normal;
    return relu && sum < 0 ? 0 : sum;
}

/* The same over one run, for constant `add` and `relu`. The end of a run that is no multiple of the
   lanes is done as one step of 16 that overlaps the last full one; its inputs are read first, since
   y may be x or residual. */
static inline void FN(affine_run_as)(const REAL *x, const REAL *residual, REAL *y, bn_index n,
                                     REAL head, REAL scale, REAL shift, const int add,
                                     const int relu)
{
    REAL last_x[BN_LANES], last_residual[BN_LANES] = {0};
    const int overlaps = n > BN_LANES && n % BN_LANES;
    const bn_index end = overlaps ? n - n % BN_LANES : n;
    if (overlaps) {
        memcpy(last_x, x + n - BN_LANES, sizeof last_x);
        if (add)
            memcpy(last_residual, residual + n - BN_LANES, sizeof last_residual);
    }
    BN_SIMD for (bn_index i = 0; i < end; i++)
        y[i] = FN(affine)(x[i], add ? residual[i] : 0, head, scale, shift, add, relu);
    if (overlaps)
        BN_SIMD for (int k = 0; k < BN_LANES; k++)
            y[n - BN_LANES + k] =
                FN(affine)(last_x[k], last_residual[k], head, scale, shift, add, relu);
}

static inline void FN(affine_run)(const REAL *x, const REAL *residual, REAL *y, bn_index n,
                                  REAL head, REAL scale, REAL shift, int relu)
{
    if (residual && relu)
        FN(affine_run_as)(x, residual, y, n, head, scale, shift, 1, 1);
    else if (residual)
        FN(affine_run_as)(x, residual, y, n, head, scale, shift, 1, 0);
    else if (relu)
        FN(affine_run_as)(x, NULL, y, n, head, scale, shift, 0, 1);
    else
        FN(affine_run_as)(x, NULL, y, n, head, scale, shift, 0, 0);
}

/* One element in double, rounded where the definition rounds: for channels whose numbers do not
   fit REAL. */
static inline REAL FN(affine_wide)(REAL x, const REAL *residual, bn_affine affine, int relu)
{
    REAL y = (REAL)((x - affine.mean) * affine.scale + affine.bias);
    if (residual)
        y += *residual;
    return relu && y < 0 ? 0 : y;
}

static inline int FN(affine_fits)(bn_affine affine)
{
    return BN_IS_DOUBLE || (bn_fits(affine.mean) && bn_fits(affine.scale) &&
                            !(fabs(affine.bias) > 0x1p100));
}

/* What REAL leaves of a mean; 0 for float64, where infinity - infinity would be NaN. */
static inline double FN(tail)(double mean) { return BN_IS_DOUBLE ? 0 : mean - (REAL)mean; }

static inline REAL FN(affine_shift)(bn_affine affine)
{
    const double tail = FN(tail)(affine.mean);
    return (REAL)(tail == 0 ? affine.bias : affine.bias - tail * affine.scale);
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

/* The first run belongs to `channel`, the next to the one after it, round and round. */
static void FN(row_normalize)(const char *x_bytes, const char *residual_bytes, char *y_bytes,
                              bn_index runs, bn_index length, bn_index stride,
                              const bn_affine *affine, const char *packed, bn_index channels,
                              bn_index channel, int relu)
{
    const REAL *x = (const REAL *)x_bytes, *residual = (const REAL *)residual_bytes;
    REAL *y = (REAL *)y_bytes;
    const REAL *head = (const REAL *)packed, *scale = head + channels, *shift = scale + channels;
    const int fits = shift[channels] != 0;
    for (bn_index run = 0; run < runs; run++) {
        const bn_index at = run * stride;
        const REAL *r = residual ? residual + at : NULL;
        if (fits || FN(affine_fits)(affine[channel]))
            FN(affine_run)(x + at, r, y + at, length, head[channel], scale[channel],
                           shift[channel], relu);
        else
            for (bn_index i = 0; i < length; i++)
                y[at + i] = FN(affine_wide)(x[at + i], r ? r + i : NULL, affine[channel], relu);
        if (++channel == channels)
            channel = 0;
    }
}

/* The gradient behind the ReLU. Without one y is NULL, a constant of the loop it stands in. dy is
   read in any case: a load that hangs on y would keep the loop from being vectorised. */
static inline REAL FN(masked)(const REAL *dy, const REAL *y, bn_index i)
{
    const REAL g = dy[i];
    return !y || y[i] > 0 ? g : 0;
}

static inline void FN(add_products)(const REAL *dy, const REAL *x, const REAL *y, bn_index runs,
                                    bn_index n, bn_index stride, bn_index ahead, double mean,
                                    double *sum_dy, double *sum_dy_x)
{
    const bn_index rest = n % BN_LANES;
    double g_lane[BN_LANES], g_end[BN_LANES], gx_lane[BN_LANES], gx_end[BN_LANES];
    BN_ZERO(g_lane);
    BN_ZERO(g_end);
    BN_ZERO(gx_lane);
    BN_ZERO(gx_end);
    for (bn_index at = 0; at < runs * stride; at += stride) {
        const bn_index last = at + n - BN_LANES;
        for (bn_index i = at; i < at + n - rest; i += BN_LANES) {
            if (ahead) {
                BN_PREFETCH(dy + i + ahead);
                BN_PREFETCH(x + i + ahead);
            }
            BN_SIMD for (int k = 0; k < BN_LANES; k++) {
                const double g = FN(masked)(dy, y, i + k);
                g_lane[k] += g;
                gx_lane[k] = FN(wide_mad)(g, x[i + k] - mean, gx_lane[k]);
            }
        }
        if (rest)
            BN_SIMD for (int k = 0; k < BN_LANES; k++) {
                const double g = bn_keep[rest + k] * FN(masked)(dy, y, last + k);
                g_end[k] += g;
                gx_end[k] = FN(wide_mad)(g, x[last + k] - mean, gx_end[k]);
            }
    }
    BN_SIMD for (int k = 0; k < BN_LANES; k++) {
        sum_dy[k] += g_lane[k] + g_end[k];
        sum_dy_x[k] += gx_lane[k] + gx_end[k];
    }
}

BN_NOINLINE static void FN(add_plain)(const REAL *dy, const REAL *x, bn_index runs, bn_index n,
                                      bn_index stride, bn_index ahead, double mean, double *sum_dy,
                                      double *sum_dy_x)
{
    FN(add_products)(dy, x, NULL, runs, n, stride, ahead, mean, sum_dy, sum_dy_x);
}

BN_NOINLINE static void FN(add_masked)(const REAL *dy, const REAL *x, const REAL *y, bn_index runs,
                                       bn_index n, bn_index stride, bn_index ahead, double mean,
                                       double *sum_dy, double *sum_dy_x)
{
    FN(add_products)(dy, x, y, runs, n, stride, ahead, mean, sum_dy, sum_dy_x);
}

static inline void FN(add_short)(const REAL *dy, const REAL *x, const REAL *y, bn_index runs,
                                 bn_index n, bn_index stride, double mean, double *sum_dy,
                                 double *sum_dy_x)
{
    FN(short_runs) dy_runs, x_runs, y_runs;
    dy = FN(gather)(dy, runs, n, stride, &dy_runs);
    x = FN(gather)(x, runs, n, stride, &x_runs);
    if (y)
        FN(add_masked)(dy, x, FN(gather)(y, runs, n, stride, &y_runs), 1, runs * n, 1, 0, mean,
                       sum_dy, sum_dy_x);
    else
        FN(add_plain)(dy, x, 1, runs * n, 1, 0, mean, sum_dy, sum_dy_x);
}

static void FN(row_sums)(const char *dy_bytes, const char *x_bytes, const char *y_bytes,
                         bn_index runs, bn_index length, bn_index stride, bn_index ahead,
                         double mean, double *sum_dy, double *sum_dy_x)
{
    const REAL *dy = (const REAL *)dy_bytes, *x = (const REAL *)x_bytes;
    const REAL *y = (const REAL *)y_bytes;
    const bn_index group = FN(group)(length);
    double g_sum[BN_LANES], gx_sum[BN_LANES];
    BN_ZERO(g_sum);
    BN_ZERO(gx_sum);
    for (bn_index run = 0, n; run < runs; run += group)
        for (bn_index i = 0; i < length; i += n) {
            const bn_index at = run * stride + i, some = bn_min(group, runs - run);
            n = FN(piece)(length - i);
            if (n < BN_LANES)
                FN(add_short)(dy + at, x + at, y ? y + at : NULL, some, n, stride, mean, g_sum,
                              gx_sum);
            else if (y)
                FN(add_masked)(dy + at, x + at, y + at, some, n, stride, ahead, mean, g_sum,
                               gx_sum);
            else
                FN(add_plain)(dy + at, x + at, some, n, stride, ahead, mean, g_sum, gx_sum);
        }
    *sum_dy = bn_total(g_sum);
    *sum_dy_x = bn_total(gx_sum);
}

/* dx = g * g_scale + ((x - head) * x_scale + shift). Where x_scale is 0, as in eval mode, x does
   not matter, whatever it holds. */
static inline REAL FN(gradient)(REAL g, REAL x, REAL head, REAL g_scale, REAL x_scale, REAL shift)
{
    const REAL spread = FN(mad)(x - head, x_scale, shift);
    return FN(mad)(g, g_scale, x_scale == 0 ? shift : spread);
}

/* The same over one run, with the end as in affine_run_as: dx may be dy. */
static inline void FN(gradient_run)(const REAL *dy, const REAL *x, const REAL *y, REAL *dx,
                                    REAL *dresidual, bn_index n, REAL head, REAL g_scale,
                                    REAL x_scale, REAL shift)
{
    REAL last_g[BN_LANES];
    const int overlaps = n > BN_LANES && n % BN_LANES;
    const bn_index end = overlaps ? n - n % BN_LANES : n, last = n - BN_LANES;
    if (overlaps)
        BN_SIMD for (int k = 0; k < BN_LANES; k++)
            last_g[k] = FN(masked)(dy, y, last + k);
    if (dresidual)
        BN_SIMD for (bn_index i = 0; i < n; i++)
            dresidual[i] = FN(masked)(dy, y, i);
    if (x_scale == 0)
        BN_SIMD for (bn_index i = 0; i < end; i++)
            dx[i] = FN(mad)(FN(masked)(dy, y, i), g_scale, shift);
    else
        BN_SIMD for (bn_index i = 0; i < end; i++)
            dx[i] = FN(mad)(FN(masked)(dy, y, i), g_scale, FN(mad)(x[i] - head, x_scale, shift));
    if (overlaps)
        BN_SIMD for (int k = 0; k < BN_LANES; k++)
            dx[last + k] =
                FN(gradient)(last_g[k], x[last + k], head, g_scale, x_scale, shift);
}

static inline int FN(gradient_fits)(bn_gradient gradient)
{
    return BN_IS_DOUBLE || (bn_fits(gradient.mean) && bn_fits(gradient.g_scale) &&
                            bn_fits(gradient.x_scale) && bn_fits(gradient.shift));
}

static inline REAL FN(gradient_shift)(bn_gradient gradient)
{
    const double tail = FN(tail)(gradient.mean);
    return (REAL)(tail == 0 || gradient.x_scale == 0 ? gradient.shift
                                                     : gradient.shift - tail * gradient.x_scale);
}

static inline REAL FN(gradient_wide)(REAL g, REAL x, bn_gradient gradient)
{
    const double spread = gradient.x_scale == 0 ? 0 : (x - gradient.mean) * gradient.x_scale;
    return (REAL)(g * gradient.g_scale + (spread + gradient.shift));
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

static void FN(row_gradient)(const char *dy_bytes, const char *x_bytes, const char *y_bytes,
                             char *dx_bytes, char *dresidual_bytes, bn_index runs,
                             bn_index length, bn_index stride, const bn_gradient *gradient,
                             const char *packed, bn_index channels, bn_index channel)
{
    const REAL *dy = (const REAL *)dy_bytes, *x = (const REAL *)x_bytes;
    const REAL *y = (const REAL *)y_bytes;
    REAL *dx = (REAL *)dx_bytes, *dresidual = (REAL *)dresidual_bytes;
    const REAL *head = (const REAL *)packed, *g_scale = head + channels;
    const REAL *x_scale = g_scale + channels, *shift = x_scale + channels;
    const int fits = shift[channels] != 0;
    for (bn_index run = 0; run < runs; run++) {
        const bn_index at = run * stride, c = channel;
        REAL *dr = dresidual ? dresidual + at : NULL;
        if (!fits && !FN(gradient_fits)(gradient[c]))
            for (bn_index i = at; i < at + length; i++) {
                const REAL g = FN(masked)(dy, y, i);
                if (dresidual)
                    dresidual[i] = g;
                dx[i] = FN(gradient_wide)(g, x[i], gradient[c]);
            }
        else if (y)
            FN(gradient_run)(dy + at, x + at, y + at, dx + at, dr, length, head[c], g_scale[c],
                             x_scale[c], shift[c]);
        else
            FN(gradient_run)(dy + at, x + at, NULL, dx + at, dr, length, head[c], g_scale[c],
                             x_scale[c], shift[c]);
        if (++channel == channels)
            channel = 0;
    }
}
