/* A call: addresses, sizes, and how the work is cut.

   channels-first (N, C, S)   Sums are taken over tiles of a channel, whatever the threads. Adjacent
                              channels make a slab that is done by one thread, in its cache;
                              elementwise passes are cut into parts of the N * C runs.
   channels-last  (M, C)      Below 64 channels several rows are folded into one wide row; M need
                              not be a multiple: the rest is a partial row. Sums are taken over at
                              most 64 parts of rows, and those over up to 512 columns. */

#ifndef BNFAST_CALL_H
#define BNFAST_CALL_H

#include <stdint.h>
#include <stdlib.h>

#include "dispatch.h"

/* Sizes of the caches, in bytes, of one core and of all: set from what the system says. */
static bn_index bn_core_cache = (bn_index)1 << 20, bn_last_cache = (bn_index)32 << 20;

/* Elements of a tile of a sum, which float64 reads twice and which should stay in the second-level
   cache; and of a part of an elementwise pass, which only has to outweigh a function call, or, in
   large arrays, the end of a stream of stores. */
#define BN_TILE 16384
#define BN_PART 4096
#define BN_PART_MAX 65536

/* Elements of a part of a channels-last sum, at least, and rows, so that merging the parts' results
   stays a small share of the work. */
#define BN_ROW_PART 16384
#define BN_ROW_PART_ROWS 128

/* Elements of a wide row, at least; of large arrays in 16 bits more, since what a row costs beside
   its elements is not half of it. */
#define BN_FOLD 64
#define BN_FOLD_16BIT 256
#define BN_FOLD_16BIT_FROM 524288
#define BN_ROW_PARTS 64

/* Bytes of a row from which on results are made row by row, where memory is read. */
#define BN_PAGE 4096

/* Channels whose factors are found at once, before the threads start. */
#define BN_PRELUDE 1024

typedef struct {
    bn_index count;   /* parts in all */
    bn_index runs;    /* runs of a part */
    bn_index length;  /* elements of each run of a part */
    bn_index pieces;  /* parts side by side in one run */
} bn_cut;

/* What a call needs beside its arrays. */
enum { BN_MOMENTS = 1, BN_SUMS = 2, BN_FACTORS = 4 };

typedef struct {
    const bn_kernels *kernels;
    bn_index outer, channels, inner;  /* N, C, S; or M, C, 1 */
    bn_cut tiles;                     /* channels-first: a channel, for sums */
    bn_cut units;                     /* channels-first: all runs, for elementwise passes */
    bn_index slab, slabs;             /* channels-first: channels of a slab at most, and how many */
    bn_index fold, width;             /* channels-last: rows in a wide row, its elements */
    bn_index rows, rest;              /* wide rows, and elements of the partial one */
    bn_index parts, part_rows;        /* parts of a sum, and wide rows of each */
    bn_index column_tiles;            /* tiles of columns of a sum */
    bn_index spans, span_rows;        /* parts of an elementwise pass, and wide rows of each */
    bn_index ahead;                   /* distance at which memory is asked for; 0: not at all */
    const char *x, *residual, *dy, *y_in;
    char *y, *dx, *dresidual;
    double *mean, *m2, *sum_dy, *sum_dy_xhat;
    const double *var, *weight, *bias, *invstd;
    double eps, count;
    int relu;
    int large;                        /* whether the arrays are more than the caches hold */
    int one_by_one;                   /* channels-last: whether results are made row by row */
    int stream;                       /* whether results go past the cache */
    bn_moments *moments;              /* of each part of a sum */
    bn_sums *sums;
    double *wide_mean;                /* channels-last: the mean of every column of a wide row */
    double *scale;                    /* affine: scales; gradient: g_scales, x_scales, shifts */
    char *packed;                     /* these and more as they are computed with: see bn_affines */
    char *fits;                       /* per group of channels: whether these fit that dtype */
} bn_call;

/* Cut runs into parts of about `elements`: whole runs, or pieces of one that end on whole steps of
   lanes. */
