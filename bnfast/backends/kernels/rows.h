/* Channels-first kernels. A tile is `runs` runs of `length` adjacent elements of one channel,
   `stride` elements apart:

       |<-length->|
       xxxxxxxxxxxx....other channels....xxxxxxxxxxxx....other channels....xxxxxxxxxxxx
       |<-------------stride------------>|

   Sums run in 16 lanes over the whole of each run's full steps; what is left at the runs' ends goes
   in turn to 16 lanes of its own, so that the main lanes stay in registers (a lane that is indexed by a
   variable would drag all of them to memory). BN_SIMD stands at the inner loops: without it gcc 12
   unrolls them first and then finds no vectors (a float32 pass for the squares took 0.31 ns an
   element with AVX2, and 0.09 with it). Needs REAL, FN, BN_IS_DOUBLE. */

static void FN(row_moments)(const char *x_bytes, bn_index runs, bn_index length, bn_index stride,
                            bn_moments *moments)
{
    const REAL *x = (const REAL *)x_bytes;
    const bn_index full = length - length % BN_LANES;
    const double count = (double)runs * (double)length;
    double lane[BN_LANES] = {0}, tail[BN_LANES] = {0};
    size_t slot = 0;
    for (bn_index run = 0; run < runs; run++) {
        const REAL *p = x + run * stride;
        for (bn_index i = 0; i < full; i += BN_LANES)
            BN_SIMD for (int k = 0; k < BN_LANES; k++)
                lane[k] += p[i + k];
        for (bn_index i = full; i < length; i++)
            tail[slot++ % BN_LANES] += p[i];
    }
    const double first = bn_total(lane, tail) / count;
    double off[BN_LANES] = {0}, off_tail[BN_LANES] = {0};
    double square[BN_LANES] = {0}, square_tail[BN_LANES] = {0};
    slot = 0;
    for (bn_index run = 0; run < runs; run++) {
        const REAL *p = x + run * stride;
        for (bn_index i = 0; i < full; i += BN_LANES)
            BN_SIMD for (int k = 0; k < BN_LANES; k++) {
                const double d = p[i + k] - first;
                off[k] += d;
                square[k] = FN(wide_mad)(d, d, square[k]);
            }
        for (bn_index i = full; i < length; i++, slot++) {
            const double d = p[i] - first;
            off_tail[slot % BN_LANES] += d;
            square_tail[slot % BN_LANES] = FN(wide_mad)(d, d, square_tail[slot % BN_LANES]);
        }
    }
    *moments = bn_corrected(first, bn_total(off, off_tail), bn_total(square, square_tail), count);
}

/* y = act((x - head) * scale + shift + residual) for i < n, in names of the place where it stands.
   The mean may have more digits than REAL: its head is subtracted, its tail is in the shift. The
   pragma states that no iteration reads what another writes: true of y == x and y == residual. */
#define BN_AFFINE_LOOPS(HEAD, SCALE, SHIFT)                                      \
    if (residual && relu)                                                        \
        BN_SIMD for (bn_index i = 0; i < n; i++) {                               \
            const REAL normal = FN(mad)(x[i] - (HEAD), SCALE, SHIFT);             \
            const REAL sum = normal + residual[i];                               \
            y[i] = sum < 0 ? 0 : sum;                                            \
        }                                                                        \
    else if (residual)                                                           \
        BN_SIMD for (bn_index i = 0; i < n; i++) {                               \
            const REAL normal = FN(mad)(x[i] - (HEAD), SCALE, SHIFT);             \
            y[i] = normal + residual[i];                                         \
        }                                                                        \
    else if (relu)                                                               \
        BN_SIMD for (bn_index i = 0; i < n; i++) {                               \
            const REAL normal = FN(mad)(x[i] - (HEAD), SCALE, SHIFT);             \
            y[i] = normal < 0 ? 0 : normal;                                      \
        }                                                                        \
    else                                                                         \
        BN_SIMD for (bn_index i = 0; i < n; i++)                                 \
            y[i] = FN(mad)(x[i] - (HEAD), SCALE, SHIFT);

static inline void FN(affine_run)(const REAL *x, const REAL *residual, REAL *y, bn_index n,
                                  REAL head, REAL scale, REAL shift, int relu)
{
    BN_AFFINE_LOOPS(head, scale, shift)
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
    return BN_IS_DOUBLE || (bn_fits(affine.mean) && bn_fits(affine.scale));
}

static inline REAL FN(affine_shift)(bn_affine affine)
{
    return (REAL)(affine.bias - (affine.mean - (REAL)affine.mean) * affine.scale);
}

static void FN(row_normalize)(const char *x_bytes, const char *residual_bytes, char *y_bytes,
                              bn_index runs, bn_index length, bn_index stride, bn_affine affine,
                              int relu)
{
    const REAL *x = (const REAL *)x_bytes, *residual = (const REAL *)residual_bytes;
    REAL *y = (REAL *)y_bytes;
    const REAL head = (REAL)affine.mean, scale = (REAL)affine.scale;
    const REAL shift = FN(affine_shift)(affine);
    const int fits = FN(affine_fits)(affine);
    for (bn_index run = 0; run < runs; run++) {
        const bn_index at = run * stride;
        const REAL *r = residual ? residual + at : NULL;
        if (fits)
            FN(affine_run)(x + at, r, y + at, length, head, scale, shift, relu);
        else
            for (bn_index i = 0; i < length; i++)
                y[at + i] = FN(affine_wide)(x[at + i], r ? r + i : NULL, affine, relu);
    }
}

