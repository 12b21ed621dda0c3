/* Channels-first reductions. A tile is `runs` runs of `length` adjacent elements of each of several
   adjacent channels:

       |<-length->|
       aaaaaaaaaaaabbbbbbbbbbbb....other channels....aaaaaaaaaaaabbbbbbbbbbbb....other channels....
       |<-------------------stride------------------>|

   It is read in the order of memory: all channels of one run, then of the next. A run, or a piece
   of about BN_CHAIN elements of a long one, is summed in 16 lanes, which are then added to those of
   its channel: float32 data at a large mean has few distinct deviations, whose squares round the
   same way each time, and an error that grows with the length of a chain must not find a long one.
   What is left at the end of a run is a step of 16 that overlaps the one before. Runs below 16
   elements are gathered into one.  Needs REAL, FN, BN_IS_DOUBLE, vectors.h. */

static inline bn_index FN(piece)(bn_index left) { return left < 2 * BN_CHAIN ? left : BN_CHAIN; }

/* Short runs are gathered behind 16 zeros, in which the overlapping step may begin. */
typedef struct {
    REAL zeros[BN_LANES], elements[BN_CHAIN];
} FN(short_runs);

static const REAL *FN(gather)(const REAL *x, bn_index runs, bn_index n, bn_index stride,
                              FN(short_runs) *gathered)
{
    REAL *to = gathered->elements;
    memset(gathered->zeros, 0, sizeof gathered->zeros);
    for (bn_index run = 0; run < runs; run++, x += stride)
        for (bn_index i = 0; i < n; i++)
            *to++ = x[i];
    return gathered->elements;
}

/* What is kept of each channel while a tile is read: what is subtracted from its elements, and two
   sums in lanes. */
typedef struct {
    _Alignas(64) double a[BN_LANES], b[BN_LANES], first;
} FN(channel);

/* The sum of n elements, 16 or more, in lanes. */
BN_NOINLINE static void FN(add)(const REAL *x, bn_index n, double *sum)
{
    const bn_index rest = n % BN_LANES;
    FN(lanes) total = {0};
#define BN_ONE(i, k) total.part[k] += FN(load)(x + (i) + (k) * FN(WIDTH))
    BN_STEP_THROUGH(n, BN_ONE);
#undef BN_ONE
    if (rest)
        BN_EACH(k, 1)
            total.part[k] += FN(fresh)(FN(load)(x + n - BN_LANES + k * FN(WIDTH)), rest, k);
    FN(add_lanes)(sum, total);
}

/* The sums of the deviations from the channel's first value (a), and of their squares (b). */
BN_NOINLINE static void FN(add_squares)(const REAL *x, bn_index n, bn_index ahead, FN(channel) *to)
{
    const bn_index rest = n % BN_LANES;
    const FN(wide) first = FN(spread)(to->first);
    FN(lanes) off = {0}, squares = {0};
#define BN_ONE(i, k)                                                                               \
    do {                                                                                           \
        const REAL *const at = x + (i) + (k) * FN(WIDTH);                                          \
        const FN(wide) d = FN(load)(at) - first;                                                   \
        off.part[k] += d;                                                                          \
        squares.part[k] = FN(wide_mad_each)(d, d, squares.part[k]);                                   \
        if (ahead && (k) % FN(PER_LINE) == 0)                                                      \
            BN_PREFETCH(at + ahead);                                                               \
    } while (0)
    BN_STEP_THROUGH(n, BN_ONE);
#undef BN_ONE
    if (rest)
        BN_EACH(k, 1) {
            const FN(wide) d =
                FN(fresh)(FN(load)(x + n - BN_LANES + k * FN(WIDTH)) - first, rest, k);
            off.part[k] += d;
            squares.part[k] = FN(wide_mad_each)(d, d, squares.part[k]);
        }
    FN(add_lanes)(to->a, off);
    FN(add_lanes)(to->b, squares);
}

/* The sums of g (a) and of g * (x - first) (b), g being dy where y is NULL or positive. */
static inline void FN(add_products)(const REAL *dy, const REAL *x, const REAL *y, bn_index n,
                                    bn_index ahead, FN(channel) *to)
{
    const bn_index rest = n % BN_LANES;
    const FN(wide) first = FN(spread)(to->first);
    FN(lanes) g_sum = {0}, gx_sum = {0};
#define BN_ONE(i, k)                                                                               \
    do {                                                                                           \
        const bn_index at = (i) + (k) * FN(WIDTH);                                                 \
        const FN(wide) g = y ? FN(load_masked)(dy + at, y + at) : FN(load)(dy + at);               \
        g_sum.part[k] += g;                                                                        \
        gx_sum.part[k] = FN(wide_mad_each)(g, FN(load)(x + at) - first, gx_sum.part[k]);              \
        if (ahead && (k) % FN(PER_LINE) == 0) {                                                    \
            BN_PREFETCH(dy + at + ahead);                                                          \
            BN_PREFETCH(x + at + ahead);                                                           \
        }                                                                                          \
    } while (0)
    BN_STEP_THROUGH(n, BN_ONE);
#undef BN_ONE
    if (rest)
        BN_EACH(k, 1) {
            const bn_index at = n - BN_LANES + k * FN(WIDTH);
            const FN(wide) g =
                FN(fresh)(y ? FN(load_masked)(dy + at, y + at) : FN(load)(dy + at), rest, k);
            g_sum.part[k] += g;
            gx_sum.part[k] = FN(wide_mad_each)(g, FN(load)(x + at) - first, gx_sum.part[k]);
        }
    FN(add_lanes)(to->a, g_sum);
    FN(add_lanes)(to->b, gx_sum);
}

