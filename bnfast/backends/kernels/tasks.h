/* The tasks of a call. A task does one part of one phase; the parts of a phase may run in any
   order and at the same time, and each writes its own results. A later phase combines them in
   order, so that the bits do not depend on who ran what. */

#ifndef BNFAST_TASKS_H
#define BNFAST_TASKS_H

#include "merge.h"

typedef void (*bn_task)(bn_call *, bn_index);

/* ---- what a channel's elements are multiplied with and shifted by -------------------------------

   Found for up to BN_GROUP channels at a time; returned is whether all of them fit the type
   that elements are computed in. */

/* Repeat what was packed of some channels for the other rows of a wide row, and for the elements
   behind it. */
static inline void bn_repeat_packed(const bn_call *call, bn_index first, bn_index size, int vectors)
{
    const bn_index itemsize = call->kernels->factor_size, pitch = bn_pitch(call);
    for (int vector = 0; call->rows && vector < vectors; vector++) {
        char *const packed = call->packed + vector * pitch * itemsize;
        for (bn_index at = first + call->channels; at < pitch; at += call->channels)
            memcpy(packed + at * itemsize, packed + first * itemsize,
                   bn_min(size, pitch - at) * itemsize);
    }
}

static int bn_find_affine(bn_call *call, bn_index first, bn_index size)
{
    const int fits = call->kernels->find_affine(
        call->mean + first, (call->var ? call->var : call->m2) + first,
        call->var ? 1.0 : call->count, call->weight + first, call->bias + first, call->eps, size,
        bn_pitch(call), call->scale + first, call->packed + first * call->kernels->factor_size);
    bn_repeat_packed(call, first, size, 3);
    return fits;
}

/* dx = weight invstd (g - (sum_dy + xhat sum_dy_xhat) / count), as a factor of g, a factor of
   x - mean, and a shift. */
static int bn_find_gradient(bn_call *call, bn_index first, bn_index size)
{
    double *const g_scale = call->scale, *const x_scale = g_scale + call->channels;
    double *const shift = x_scale + call->channels;
    for (bn_index c = first; c < first + size; c++) {
        const double scale = call->weight[c] * call->invstd[c];
        const double slope = call->sum_dy_xhat[c] / call->count;
        g_scale[c] = scale;
        x_scale[c] = slope ? -scale * call->invstd[c] * slope : 0;
        shift[c] = call->sum_dy[c] ? -scale * (call->sum_dy[c] / call->count) : 0;
    }
    const int fits = call->kernels->pack_gradient(
        call->mean + first, g_scale + first, x_scale + first, shift + first, size, bn_pitch(call),
        call->packed + first * call->kernels->factor_size);
    bn_repeat_packed(call, first, size, 4);
    return fits;
}

/* ---- phases over groups of channels ------------------------------------------------------------*/

static inline bn_index bn_groups(const bn_call *call) { return bn_ceil(call->channels, BN_GROUP); }

static inline bn_index bn_group_size(const bn_call *call, bn_index g)
{
    return bn_min(BN_GROUP, call->channels - g * BN_GROUP);
}

static inline int bn_all_fit(const bn_call *call)
{
    int fits = 1;
    for (bn_index g = 0; g < bn_groups(call); g++)
        fits &= call->fits[g];
    return fits;
}

typedef int (*bn_finder)(bn_call *, bn_index first, bn_index size);

static inline void bn_find_group(bn_call *call, bn_index g, bn_finder find)
{
    call->fits[g] = (char)find(call, g * BN_GROUP, bn_group_size(call, g));
}

static void bn_combine_moments(bn_call *call, bn_index g)
{
    bn_merge_moments(call, g * BN_GROUP, bn_group_size(call, g));
}

static void bn_combine_sums(bn_call *call, bn_index g)
{
    bn_merge_sums(call, g * BN_GROUP, bn_group_size(call, g));
}

static void bn_moments_to_affine(bn_call *call, bn_index g)
{
    bn_combine_moments(call, g);
    bn_find_group(call, g, bn_find_affine);
}

