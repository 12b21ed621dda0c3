/* Sums of a channel from those of its parts.

   Sums leave the results of each part in a table, call->moments or call->sums:

   channels-first: tile t of channel c               row t * channels + c
   channels-last:  part p, column j of a wide row    row p * width + j
                   the partial wide row              part number `parts`, of the columns it has

   It is walked along its rows, BN_GROUP channels at a time: one channel at a time would touch a
   cache line for each entry. */

#ifndef BNFAST_MERGE_H
#define BNFAST_MERGE_H

#include "call.h"

static inline bn_index bn_entries(const bn_call *call)
{
    return call->rows ? call->fold * (call->parts + (call->rest != 0)) : call->tiles.count;
}

/* Find entry e of channel c: its row in the table, and how many elements are behind it. */
static inline double bn_entry(const bn_call *call, bn_index c, bn_index e, bn_index *row)
{
    if (!call->rows) {
        const bn_place place = bn_find_place(call->tiles, e, call->outer, call->inner);
        *row = e * call->channels + c;
        return (double)place.runs * (double)place.length;
    }
    const bn_index part = e / call->fold, column = e % call->fold * call->channels + c;
    *row = part * call->width + column;
    if (part == call->parts)
        return column < call->rest ? 1.0 : 0.0;
    return (double)bn_min(call->part_rows, call->rows - part * call->part_rows);
}

/* Add to a sum, and to `lost` what the rounding of that took away (Knuth's TwoSum). */
static inline double bn_add_exactly(double sum, double term, double *lost)
{
    const double total = sum + term, added = total - sum;
    *lost += (sum - (total - added)) + (term - added);
    return total;
}

/* What is lost to infinity is not a number, and says nothing. */
static inline double bn_with_lost(double sum, double lost)
{
    return isfinite(sum + lost) ? sum + lost : sum;
}

/* Moments of up to BN_GROUP channels from those of their parts: first the mean, then the squares
   about it, and with them what the first mean was off by. Differences of means are small numbers,
   so that no digit is lost to a large mean. Few rows of few channels leave an entry for each
   element: one after the other, without what is lost, their squares would be off by some units of
   the last place. */
static void bn_merge_moments(bn_call *call, bn_index first, bn_index size)
{
    const bn_index entries = bn_entries(call);
    bn_index row;
    bn_moments total[BN_GROUP];
    double shifted[BN_GROUP], lost[BN_GROUP];
    for (bn_index i = 0; i < size; i++) {
        const bn_moments none = {0.0, 0.0, 0.0};
        total[i] = entries ? call->moments[first + i] : none;
        shifted[i] = lost[i] = 0.0;
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
            total[i].m2 = bn_add_exactly(total[i].m2, call->moments[row + i].m2 + n * d * d,
                                         &lost[i]);
        }
    }
    for (bn_index i = 0; i < size; i++) {
        const double off = entries > 1 ? shifted[i] / call->count : 0.0;
        call->mean[first + i] = total[i].mean + (total[i].low + off);
        call->m2[first + i] = bn_with_lost(total[i].m2, lost[i]);
    }
}

/* Few rows of few channels leave a thousand entries. One after the other, with samples that repeat
   each other, they would be off by 200 units of the last place. */
static void bn_merge_sums(bn_call *call, bn_index first, bn_index size)
{
    const bn_index entries = bn_entries(call);
    bn_index row;
    bn_sums total[BN_GROUP], lost[BN_GROUP];
    for (bn_index i = 0; i < size; i++)
        total[i].dy = total[i].dy_x = lost[i].dy = lost[i].dy_x = 0.0;
    for (bn_index e = 0; e < entries; e++) {
        const double n = bn_entry(call, first, e, &row);
        for (bn_index i = 0; n && i < size; i++) {
            const bn_sums part = call->sums[row + i];
            total[i].dy = bn_add_exactly(total[i].dy, part.dy, &lost[i].dy);
            total[i].dy_x = bn_add_exactly(total[i].dy_x, part.dy_x, &lost[i].dy_x);
        }
    }
    for (bn_index i = 0; i < size; i++) {
        const double dy_x = bn_with_lost(total[i].dy_x, lost[i].dy_x);
        call->sum_dy[first + i] = bn_with_lost(total[i].dy, lost[i].dy);
        call->sum_dy_xhat[first + i] = entries ? dy_x * call->invstd[first + i] : 0.0;
    }
}

#endif
