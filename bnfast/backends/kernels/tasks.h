/* The tasks of a call. A task does one part of one phase; the parts of a phase may run in any
   order and at the same time, and each writes its own results. A later phase combines them in
   order, so that the bits do not depend on who ran what.

   Reductions leave the results of each part in a table, call->moments or call->sums; bn_entry() is
   its map. */

#ifndef BNFAST_TASKS_H
#define BNFAST_TASKS_H

#include "call.h"

typedef void (*bn_task)(bn_call *, bn_index);

/* ---- the table of partial results -------------------------------------------------------------

   channels-first: tile t of channel c               row c * tiles + t
   channels-last:  part p, column j of a wide row    row p * width + j
                   the partial wide row              part number `parts`, of the columns it has

   Channels-last tables are walked along their rows, BN_GROUP channels at a time: one channel at a
   time would touch a cache line for each entry. */

#define BN_GROUP 64

/* Channels of group g, and its first. */
static inline bn_index bn_group(const bn_call *call, bn_index g, bn_index *first)
{
    const bn_index size = call->rows ? BN_GROUP : 1;
    *first = g * size;
    return bn_min(size, call->channels - *first);
}

static inline bn_index bn_groups(const bn_call *call)
{
    return bn_ceil(call->channels, call->rows ? BN_GROUP : 1);
}

static inline bn_index bn_entries(const bn_call *call)
{
    return call->rows ? call->fold * (call->parts + (call->rest != 0)) : call->tiles.count;
}

/* Find entry e of channel c: its row in the table, and how many elements are behind it. */
static inline double bn_entry(const bn_call *call, bn_index c, bn_index e, bn_index *row)
{
    if (!call->rows) {
        const bn_place place = bn_tile_place(call->tiles, e, call->outer, call->inner);
        *row = c * call->tiles.count + e;
        return (double)place.runs * (double)place.length;
    }
    const bn_index part = e / call->fold, column = e % call->fold * call->channels + c;
    *row = part * call->width + column;
    if (part == call->parts)
        return column < call->rest ? 1.0 : 0.0;
    return (double)bn_min(call->part_rows, call->rows - part * call->part_rows);
}

/* Moments of the channels of a group from those of their parts: first the mean, then the squares
   about it, and with them what the first mean was off by. Differences of means are small numbers,
   so that no digit is lost to a large mean. */
static void bn_combine_moments(bn_call *call, bn_index g)
{
    const bn_index entries = bn_entries(call);
    bn_index first, row;
    const bn_index size = bn_group(call, g, &first);
    bn_moments total[BN_GROUP];
    double shifted[BN_GROUP];
    for (bn_index i = 0; i < size; i++) {
        const bn_moments none = {0.0, 0.0, 0.0};
        total[i] = none;
        if (entries) {
            bn_entry(call, first + i, 0, &row);
            total[i] = call->moments[row];
        }
        shifted[i] = 0.0;
    }
    for (bn_index e = 1; e < entries; e++) {
        const double n = bn_entry(call, first, e, &row);
        for (bn_index i = 0; n && i < size; i++)
            shifted[i] += n * (bn_distance(call->moments[row + i], total[i]) - total[i].low);
    }
    for (bn_index i = 0; entries > 1 && i < size; i++) {
        total[i] = bn_moved(total[i], shifted[i] / call->count);
        total[i].m2 = shifted[i] = 0.0;
    }
    for (bn_index e = 0; entries > 1 && e < entries; e++) {
        const double n = bn_entry(call, first, e, &row);
        for (bn_index i = 0; n && i < size; i++) {
            const double d = bn_distance(call->moments[row + i], total[i]) - total[i].low;
            shifted[i] += n * d;
            total[i].m2 += call->moments[row + i].m2 + n * d * d;
        }
    }
    for (bn_index i = 0; i < size; i++) {
        const double off = entries > 1 ? shifted[i] / call->count : 0.0;
        call->mean[first + i] = total[i].mean + (total[i].low + off);
        call->m2[first + i] = total[i].m2;
    }
}