BN_NOINLINE static void FN(add_plain)(const REAL *dy, const REAL *x, bn_index n, bn_index ahead,
                                      FN(channel) *to)
{
    FN(add_products)(dy, x, NULL, n, ahead, to);
}

BN_NOINLINE static void FN(add_masked)(const REAL *dy, const REAL *x, const REAL *y, bn_index n,
                                       bn_index ahead, FN(channel) *to)
{
    FN(add_products)(dy, x, y, n, ahead, to);
}

/* The mean of the first elements of a channel, a guess that the deviations will correct; of all of
   them for float64, whose deviations from a guess would round. */
static inline double FN(first_mean)(const REAL *x, bn_index runs, bn_index length, bn_index stride)
{
    FN(short_runs) gathered;
    double sum[BN_LANES];
    BN_ZERO(sum);
    if (!BN_IS_DOUBLE) {
        runs = 1;
        length = bn_min(length, BN_LANES);
    }
    if (length < BN_LANES)
        for (bn_index run = 0, some; run < runs; run += some) {
            some = bn_min(BN_CHAIN / length, runs - run);
            FN(add)(FN(gather)(x + run * stride, some, length, stride, &gathered), some * length,
                    sum);
        }
    else
        for (bn_index run = 0; run < runs; run++)
            for (bn_index i = 0, n; i < length; i += n)
                FN(add)(x + run * stride + i, n = FN(piece)(length - i), sum);
    return bn_total(sum) / ((double)runs * (double)length);
}

static inline void FN(open_channels)(FN(channel) *channel, bn_index channels)
{
    for (bn_index c = 0; c < channels; c++) {
        BN_ZERO(channel[c].a);
        BN_ZERO(channel[c].b);
    }
}

/* Moments of a tile of up to BN_GROUP channels. */
static void FN(row_moments)(const char *x_bytes, bn_tile tile, bn_index ahead, bn_moments *moments)
{
    const REAL *x = (const REAL *)x_bytes;
    const bn_index some = tile.length < BN_LANES ? bn_min(tile.runs, BN_CHAIN / tile.length) : 1;
    const double count = (double)tile.runs * (double)tile.length;
    FN(channel) channel[BN_GROUP];
    FN(short_runs) gathered;
    FN(open_channels)(channel, tile.channels);
    for (bn_index c = 0; c < tile.channels; c++)
        channel[c].first = FN(first_mean)(x + c * tile.apart, tile.runs, tile.length, tile.stride);
    for (bn_index run = 0; run < tile.runs; run += some)
        for (bn_index c = 0; c < tile.channels; c++) {
            const REAL *p = x + run * tile.stride + c * tile.apart;
            if (tile.length < BN_LANES) {
                const bn_index runs = bn_min(some, tile.runs - run);
                FN(gather)(p, runs, tile.length, tile.stride, &gathered);
                FN(add_squares)(gathered.elements, runs * tile.length, 0, channel + c);
                continue;
            }
            for (bn_index i = 0, n; i < tile.length; i += n)
                FN(add_squares)(p + i, n = FN(piece)(tile.length - i), ahead, channel + c);
        }
    for (bn_index c = 0; c < tile.channels; c++)
        moments[c] = bn_corrected(channel[c].first, bn_total(channel[c].a),
                                  bn_total(channel[c].b), count);
}

static inline void FN(add_run)(const REAL *dy, const REAL *x, const REAL *y, bn_index n,
                               bn_index ahead, FN(channel) *to)
{
    if (y)
        FN(add_masked)(dy, x, y, n, ahead, to);
    else
        FN(add_plain)(dy, x, n, ahead, to);
}

/* The sums of the backward pass over a tile, as in row_moments. */
static void FN(row_sums)(const char *dy_bytes, const char *x_bytes, const char *y_bytes,
                         bn_tile tile, bn_index ahead, const double *mean, bn_sums *sums)
{
    const REAL *dy = (const REAL *)dy_bytes, *x = (const REAL *)x_bytes;
    const REAL *y = (const REAL *)y_bytes;
    const bn_index some = tile.length < BN_LANES ? bn_min(tile.runs, BN_CHAIN / tile.length) : 1;
    FN(channel) channel[BN_GROUP];
    FN(short_runs) dy_runs, x_runs, y_runs;
    FN(open_channels)(channel, tile.channels);
    for (bn_index c = 0; c < tile.channels; c++)
        channel[c].first = mean[c];
    for (bn_index run = 0; run < tile.runs; run += some)
        for (bn_index c = 0; c < tile.channels; c++) {
            const bn_index at = run * tile.stride + c * tile.apart;
            if (tile.length < BN_LANES) {
                const bn_index runs = bn_min(some, tile.runs - run);
                FN(gather)(dy + at, runs, tile.length, tile.stride, &dy_runs);
                FN(gather)(x + at, runs, tile.length, tile.stride, &x_runs);
                if (y)
                    FN(gather)(y + at, runs, tile.length, tile.stride, &y_runs);
                FN(add_run)(dy_runs.elements, x_runs.elements, y ? y_runs.elements : NULL,
                            runs * tile.length, 0, channel + c);
                continue;
            }
            for (bn_index i = at, n; i < at + tile.length; i += n)
                FN(add_run)(dy + i, x + i, y ? y + i : NULL,
                            n = FN(piece)(at + tile.length - i), ahead, channel + c);
        }
    for (bn_index c = 0; c < tile.channels; c++) {
        sums[c].dy = bn_total(channel[c].a);
        sums[c].dy_x = bn_total(channel[c].b);
    }
}
