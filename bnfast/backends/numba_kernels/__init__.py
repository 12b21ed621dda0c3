"""The loops behind `bnfast.backends.numba_parallel`, one module per array form.

    compiling   a kernel's source -> machine code, by dtype and with or without threads
    lanes       sixteen numbers side by side: the type that the kernels compute with
    team        how many threads Numba uses
    addresses   arrays as kernels see them, and the ways between memory and lanes
    arithmetic  the steps that both forms share: merging moments, numbers of channels, y, dx
    walks       elementwise passes along the flat output, in whole cache lines
    tiles       sums over channels-first arrays
    blocks      sums over channels-last arrays
    rows        kernels for channels-first (N, C, S): a channel is N runs of S adjacent elements
    columns     kernels for channels-last (M, C): a channel is a column

A kernel is an undecorated function that ends in ``threads``. `compiling` builds it with
``parallel=True`` and without: there `prange` is `range`, and the caller passes ``threads=1``.

How the same bits come out for any number of threads: sums are taken over blocks that the shape
alone determines, the blocks are merged in ascending order, and within a block `lanes` fixes the
order of every addition.
"""