static void bn_combine_sums(bn_call *call, bn_index g)
{
    const bn_index entries = bn_entries(call);
    bn_index first, row;
    const bn_index size = bn_group(call, g, &first);
    bn_sums total[BN_GROUP];
    for (bn_index i = 0; i < size; i++)
        total[i].dy = total[i].dy_x = 0.0;
    for (bn_index e = 0; e < entries; e++) {
        const double n = bn_entry(call, first, e, &row);
        for (bn_index i = 0; n && i < size; i++) {
            total[i].dy += call->sums[row + i].dy;
            total[i].dy_x += call->sums[row + i].dy_x;
        }
    }
    for (bn_index i = 0; i < size; i++) {
        call->sum_dy[first + i] = total[i].dy;
        call->sum_dy_xhat[first + i] = entries ? total[i].dy_x * call->invstd[first + i] : 0.0;
    }
}

/* ---- what a channel's elements are multiplied with and shifted by -------------------------------*/

static void bn_find_affine(bn_call *call, bn_index c)
{
    const double var = call->var ? call->var[c] : call->m2[c] / call->count;
    const bn_affine affine = {call->mean[c], call->weight[c] / sqrt(var + call->eps),
                              call->bias[c]};
    for (bn_index column = c; column < call->width; column += call->channels)
        call->affine[column] = affine;
}

/* dx = weight invstd (g - (sum_dy + xhat sum_dy_xhat) / count), as a factor of g, a factor of
   x - mean, and a shift. */
static void bn_find_gradient(bn_call *call, bn_index c)
{
    const double scale = call->weight[c] * call->invstd[c];
    const double slope = call->sum_dy_xhat[c] / call->count;
    const bn_gradient gradient = {call->mean[c], scale, slope ? -scale * call->invstd[c] * slope : 0,
                                  call->sum_dy[c] ? -scale * (call->sum_dy[c] / call->count) : 0};
    for (bn_index column = c; column < call->width; column += call->channels)
        call->gradient[column] = gradient;
}

static void bn_find_wide_mean(bn_call *call, bn_index c)
{
    for (bn_index column = c; column < call->width; column += call->channels)
        call->wide_mean[column] = call->mean[c];
}

static void bn_pack_affine(bn_call *call, bn_index part)
{
    (void)part;
    call->kernels->pack_affine(call->affine, call->width, call->packed);
}

static void bn_pack_gradient(bn_call *call, bn_index part)
{
    (void)part;
    call->kernels->pack_gradient(call->gradient, call->width, call->packed);
}

static void bn_moments_to_affine(bn_call *call, bn_index g)
{
    bn_index first;
    const bn_index size = bn_group(call, g, &first);
    bn_combine_moments(call, g);
    for (bn_index c = first; c < first + size; c++)
        bn_find_affine(call, c);
}

static void bn_sums_to_gradient(bn_call *call, bn_index g)
{
    bn_index first;
    const bn_index size = bn_group(call, g, &first);
    bn_combine_sums(call, g);
    for (bn_index c = first; c < first + size; c++)
        bn_find_gradient(call, c);
}

/* ---- channels-first --------------------------------------------------------------------------- */

static inline const char *bn_at(const char *array, bn_index offset)
{
    return array ? array + offset : NULL;
}

static inline char *bn_out(char *array, bn_index offset) { return array ? array + offset : NULL; }

/* Byte offset of tile t of channel c, and its place. */
static inline bn_index bn_channel_tile(const bn_call *call, bn_index c, bn_index t, bn_place *place)
{
    *place = bn_tile_place(call->tiles, t, call->outer, call->inner);
    return ((place->run * call->channels + c) * call->inner + place->from) * call->kernels->itemsize;
}

static void bn_row_moments(bn_call *call, bn_index part)
{
    bn_place place;
    const bn_index c = part / call->tiles.count, t = part % call->tiles.count;
    const bn_index at = bn_channel_tile(call, c, t, &place);
    call->kernels->row_moments(call->x + at, place.runs, place.length,
                               call->channels * call->inner, call->ahead, call->moments + part);
}