static inline bn_cut bn_cut_runs(bn_index runs, bn_index length, bn_index elements)
{
    bn_cut cut = {0, 1, length, 1};
    if (length == 0 || runs == 0)
        return cut;
    if (length >= elements) {
        cut.length = bn_ceil(bn_ceil(length, bn_ceil(length, elements)), BN_LANES) * BN_LANES;
        cut.pieces = bn_ceil(length, cut.length);
    } else {
        cut.runs = elements / length;
    }
    cut.count = bn_ceil(runs, cut.runs) * cut.pieces;
    return cut;
}

/* Elements of a part of an elementwise pass over so many. */
static inline bn_index bn_part(bn_index elements)
{
    return bn_max(BN_PART, bn_min(BN_PART_MAX, elements / 64));
}

/* How far ahead of the element in work a sum asks for memory: so many elements, or as many whole
   rows (of a slab, or wide rows) where these are shorter; not at all where the caches hold the
   arrays, and asking costs a few percent. It is what the hardware does not foresee (training, 2 threads:
   56x56 planes 1.2 times faster). */
#define BN_AHEAD 2048
#define BN_COLUMNS_AHEAD 8192

/* How far ahead of the line in work results of large arrays ask for what they are made from, in bytes of
   each array: all of it is less than a first-level cache of 48 KB holds. Not the gradients of
   channels-last arrays. */
#define BN_LINES_AHEAD 16384

static inline bn_index bn_ahead(const bn_call *call, bn_index ahead, bn_index length,
                                bn_index stride)
{
    if (call->inner >= BN_TILE || call->outer == 1)
        return ahead;
    const bn_index at_once = call->rows ? BN_ROWS : bn_runs(call->inner);
    return bn_max(at_once, ahead / length) * stride;
}

/* Where part t lies: its first run, how many, its first element in each, how many. */
typedef struct {
    bn_index run, runs, from, length;
} bn_place;

static inline bn_place bn_find_place(bn_cut cut, bn_index t, bn_index runs, bn_index length)
{
    const bn_index row = cut.pieces == 1 ? t : t / cut.pieces;
    bn_place place;
    place.run = row * cut.runs;
    place.runs = bn_min(cut.runs, runs - place.run);
    place.from = (t - row * cut.pieces) * cut.length;
    place.length = bn_min(cut.length, length - place.from);
    return place;
}

/* As many channels as fit into a share of a core's cache with all `arrays` that are read twice, and a
   number of slabs that the threads can share evenly. The share is a half, or, where memory has to
   be asked for anyway, a quarter: the next slab is asked for while this one is written. Where a
   slab of a gradient is one piece of each cached array, it has the size of the first-level cache,
   so that what is written beside it takes no room there (0.88 to 0.94 of the time). */
static inline void bn_cut_slabs(bn_call *call, bn_index arrays, bn_index num_threads)
{
    const bn_index channel = call->outer * call->inner * call->kernels->itemsize * arrays;
    const int one_piece = arrays > 1 && call->outer == 1 && !call->large;
    const bn_index room = bn_core_cache / (one_piece ? 32 : call->large ? 4 : 2);
    const bn_index fitting = bn_max(1, room / channel);
    const bn_index rounds = bn_ceil(bn_ceil(call->channels, fitting), num_threads);
    call->slabs = bn_min(call->channels, rounds * num_threads);
    call->slab = bn_ceil(call->channels, call->slabs);
}

/* The first channel of a slab: sizes differ by one at most, so that no thread has a slab less. */
static inline bn_index bn_slab_first(const bn_call *call, bn_index slab)
{
    return slab * call->channels / call->slabs;
}

/* Cut a call on arrays of a form: (outer, channels, inner), or with `last` (outer, channels).
   `inputs` of them are read, twice where a channel is summed and then computed, and `outputs`
   written. */
