/* The threads of a call: they share its phases in one parallel region. */

#ifndef BNFAST_TEAM_H
#define BNFAST_TEAM_H

#include "tasks.h"

#ifdef _OPENMP
#include <omp.h>
#define BN_OPENMP 1
#define BN_PAUSE() omp_pause_resource_all(omp_pause_hard)
#else
#define BN_OPENMP 0
#define BN_PAUSE() 0
#endif

typedef struct {
    bn_task task;
    bn_index parts;
} bn_phase;

/* The share of one of `threads` threads in all parts of a phase: adjacent ones. */
static inline void bn_share(bn_call *call, bn_phase phase, bn_index thread, bn_index threads)
{
    const bn_index end = phase.parts * (thread + 1) / threads;
    for (bn_index part = phase.parts * thread / threads; part < end; part++)
        phase.task(call, part);
}

/* Run the phases one after the other, the parts of each in any order.

   One thread does not enter the OpenMP runtime, where even a region of one costs 1.2 us; a first
   phase of at most one part is over before another thread has come. */
static void bn_run(bn_call *call, const bn_phase *phases, int count, int num_threads)
{
    int alone = count;
#if BN_OPENMP
    if (num_threads > 1)
        alone = phases[0].parts <= 1;
#endif
    for (int p = 0; p < alone; p++)
        bn_share(call, phases[p], 0, 1);
#if BN_OPENMP
    if (alone == count)
        return;
#pragma omp parallel num_threads(num_threads)
    for (int p = alone; p < count; p++) {
        bn_share(call, phases[p], omp_get_thread_num(), omp_get_num_threads());
        if (p + 1 < count) {
#pragma omp barrier
        }
    }
#endif
}

#endif
