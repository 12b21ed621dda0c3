/* Channels-first reductions. A tile is `runs` runs of `length` adjacent elements of each of several
   adjacent channels:

       |<-length->|
       aaaaaaaaaaaabbbbbbbbbbbb....other channels....aaaaaaaaaaaabbbbbbbbbbbb....other channels....
       |<-------------------stride------------------>|

   It is read nearly in the order of memory: all channels of one run, or of a few short ones, then
   of the next. A run, or a piece of about BN_CHAIN elements of a long one, is summed in 16 lanes,
   which are then added to those of its channel: float32 data at a large mean has few distinct
   deviations, whose squares round the same way each time, and an error that grows with the length
   of a chain must not find a long one. What is left at the end of a run is a step of 16 that
   overlaps the one before. Runs below 16 elements are gathered into one.  Needs REAL, STORE, FN,
   BN_IS_DOUBLE, vectors.h. */

static inline bn_index FN(piece)(bn_index left) { return left < 2 * BN_CHAIN ? left : BN_CHAIN; }

/* Short runs are gathered behind 16 zeros, in which the overlapping step may begin. */
typedef struct {
    STORE room[BN_LANES + BN_CHAIN];
} FN(short_runs);

static const STORE *FN(gather)(const STORE *x, bn_index runs, bn_index n, bn_index stride,
                              FN(short_runs) *gathered)
{
    STORE *const elements = gathered->room + BN_LANES, *to = elements;
    memset(gathered->room, 0, BN_LANES * sizeof(STORE));
    for (bn_index run = 0; run < runs; run++, x += stride)
        for (bn_index i = 0; i < n; i++)
            *to++ = x[i];
    return elements;
}

/* What is kept of each channel while a tile is read: what is subtracted from its elements, and two
   sums in lanes. */
typedef struct {
    _Alignas(64) double a[BN_LANES], b[BN_LANES], first;
} FN(channel);

#if BN_IS_DOUBLE
/* The sum of n elements, 16 or more, in lanes. */
BN_NOINLINE static void FN(add)(const STORE *x, bn_index n, double *sum)
{
    const bn_index rest = n % BN_LANES;
    FN(lanes) total = {0};
#define BN_ONE(i, k) total.part[k] += FN(load)(x + (i) + (k) * FN(WIDTH))
    BN_STEP_THROUGH(n, BN_ONE);
#undef BN_ONE
    BN_EACH(k, 1)
        if (FN(has_fresh)(rest, k))
            total.part[FN(REST) + k] +=
                FN(fresh)(FN(load)(x + n - BN_LANES + k * FN(WIDTH)), rest, k);
    FN(add_lanes)(sum, total);
}
#endif

/* The sums of the deviations from the channel's first value (a), and of their squares (b). */
BN_NOINLINE static void FN(add_squares)(const STORE *x, bn_index runs, bn_index n, bn_index stride,
                                        bn_index ahead, FN(channel) *to)
{
    const bn_index rest = n % BN_LANES;
    const FN(wide) first = FN(spread)(to->first);
    FN(lanes) off = {0}, squares = {0};
    for (bn_index run = 0; run < runs; run++, x += stride) {
#define BN_ONE(i, k)                                                                               \
    do {                                                                                           \
        const FN(wide) d = FN(plus)(FN(load_part)(x + (i), k), -1, first);                         \
        off.part[k] = FN(plus)(off.part[k], 1, d);                                                 \
        squares.part[k] = FN(wide_mad_each)(d, d, squares.part[k]);                                \
        if (ahead && (k) % FN(PER_LINE) == 0)                                                      \
            BN_PREFETCH(x + (i) + (k) * FN(WIDTH) + ahead);                                        \
    } while (0)
        BN_STEP_THROUGH(n, BN_ONE);
#undef BN_ONE
        BN_EACH(k, 1)
            if (FN(has_fresh)(rest, k)) {
                const FN(wide) d =
                    FN(fresh)(FN(load)(x + n - BN_LANES + k * FN(WIDTH)) - first, rest, k);
                off.part[FN(REST) + k] += d;
                squares.part[FN(REST) + k] = FN(wide_mad_each)(d, d, squares.part[FN(REST) + k]);
            }
    }
    FN(add_lanes)(to->a, off);
    FN(add_lanes)(to->b, squares);
}

