/* A call: addresses, sizes, and how the work is cut. Everything here follows from the shape alone.

   channels-first (N, C, S)   Reductions are cut into tiles of one channel, elementwise passes into
                              tiles of the N * C runs.
   channels-last  (M, C)      Below 64 channels several rows are folded into one wide row; M need
                              not be a multiple: the rest is a partial row. Reductions are cut into
                              at most 64 parts of rows, and those into up to 512 columns. */

#ifndef BNFAST_CALL_H
#define BNFAST_CALL_H

#include <stdint.h>
#include <stdlib.h>

#include "dispatch.h"

/* Elements of a tile of a reduction, which is read twice and should stay in the second-level cache,
   and of a part of an elementwise pass, which only has to outweigh a function call. */
#define BN_TILE 16384
#define BN_PART 4096

/* Elements of a part of a channels-last reduction, at least, and rows, so that merging the parts'
   results stays a small share of the work. */
#define BN_ROW_PART 16384
#define BN_ROW_PART_ROWS 128

#define BN_FOLD 64
#define BN_ROW_PARTS 64

typedef struct {
    bn_index count;   /* tiles in all */
    bn_index runs;    /* runs of a tile */
    bn_index length;  /* elements of each run of a tile */
    bn_index pieces;  /* tiles side by side in one run */
} bn_tiling;

/* The two sums of the backward pass over a part of a channel. */
typedef struct {
    double dy, dy_x;
} bn_sums;

/* Numbers that a channel packs, at most: four, and whether they fit. */
#define BN_PACKED 5

/* What a call needs beside its arrays. */
enum { BN_MOMENTS = 1, BN_SUMS = 2, BN_AFFINE = 4, BN_GRADIENT = 8 };

typedef struct {
    const bn_kernels *kernels;
    bn_index outer, channels, inner;  /* N, C, S; or M, C, 1 */
    bn_tiling tiles;                  /* channels-first: a channel, for reductions */
    bn_tiling units;                  /* channels-first: all runs, for elementwise passes */
    bn_index fold, width;             /* channels-last: rows in a wide row, its elements */
    bn_index rows, rest;              /* wide rows, and elements of the partial one */
    bn_index parts, part_rows;        /* parts of a reduction, and wide rows of each */
    bn_index column_tiles;            /* tiles of columns of a reduction */
    bn_index spans, span_rows;        /* parts of an elementwise pass, and wide rows of each */
    bn_index ahead;                   /* distance at which memory is asked for; 0: not at all */
    const char *x, *residual, *dy, *y_in;
    char *y, *dx, *dresidual;
    double *mean, *m2, *sum_dy, *sum_dy_xhat;
    const double *var, *weight, *bias, *invstd;
    double eps, count;
    int relu;
    bn_moments *moments;              /* of each part of a reduction */
    bn_sums *sums;
    double *wide_mean;                /* channels-last: the mean of every column of a wide row */
    bn_affine *affine;                /* per channel, or per column of a wide row */
    bn_gradient *gradient;
    char *packed;                     /* the same in the dtype of x */
} bn_call;

/* Cut runs into tiles of about `elements`: whole runs, or pieces of one that end on whole steps of
   lanes. */
static inline bn_tiling bn_tile(bn_index runs, bn_index length, bn_index elements)
{
    bn_tiling tiling = {0, 1, length, 1};
    if (length == 0 || runs == 0)
        return tiling;
    if (length >= elements) {
        tiling.length = bn_ceil(bn_ceil(length, bn_ceil(length, elements)), BN_LANES) * BN_LANES;
        tiling.pieces = bn_ceil(length, tiling.length);
    } else {
        tiling.runs = elements / length;
    }
    tiling.count = bn_ceil(runs, tiling.runs) * tiling.pieces;
    return tiling;
}

/* How far ahead of the element in work a reduction asks for memory: about 2048 elements, in whole
   runs where these are shorter. It is what the hardware does not foresee in arrays that outgrow the
   cache (training, 2 threads: 56x56 planes 1.2 times faster; 14x14 planes, backward, 1.15 times);
   in it, asking costs a few percent. */