static void bn_row_sums(bn_call *call, bn_index part)
{
    bn_place place;
    const bn_index c = part / call->tiles.count, t = part % call->tiles.count;
    const bn_index at = bn_channel_tile(call, c, t, &place);
    call->kernels->row_sums(call->dy + at, call->x + at, bn_at(call->y_in, at), place.runs,
                            place.length, call->channels * call->inner, call->ahead, call->mean[c],
                            &call->sums[part].dy, &call->sums[part].dy_x);
}

static void bn_row_normalize(bn_call *call, bn_index unit)
{
    const bn_place place =
        bn_tile_place(call->units, unit, call->outer * call->channels, call->inner);
    const bn_index at = (place.run * call->inner + place.from) * call->kernels->itemsize;
    call->kernels->row_normalize(call->x + at, bn_at(call->residual, at), call->y + at, place.runs,
                                 place.length, call->inner, call->affine, call->packed,
                                 call->channels, place.run % call->channels, call->relu);
}

static void bn_row_gradient(bn_call *call, bn_index unit)
{
    const bn_place place =
        bn_tile_place(call->units, unit, call->outer * call->channels, call->inner);
    const bn_index at = (place.run * call->inner + place.from) * call->kernels->itemsize;
    call->kernels->row_gradient(call->dy + at, call->x + at, bn_at(call->y_in, at), call->dx + at,
                                bn_out(call->dresidual, at), place.runs, place.length, call->inner,
                                call->gradient, call->packed, call->channels,
                                place.run % call->channels);
}

/* Where channel c packs its own numbers, when it does not wait for the others. */
static inline char *bn_own_packed(const bn_call *call, bn_index c)
{
    return call->packed + c * BN_PACKED * sizeof(double);
}

/* A whole channel by one thread, while it is in the cache. */
static void bn_channel_train(bn_call *call, bn_index c)
{
    const bn_index at = c * call->inner * call->kernels->itemsize;
    for (bn_index t = 0; t < call->tiles.count; t++)
        bn_row_moments(call, c * call->tiles.count + t);
    bn_moments_to_affine(call, c);
    call->kernels->pack_affine(call->affine + c, 1, bn_own_packed(call, c));
    call->kernels->row_normalize(call->x + at, bn_at(call->residual, at), call->y + at,
                                 call->outer, call->inner, call->channels * call->inner,
                                 call->affine + c, bn_own_packed(call, c), 1, 0, call->relu);
}

static void bn_channel_backward(bn_call *call, bn_index c)
{
    const bn_index at = c * call->inner * call->kernels->itemsize;
    for (bn_index t = 0; t < call->tiles.count; t++)
        bn_row_sums(call, c * call->tiles.count + t);
    bn_sums_to_gradient(call, c);
    call->kernels->pack_gradient(call->gradient + c, 1, bn_own_packed(call, c));
    call->kernels->row_gradient(call->dy + at, call->x + at, bn_at(call->y_in, at), call->dx + at,
                                bn_out(call->dresidual, at), call->outer, call->inner,
                                call->channels * call->inner, call->gradient + c,
                                bn_own_packed(call, c), 1, 0);
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

static inline int bn_streams(const bn_call *call)
{
    return call->ahead && call->y != call->x && call->y != call->residual;
}

static void bn_column_normalize(bn_call *call, bn_index span)
{
    bn_index elements;
    const bn_index at = bn_span(call, span, &elements);
    call->kernels->column_normalize(call->x + at, bn_at(call->residual, at), call->y + at, elements,
                                    call->width, bn_streams(call), call->affine, call->packed,
                                    call->relu);
}

static void bn_column_gradient(bn_call *call, bn_index span)
{
    bn_index elements;
    const bn_index at = bn_span(call, span, &elements);
    call->kernels->column_gradient(call->dy + at, call->x + at, bn_at(call->y_in, at),
                                   call->dx + at, bn_out(call->dresidual, at), elements,
                                   call->width, call->gradient, call->packed);
}

#endif