/* The gradient behind the ReLU. Without one y is NULL, a constant of the loop it stands in. dy is
   read in any case: a load that hangs on y would keep the loop from being vectorised. */
static inline REAL FN(masked)(const REAL *dy, const REAL *y, bn_index i)
{
    const REAL g = dy[i];
    return !y || y[i] > 0 ? g : 0;
}

static inline void FN(sums)(const REAL *dy, const REAL *x, const REAL *y, bn_index runs,
                            bn_index length, bn_index stride, double mean, double *sum_dy,
                            double *sum_dy_x)
{
    const bn_index full = length - length % BN_LANES;
    double g_lane[BN_LANES] = {0}, g_tail[BN_LANES] = {0};
    double gx_lane[BN_LANES] = {0}, gx_tail[BN_LANES] = {0};
    size_t slot = 0;
    for (bn_index run = 0; run < runs; run++) {
        const bn_index at = run * stride;
        for (bn_index i = at; i < at + full; i += BN_LANES)
            BN_SIMD for (int k = 0; k < BN_LANES; k++) {
                const double g = FN(masked)(dy, y, i + k);
                g_lane[k] += g;
                gx_lane[k] = FN(wide_mad)(g, x[i + k] - mean, gx_lane[k]);
            }
        for (bn_index i = at + full; i < at + length; i++, slot++) {
            const double g = FN(masked)(dy, y, i);
            g_tail[slot % BN_LANES] += g;
            gx_tail[slot % BN_LANES] =
                FN(wide_mad)(g, x[i] - mean, gx_tail[slot % BN_LANES]);
        }
    }
    *sum_dy = bn_total(g_lane, g_tail);
    *sum_dy_x = bn_total(gx_lane, gx_tail);
}

static void FN(row_sums)(const char *dy_bytes, const char *x_bytes, const char *y_bytes,
                         bn_index runs, bn_index length, bn_index stride, double mean,
                         double *sum_dy, double *sum_dy_x)
{
    const REAL *dy = (const REAL *)dy_bytes, *x = (const REAL *)x_bytes;
    if (y_bytes)
        FN(sums)(dy, x, (const REAL *)y_bytes, runs, length, stride, mean, sum_dy, sum_dy_x);
    else
        FN(sums)(dy, x, NULL, runs, length, stride, mean, sum_dy, sum_dy_x);
}

/* dx = g * g_scale + ((x - head) * x_scale + shift) over one run. */
static inline void FN(gradient_run)(const REAL *dy, const REAL *x, const REAL *y, REAL *dx,
                                    REAL *dresidual, bn_index length, REAL head, REAL g_scale,
                                    REAL x_scale, REAL shift)
{
    if (dresidual)
        BN_SIMD for (bn_index i = 0; i < length; i++)
            dresidual[i] = FN(masked)(dy, y, i);
    if (x_scale == 0)
        BN_SIMD for (bn_index i = 0; i < length; i++)
            dx[i] = FN(mad)(FN(masked)(dy, y, i), g_scale, shift);
    else
        BN_SIMD for (bn_index i = 0; i < length; i++)
            dx[i] = FN(mad)(FN(masked)(dy, y, i), g_scale,
                            FN(mad)(x[i] - head, x_scale, shift));
}

static inline int FN(gradient_fits)(bn_gradient gradient)
{
    return BN_IS_DOUBLE || (bn_fits(gradient.mean) && bn_fits(gradient.g_scale) &&
                            bn_fits(gradient.x_scale) && bn_fits(gradient.shift));
}

static inline REAL FN(gradient_shift)(bn_gradient gradient)
{
    return (REAL)(gradient.shift - (gradient.mean - (REAL)gradient.mean) * gradient.x_scale);
}

static inline REAL FN(gradient_wide)(REAL g, REAL x, bn_gradient gradient)
{
    const double spread = gradient.x_scale == 0 ? 0 : (x - gradient.mean) * gradient.x_scale;
    return (REAL)(g * gradient.g_scale + (spread + gradient.shift));
}

static void FN(row_gradient)(const char *dy_bytes, const char *x_bytes, const char *y_bytes,
                             char *dx_bytes, char *dresidual_bytes, bn_index runs,
                             bn_index length, bn_index stride, bn_gradient gradient)
{
    const REAL *dy = (const REAL *)dy_bytes, *x = (const REAL *)x_bytes;
    const REAL *y = (const REAL *)y_bytes;
    REAL *dx = (REAL *)dx_bytes, *dresidual = (REAL *)dresidual_bytes;
    const REAL head = (REAL)gradient.mean, shift = FN(gradient_shift)(gradient);
    const REAL g_scale = (REAL)gradient.g_scale, x_scale = (REAL)gradient.x_scale;
    const int fits = FN(gradient_fits)(gradient);
    for (bn_index run = 0; run < runs; run++) {
        const bn_index at = run * stride;
        REAL *dr = dresidual ? dresidual + at : NULL;
        if (!fits)
            for (bn_index i = at; i < at + length; i++) {
                const REAL g = FN(masked)(dy, y, i);
                if (dresidual)
                    dresidual[i] = g;
                dx[i] = FN(gradient_wide)(g, x[i], gradient);
            }
        else if (y)
            FN(gradient_run)(dy + at, x + at, y + at, dx + at, dr, length, head, g_scale, x_scale,
                             shift);
        else
            FN(gradient_run)(dy + at, x + at, NULL, dx + at, dr, length, head, g_scale, x_scale,
                             shift);
    }
}