static void bn_sums_to_gradient(bn_call *call, bn_index g)
{
    bn_combine_sums(call, g);
    bn_find_group(call, g, bn_find_gradient);
}

/* What is known before any sum is found by the part, many groups at once. */
static inline bn_index bn_preludes(const bn_call *call)
{
    return bn_ceil(call->channels, BN_PRELUDE);
}

static inline void bn_find_part(bn_call *call, bn_index part, bn_finder find)
{
    const bn_index first = part * (BN_PRELUDE / BN_GROUP);
    for (bn_index g = first; g < bn_min(first + BN_PRELUDE / BN_GROUP, bn_groups(call)); g++)
        bn_find_group(call, g, find);
}

static void bn_affine_prelude(bn_call *call, bn_index part)
{
    bn_find_part(call, part, bn_find_affine);
}

static void bn_gradient_prelude(bn_call *call, bn_index part)
{
    bn_find_part(call, part, bn_find_gradient);
}

static void bn_wide_mean_prelude(bn_call *call, bn_index part)
{
    const bn_index end = bn_min((part + 1) * BN_PRELUDE, call->channels);
    for (bn_index c = part * BN_PRELUDE; c < end; c++)
        for (bn_index column = c; column < call->width; column += call->channels)
            call->wide_mean[column] = call->mean[c];
}

/* Stores past the cache are in no order with others: wait for them at the end of a task. */
static inline void bn_settle(const bn_call *call)
{
#if defined(__SSE2__)
    if (call->stream)
        _mm_sfence();
#else
    (void)call;
#endif
}

static inline bn_index bn_lines_ahead(const bn_call *call)
{
    return call->large ? BN_LINES_AHEAD / call->kernels->itemsize : 0;
}

static inline bn_affines bn_affines_of(const bn_call *call, int fits)
{
    const bn_affines affines = {.packed = call->packed,
                                .width = call->width,
                                .pitch = bn_pitch(call),
                                .channels = call->channels,
                                .fits = fits,
                                .relu = call->relu,
                                .stream = call->stream,
                                .ahead = bn_lines_ahead(call),
                                .one_by_one = call->one_by_one,
                                .mean = call->mean,
                                .scale = call->scale,
                                .bias = call->bias};
    return affines;
}

static inline bn_gradients bn_gradients_of(const bn_call *call, int fits)
{
    const bn_gradients gradients = {.packed = call->packed,
                                    .width = call->width,
                                    .pitch = bn_pitch(call),
                                    .channels = call->channels,
                                    .fits = fits,
                                    .stream = call->stream,
                                    .ahead = bn_lines_ahead(call),
                                    .mean = call->mean,
                                    .g_scale = call->scale,
                                    .x_scale = call->scale + call->channels,
                                    .shift = call->scale + 2 * call->channels};
    return gradients;
}

/* ---- channels-first --------------------------------------------------------------------------- */

static inline const char *bn_at(const char *array, bn_index offset)
{
    return array ? array + offset : NULL;
}

static inline char *bn_out(char *array, bn_index offset) { return array ? array + offset : NULL; }

/* Tile t of channels from `first` on, and the offset of its first byte. */
static inline bn_tile bn_find_tile(const bn_call *call, bn_index first, bn_index size, bn_index t,
                                   bn_index *at)
{
    const bn_place place = bn_find_place(call->tiles, t, call->outer, call->inner);
    const bn_tile tile = {place.runs, place.length, call->channels * call->inner, size,
                          call->inner};
    *at = ((place.run * call->channels + first) * call->inner + place.from) *
          call->kernels->itemsize;
    return tile;
}

static void bn_tile_moments(bn_call *call, bn_index first, bn_index size, bn_index t)
{
    bn_index at;
    const bn_tile tile = bn_find_tile(call, first, size, t, &at);
    call->kernels->row_moments(call->x + at, tile, call->ahead,
                               call->moments + t * call->channels + first);
}

