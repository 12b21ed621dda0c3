"""The device side of `bnfast.backends.numba_cuda`, one module per concern.

    driver      the only file that imports `cuda`: what kernels call, on a GPU and in the simulator
    elements    how they are stored, and what they are computed in
    arithmetic  one element, one vector of them, one channel: device functions without barriers
    batches     several vectors of a thread at a time
    reductions  sums over the threads of a block
    rows        kernels for channels-first (N, C, S): a channel is N runs of S adjacent elements
    columns     kernels for channels-last (M, C): a channel is a column
    merging     a channel's result from those of its parts
    geometry    how arrays are cut into parts, by their shape alone
    signatures  what kernels are compiled for
    launch      compiled kernels, grids, and what goes up to the device and comes down
    arrays      what the backend takes for an array; with `copying` and `dlpack`
    failures    what can be wrong with a GPU, and the sentence for it

A kernel is an undecorated function made by a factory, `factory(real)`, that computes in the type
``real``. `launch` compiles it for the signature that its annotations spell. Arrays come as bare
pointers: an argument costs one word, and kernels read ``x[i]`` with 64-bit ``i``.

How the same bits come out of every run, on any GPU: parts are cut by the shape alone, each part is
summed by one block in an order that only the number of threads in a block fixes, and the parts are
merged in ascending order. How many blocks there are decides only who does what.
"""