#define BN_AHEAD 2048
#define BN_CACHED_BYTES ((bn_index)16 << 20)

static inline bn_index bn_ahead(bn_index bytes, bn_index length, bn_index stride)
{
    if (bytes < BN_CACHED_BYTES)
        return 0;
    return length >= BN_AHEAD ? BN_AHEAD : bn_max(1, BN_AHEAD / length) * stride;
}

/* Where tile t lies: its first run, how many, its first element in each, how many. */
typedef struct {
    bn_index run, runs, from, length;
} bn_place;

static inline bn_place bn_tile_place(bn_tiling tiling, bn_index t, bn_index runs, bn_index length)
{
    bn_place place;
    place.run = t / tiling.pieces * tiling.runs;
    place.runs = bn_min(tiling.runs, runs - place.run);
    place.from = t % tiling.pieces * tiling.length;
    place.length = bn_min(tiling.length, length - place.from);
    return place;
}

/* Cut a call on arrays of a form: (outer, channels, inner), or with `last` (outer, channels). */
static inline void bn_describe(bn_call *call, const bn_kernels *kernels, bn_index outer,
                               bn_index channels, bn_index inner, int last)
{
    memset(call, 0, sizeof *call);
    call->kernels = kernels;
    call->outer = outer;
    call->channels = channels;
    call->inner = inner;
    call->count = (double)outer * (double)inner;
    call->fold = 1;
    call->width = channels;
    if (!last) {
        call->tiles = bn_tile(outer, inner, BN_TILE);
        call->units = bn_tile(outer * channels, inner, BN_PART);
        call->ahead = bn_ahead(outer * channels * inner * kernels->itemsize, inner, channels * inner);
        return;
    }
    if (channels == 0 || outer == 0)
        return;
    call->fold = bn_min(bn_ceil(BN_FOLD, channels), outer);
    call->width = call->fold * channels;
    call->rows = outer / call->fold;
    call->ahead = bn_ahead(outer * channels * kernels->itemsize, call->width, call->width);
    call->rest = outer % call->fold * channels;
    call->part_rows = bn_max(bn_max(BN_ROW_PART_ROWS, BN_ROW_PART / call->width),
                             bn_ceil(call->rows, BN_ROW_PARTS));
    call->parts = bn_ceil(call->rows, call->part_rows);
    call->column_tiles = bn_ceil(call->width, BN_COLUMNS);
    call->span_rows = bn_ceil(bn_max(1, BN_PART / call->width), 4) * 4;
    call->spans = bn_ceil(call->rows * call->width + call->rest, call->span_rows * call->width);
}

/* Allocate what the call needs beside its arrays, in one piece; NULL if there is no memory. */
static inline void *bn_allocate(bn_call *call, int needs)
{
    const size_t width = (size_t)call->width;
    const size_t entries = call->rows ? (size_t)(call->parts + 1) * width
                                      : (size_t)(call->channels * call->tiles.count);
    const size_t sizes[] = {needs & BN_MOMENTS ? entries * sizeof(bn_moments) : 0,
                            needs & BN_SUMS ? entries * sizeof(bn_sums) : 0,
                            needs & BN_SUMS ? width * sizeof(double) : 0,
                            needs & BN_AFFINE ? width * sizeof(bn_affine) : 0,
                            needs & BN_GRADIENT ? width * sizeof(bn_gradient) : 0,
                            BN_PACKED * (width + 1) * sizeof(double)};
    char *const block = (char *)malloc(sizes[0] + sizes[1] + sizes[2] + sizes[3] + sizes[4] +
                                       sizes[5]);
    if (!block)
        return NULL;
    call->moments = (bn_moments *)block;
    call->sums = (bn_sums *)(block + sizes[0]);
    call->wide_mean = (double *)(block + sizes[0] + sizes[1]);
    call->affine = (bn_affine *)(block + sizes[0] + sizes[1] + sizes[2]);
    call->gradient = (bn_gradient *)(block + sizes[0] + sizes[1] + sizes[2] + sizes[3]);
    call->packed = block + sizes[0] + sizes[1] + sizes[2] + sizes[3] + sizes[4];
    return block;
}

#endif