static void bn_tile_sums(bn_call *call, bn_index first, bn_index size, bn_index t)
{
    bn_index at;
    const bn_tile tile = bn_find_tile(call, first, size, t, &at);
    call->kernels->row_sums(call->dy + at, call->x + at, bn_at(call->y_in, at), tile, call->ahead,
                            call->mean + first, call->sums + t * call->channels + first);
}

/* One tile of one slab. */
static void bn_row_moments(bn_call *call, bn_index part)
{
    const bn_index slab = part / call->tiles.count, t = part % call->tiles.count;
    const bn_index end = bn_slab_first(call, slab + 1);
    for (bn_index c = bn_slab_first(call, slab); c < end; c += BN_GROUP)
        bn_tile_moments(call, c, bn_min(BN_GROUP, end - c), t);
}

static void bn_row_sums(bn_call *call, bn_index part)
{
    const bn_index slab = part / call->tiles.count, t = part % call->tiles.count;
    const bn_index end = bn_slab_first(call, slab + 1);
    for (bn_index c = bn_slab_first(call, slab); c < end; c += BN_GROUP)
        bn_tile_sums(call, c, bn_min(BN_GROUP, end - c), t);
}

static void bn_row_normalize(bn_call *call, bn_index unit)
{
    const bn_place place =
        bn_find_place(call->units, unit, call->outer * call->channels, call->inner);
    const bn_index at = (place.run * call->inner + place.from) * call->kernels->itemsize;
    call->kernels->row_normalize(call->x + at, bn_at(call->residual, at), call->y + at,
                                 place.runs * place.length, place.length,
                                 bn_affines_of(call, bn_all_fit(call)), place.run % call->channels);
    bn_settle(call);
}

static void bn_row_gradient(bn_call *call, bn_index unit)
{
    const bn_place place =
        bn_find_place(call->units, unit, call->outer * call->channels, call->inner);
    const bn_index at = (place.run * call->inner + place.from) * call->kernels->itemsize;
    call->kernels->row_gradient(call->dy + at, call->x + at, bn_at(call->y_in, at), call->dx + at,
                                bn_out(call->dresidual, at), place.runs * place.length,
                                place.length, bn_gradients_of(call, bn_all_fit(call)),
                                place.run % call->channels);
    bn_settle(call);
}

/* Samples of a slab that follow each other without a gap: all, if it has all channels. */
static inline bn_index bn_adjacent_samples(const bn_call *call, bn_index channels)
{
    return channels == call->channels ? call->outer : 1;
}

/* How far from an element the same one of the next slab lies, if it should be asked for while this
   slab is written, so that memory is read and written at once. */
static inline bn_index bn_next_slab(const bn_call *call)
{
    return call->large ? call->slab * call->inner : 0;
}

/* A whole slab by one thread, while it is in its cache. */
static void bn_slab_train(bn_call *call, bn_index slab)
{
    const bn_index first = bn_slab_first(call, slab), end = bn_slab_first(call, slab + 1);
    const bn_index itemsize = call->kernels->itemsize;
    int fits = 1;
    for (bn_index c = first, size; c < end; c += size) {
        size = bn_min(BN_GROUP, end - c);
        for (bn_index t = 0; t < call->tiles.count; t++)
            bn_tile_moments(call, c, size, t);
        bn_merge_moments(call, c, size);
        fits &= bn_find_affine(call, c, size);
    }
    bn_affines affines = bn_affines_of(call, fits);
    affines.ahead = bn_next_slab(call);
    for (bn_index n = 0, samples; n < call->outer; n += samples) {
        const bn_index at = (n * call->channels + first) * call->inner * itemsize;
        samples = bn_adjacent_samples(call, end - first);
        call->kernels->row_normalize(call->x + at, bn_at(call->residual, at), call->y + at,
                                     samples * (end - first) * call->inner, call->inner, affines,
                                     first);
    }
    bn_settle(call);
}