/* The sums of g (a) and of g * (x - first) (b), g being dy where y is NULL or positive. */
BN_INLINE void FN(add_products)(const STORE *dy, const STORE *x, const STORE *y, bn_index runs,
                                    bn_index n, bn_index stride, bn_index ahead, FN(channel) *to)
{
    const bn_index rest = n % BN_LANES;
    const FN(wide) first = FN(spread)(to->first);
    FN(lanes) g_sum = {0}, gx_sum = {0};
    for (bn_index from = 0; from < runs * stride; from += stride) {
#define BN_ONE(i, k)                                                                               \
    do {                                                                                           \
        const bn_index at = from + (i);                                                            \
        const FN(wide) g =                                                                         \
            y ? FN(load_part_masked)(dy + at, y + at, k) : FN(load_part)(dy + at, k);              \
        g_sum.part[k] += g;                                                                        \
        gx_sum.part[k] = FN(wide_mad_each)(g, FN(load_part)(x + at, k) - first, gx_sum.part[k]);   \
        if (ahead && (k) % FN(PER_LINE) == 0) {                                                    \
            BN_PREFETCH(dy + at + (k) * FN(WIDTH) + ahead);                                        \
            BN_PREFETCH(x + at + (k) * FN(WIDTH) + ahead);                                         \
        }                                                                                          \
    } while (0)
        BN_STEP_THROUGH(n, BN_ONE);
#undef BN_ONE
        BN_EACH(k, 1)
            if (FN(has_fresh)(rest, k)) {
                const bn_index at = from + n - BN_LANES + k * FN(WIDTH);
                const FN(wide) g =
                    FN(fresh)(y ? FN(load_masked)(dy + at, y + at) : FN(load)(dy + at), rest, k);
                g_sum.part[FN(REST) + k] += g;
                gx_sum.part[FN(REST) + k] =
                    FN(wide_mad_each)(g, FN(load)(x + at) - first, gx_sum.part[FN(REST) + k]);
            }
    }
    FN(add_lanes)(to->a, g_sum);
    FN(add_lanes)(to->b, gx_sum);
}

BN_NOINLINE static void FN(add_plain)(const STORE *dy, const STORE *x, bn_index runs, bn_index n,
                                      bn_index stride, bn_index ahead, FN(channel) *to)
{
    if (ahead)
        FN(add_products)(dy, x, NULL, runs, n, stride, ahead, to);
    else
        FN(add_products)(dy, x, NULL, runs, n, stride, 0, to);
}

BN_NOINLINE static void FN(add_masked)(const STORE *dy, const STORE *x, const STORE *y, bn_index runs,
                                       bn_index n, bn_index stride, bn_index ahead,
                                       FN(channel) *to)
{
    FN(add_products)(dy, x, y, runs, n, stride, ahead, to);
}

/* About what the moments of a tile are taken. For float64 its mean, since deviations from a guess
   would round. Else the mean of its first elements, rounded to float32: deviations from a float32
   are exact in float64, and so are their squares where the mean is not near 0. What an outlier among
   the first costs (10 bits) leaves m2 within M2_RELATIVE_FLOAT32 of bnfast.spec. */
static inline double FN(first_mean)(const STORE *x, bn_index runs, bn_index length, bn_index stride)
{
    double sum[BN_LANES];
    BN_ZERO(sum);
#if BN_IS_DOUBLE
    FN(short_runs) gathered;
    for (bn_index run = 0, some; run < runs; run += some) {
        some = length < BN_LANES ? bn_min(BN_CHAIN / length, runs - run) : 1;
        if (length < BN_LANES)
            FN(add)(FN(gather)(x + run * stride, some, length, stride, &gathered), some * length,
                    sum);
        else
            for (bn_index i = 0, n; i < length; i += n)
                FN(add)(x + run * stride + i, n = FN(piece)(length - i), sum);
    }
    return FN(total)(sum) / ((double)runs * (double)length);
#else
    const bn_index n = bn_min(length, BN_LANES), some = bn_min(runs, bn_ceil(BN_LANES, n));
    if (n == BN_LANES)
        BN_EACH(k, 1) FN(add_vector)(sum + k * FN(WIDTH), FN(load)(x + k * FN(WIDTH)));
    else
        for (bn_index run = 0; run < some; run++)
            for (bn_index i = 0; i < n; i++)
                sum[i] += FN(raise_one)(x[run * stride + i]);
    return (double)(REAL)(FN(total)(sum) / (double)(some * n));
#endif
}