static inline void bn_describe(bn_call *call, const bn_kernels *kernels, bn_index outer,
                               bn_index channels, bn_index inner, int last, bn_index inputs,
                               bn_index outputs, bn_index num_threads)
{
    const bn_index bytes = outer * channels * inner * kernels->itemsize;
    memset(call, 0, sizeof *call);
    call->kernels = kernels;
    call->outer = outer;
    call->channels = channels;
    call->inner = inner;
    call->count = (double)outer * (double)inner;
    call->fold = 1;
    call->width = channels;
    if (bytes == 0)
        return;
    call->large = (inputs + outputs) * bytes > bn_last_cache;
    const int nearly = (inputs + outputs) * bytes > bn_last_cache / 4 * 3;
    if (!last) {
        call->tiles = bn_cut_runs(outer, inner, BN_TILE);
        call->units = bn_cut_runs(outer * channels, inner, bn_part(outer * channels * inner));
        bn_cut_slabs(call, inputs, num_threads);
        if (nearly)
            call->ahead = bn_ahead(call, BN_AHEAD, call->slab * inner, channels * inner);
        return;
    }
    const int wider = kernels->itemsize == 2 && outer * channels >= BN_FOLD_16BIT_FROM;
    call->fold = bn_min(bn_ceil(wider ? BN_FOLD_16BIT : BN_FOLD, channels), outer);
    call->width = call->fold * channels;
    call->rows = outer / call->fold;
    call->rest = outer % call->fold * channels;
    call->one_by_one = nearly && channels * kernels->itemsize >= BN_PAGE;
    if (call->large)
        call->ahead = bn_ahead(call, BN_COLUMNS_AHEAD, call->width, call->width);
    call->part_rows = bn_max(bn_max(BN_ROW_PART_ROWS, BN_ROW_PART / call->width),
                             bn_ceil(call->rows, BN_ROW_PARTS));
    call->parts = bn_ceil(call->rows, call->part_rows);
    call->column_tiles = bn_ceil(call->width, BN_COLUMNS);
    call->span_rows = bn_ceil(bn_max(1, bn_part(outer * channels) / call->width), 4) * 4;
    call->spans = bn_ceil(call->rows * call->width + call->rest, call->span_rows * call->width);
}

/* Elements from one packed vector to the next: as many as a row has, and a line of results. */
static inline bn_index bn_pitch(const bn_call *call)
{
    return call->width + 64 / call->kernels->itemsize;
}

/* How many bytes behind the beginning of a cache line the packed vectors begin. Whole lines of results
   are sent: where these begin behind one (NumPy's large arrays do, by 16 bytes), so do the vectors,
   and if rows are whole lines long, what a line of results is made from lies in lines too. */
static inline size_t bn_lag(const bn_call *call)
{
    const uintptr_t result = (uintptr_t)(call->y ? call->y : call->dx);
    if (!call->stream || !call->rows)
        return 0;
    return result % 64 / (size_t)call->kernels->itemsize * (size_t)call->kernels->factor_size % 64;
}

/* Allocate what the call needs beside its arrays, in one piece; NULL if there is no memory. */
static inline void *bn_allocate(bn_call *call, int needs)
{
    const size_t line = 64;
    const size_t width = (size_t)call->width;
    const size_t entries = call->rows ? (size_t)(call->parts + 1) * width
                                      : (size_t)(call->channels * call->tiles.count);
    const size_t moments = needs & BN_MOMENTS ? entries * sizeof(bn_moments) : 0;
    const size_t sums = needs & BN_SUMS ? entries * sizeof(bn_sums) : 0;
    const size_t means = needs & BN_SUMS && call->rows ? width * sizeof(double) : 0;
    const size_t scale = needs & BN_FACTORS ? 3 * (size_t)call->channels * sizeof(double) : 0;
    const size_t packed = needs & BN_FACTORS ? 4 * (size_t)bn_pitch(call) * sizeof(double) : 0;
    char *const block = (char *)malloc(line + packed + line + moments + sums + means + scale +
                                       width / BN_GROUP + 1);
    if (!block)
        return NULL;
    char *const aligned = block + -(uintptr_t)block % line;
    call->packed = aligned + bn_lag(call);
    call->moments = (bn_moments *)(aligned + packed + line);
    call->sums = (bn_sums *)((char *)call->moments + moments);
    call->wide_mean = (double *)((char *)call->sums + sums);
    call->scale = (double *)((char *)call->wide_mean + means);
    call->fits = (char *)call->scale + scale;
    return block;
}

#endif