static void bn_slab_backward(bn_call *call, bn_index slab)
{
    const bn_index first = bn_slab_first(call, slab), end = bn_slab_first(call, slab + 1);
    const bn_index itemsize = call->kernels->itemsize;
    int fits = 1;
    for (bn_index c = first, size; c < end; c += size) {
        size = bn_min(BN_GROUP, end - c);
        for (bn_index t = 0; t < call->tiles.count; t++)
            bn_tile_sums(call, c, size, t);
        bn_merge_sums(call, c, size);
        fits &= bn_find_gradient(call, c, size);
    }
    bn_gradients gradients = bn_gradients_of(call, fits);
    gradients.ahead = bn_next_slab(call);
    for (bn_index n = 0, samples; n < call->outer; n += samples) {
        const bn_index at = (n * call->channels + first) * call->inner * itemsize;
        samples = bn_adjacent_samples(call, end - first);
        call->kernels->row_gradient(call->dy + at, call->x + at, bn_at(call->y_in, at),
                                    call->dx + at, bn_out(call->dresidual, at),
                                    samples * (end - first) * call->inner, call->inner, gradients,
                                    first);
    }
    bn_settle(call);
}

/* ---- channels-last ---------------------------------------------------------------------------- */

/* Part numbers of a reduction count column tiles first; the partial row is a part of one row (only
   folded rows have one, and these are one column tile). */
typedef struct {
    bn_index at, entry, rows, column, width;
} bn_panel;

static inline bn_panel bn_find_panel(const bn_call *call, bn_index number)
{
    const bn_index part = number / call->column_tiles, first = part * call->part_rows;
    const int is_rest = part == call->parts;
    const bn_index row = is_rest ? call->rows : first;
    const bn_index limit = is_rest ? call->rest : call->width;
    bn_panel panel;
    panel.column = number % call->column_tiles * BN_COLUMNS;
    panel.rows = is_rest ? 1 : bn_min(call->part_rows, call->rows - first);
    panel.width = bn_min(BN_COLUMNS, limit - panel.column);
    panel.at = (row * call->width + panel.column) * call->kernels->itemsize;
    panel.entry = part * call->width + panel.column;
    return panel;
}

static inline bn_index bn_panels(const bn_call *call)
{
    return (call->parts + (call->rest != 0)) * call->column_tiles;
}

static void bn_column_moments(bn_call *call, bn_index number)
{
    const bn_panel panel = bn_find_panel(call, number);
    call->kernels->column_moments(call->x + panel.at, panel.rows, panel.width, call->width,
                                  call->ahead, call->moments + panel.entry);
}

static void bn_column_sums(bn_call *call, bn_index number)
{
    const bn_panel panel = bn_find_panel(call, number);
    double dy[BN_COLUMNS], dy_x[BN_COLUMNS];
    call->kernels->column_sums(call->dy + panel.at, call->x + panel.at,
                               bn_at(call->y_in, panel.at), panel.rows, panel.width, call->width,
                               call->ahead, call->wide_mean + panel.column, dy, dy_x);
    for (bn_index c = 0; c < panel.width; c++) {
        call->sums[panel.entry + c].dy = dy[c];
        call->sums[panel.entry + c].dy_x = dy_x[c];
    }
}

/* The elements of a span of wide rows; the last span takes the partial row. */
static inline bn_index bn_span(const bn_call *call, bn_index span, bn_index *elements)
{
    const bn_index first = span * call->span_rows * call->width;
    const bn_index total = call->rows * call->width + call->rest;
    *elements = bn_min(call->span_rows * call->width, total - first);
    return first * call->kernels->itemsize;
}

static void bn_column_normalize(bn_call *call, bn_index span)
{
    bn_index elements;
    const bn_index at = bn_span(call, span, &elements);
    call->kernels->column_normalize(call->x + at, bn_at(call->residual, at), call->y + at, elements,
                                    bn_affines_of(call, bn_all_fit(call)));
    bn_settle(call);
}

static void bn_column_gradient(bn_call *call, bn_index span)
{
    bn_index elements;
    const bn_index at = bn_span(call, span, &elements);
    call->kernels->column_gradient(call->dy + at, call->x + at, bn_at(call->y_in, at),
                                   call->dx + at, bn_out(call->dresidual, at), elements,
                                   bn_gradients_of(call, bn_all_fit(call)));
    bn_settle(call);
}

#endif