static inline void FN(open_channels)(FN(channel) *channel, bn_index channels)
{
    for (bn_index c = 0; c < channels; c++) {
        BN_ZERO(channel[c].a);
        BN_ZERO(channel[c].b);
    }
}

/* Runs to take at a time: those that are gathered, or a few short ones, so that emptying the lanes
   stays a small share of the work. */
static inline bn_index FN(runs_at_once)(bn_tile tile)
{
    return tile.length < BN_LANES ? BN_CHAIN / tile.length : bn_runs(tile.length);
}

/* Moments of a tile of up to BN_GROUP channels. */
static void FN(row_moments)(const char *x_bytes, bn_tile tile, bn_index ahead, bn_moments *moments)
{
    const STORE *x = (const STORE *)x_bytes;
    const double count = (double)tile.runs * (double)tile.length;
    FN(channel) channel[BN_GROUP];
    FN(short_runs) gathered;
    FN(open_channels)(channel, tile.channels);
    for (bn_index c = 0; c < tile.channels; c++)
        channel[c].first = FN(first_mean)(x + c * tile.apart, tile.runs, tile.length, tile.stride);
    for (bn_index run = 0, runs; run < tile.runs; run += runs) {
        runs = bn_min(FN(runs_at_once)(tile), tile.runs - run);
        for (bn_index c = 0; c < tile.channels; c++) {
            const STORE *p = x + run * tile.stride + c * tile.apart;
            if (tile.length < BN_LANES)
                FN(add_squares)(FN(gather)(p, runs, tile.length, tile.stride, &gathered), 1,
                                runs * tile.length, 0, 0, channel + c);
            else
                for (bn_index i = 0, n; i < tile.length; i += n)
                    FN(add_squares)(p + i, runs, n = FN(piece)(tile.length - i), tile.stride, ahead,
                                    channel + c);
        }
    }
    for (bn_index c = 0; c < tile.channels; c++)
        moments[c] = bn_corrected(channel[c].first, FN(total)(channel[c].a),
                                  FN(total)(channel[c].b), count);
}

static inline void FN(add_runs)(const STORE *dy, const STORE *x, const STORE *y, bn_index runs,
                                bn_index n, bn_index stride, bn_index ahead, FN(channel) *to)
{
    if (y)
        FN(add_masked)(dy, x, y, runs, n, stride, ahead, to);
    else
        FN(add_plain)(dy, x, runs, n, stride, ahead, to);
}

/* The sums of the backward pass over a tile, as in row_moments. */
static void FN(row_sums)(const char *dy_bytes, const char *x_bytes, const char *y_bytes,
                         bn_tile tile, bn_index ahead, const double *mean, bn_sums *sums)
{
    const STORE *dy = (const STORE *)dy_bytes, *x = (const STORE *)x_bytes;
    const STORE *y = (const STORE *)y_bytes;
    FN(channel) channel[BN_GROUP];
    FN(short_runs) dy_runs, x_runs, y_runs;
    FN(open_channels)(channel, tile.channels);
    for (bn_index c = 0; c < tile.channels; c++)
        channel[c].first = mean[c];
    for (bn_index run = 0, runs; run < tile.runs; run += runs) {
        runs = bn_min(FN(runs_at_once)(tile), tile.runs - run);
        for (bn_index c = 0; c < tile.channels; c++) {
            const bn_index at = run * tile.stride + c * tile.apart, end = at + tile.length;
            if (tile.length < BN_LANES)
                FN(add_runs)(FN(gather)(dy + at, runs, tile.length, tile.stride, &dy_runs),
                             FN(gather)(x + at, runs, tile.length, tile.stride, &x_runs),
                             y ? FN(gather)(y + at, runs, tile.length, tile.stride, &y_runs) : NULL,
                             1, runs * tile.length, 1, 0, channel + c);
            else
                for (bn_index i = at, n; i < end; i += n)
                    FN(add_runs)(dy + i, x + i, y ? y + i : NULL, runs,
                                 n = FN(piece)(end - i), tile.stride, ahead, channel + c);
        }
    }
    for (bn_index c = 0; c < tile.channels; c++) {
        sums[c].dy = FN(total)(channel[c].a);
        sums[c].dy_x = FN(total)(channel[c].b);
    }
}
