# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, autotestdict=False
"""The kernels in C with OpenMP (kernels/*.h), called with the arrays of the contract.

A contract function describes a call (kernels/call.h), names its phases, and runs them. A phase is a
task (kernels/tasks.h) and a number of parts. Sums are cut by shape alone, each part writes its own
results, and they are combined in order: the bits do not depend on the threads, which share all
phases of a call in one parallel region (kernels/team.h), nor on the caches, for which slabs of
channels are cut. The region is in C, since Cython 3.3 writes ``omp for nowait`` for a ``prange``
inside ``parallel``: nothing would promise that a phase is over before the next one begins.
"""

cimport numpy as cnp
from libc.stdlib cimport free

from bnfast.backends import caches
from bnfast.backends import host_arrays
from bnfast.backends.host_arrays import accepts, empty

cnp.import_array()

cdef extern from "kernels/team.h" nogil:
    ctypedef struct bn_kernels:
        pass
    ctypedef struct bn_cut:
        Py_ssize_t count
    ctypedef struct bn_call:
        Py_ssize_t inner, rows, spans, slabs
        bn_cut tiles, units
        const char *x
        const char *residual
        const char *dy
        const char *y_in
        char *y
        char *dx
        char *dresidual
        double *mean
        double *m2
        double *sum_dy
        double *sum_dy_xhat
        const double *var
        const double *weight
        const double *bias
        const double *invstd
        double eps, count
        int relu, large, stream
    ctypedef void (*bn_task)(bn_call *, Py_ssize_t) noexcept nogil
    ctypedef struct Phase "bn_phase":
        bn_task task
        Py_ssize_t parts
    void bn_run(bn_call *, const Phase *, int count, int num_threads)
    const bint BN_OPENMP
    int BN_PAUSE()
    const bn_kernels *bn_table[][4]
    int bn_highest_level()
    Py_ssize_t bn_core_cache, bn_last_cache
    void bn_describe(
        bn_call *, const bn_kernels *, Py_ssize_t, Py_ssize_t, Py_ssize_t, int, Py_ssize_t,
        Py_ssize_t, Py_ssize_t
    )
    void *bn_allocate(bn_call *, int needs)
    enum:
        BN_MOMENTS, BN_SUMS, BN_FACTORS
    Py_ssize_t bn_panels(const bn_call *)
    Py_ssize_t bn_groups(const bn_call *)
    Py_ssize_t bn_preludes(const bn_call *)
    void bn_affine_prelude(bn_call *, Py_ssize_t) noexcept
    void bn_gradient_prelude(bn_call *, Py_ssize_t) noexcept
    void bn_wide_mean_prelude(bn_call *, Py_ssize_t) noexcept
    void bn_combine_moments(bn_call *, Py_ssize_t) noexcept
    void bn_combine_sums(bn_call *, Py_ssize_t) noexcept
    void bn_moments_to_affine(bn_call *, Py_ssize_t) noexcept
    void bn_sums_to_gradient(bn_call *, Py_ssize_t) noexcept
    void bn_row_moments(bn_call *, Py_ssize_t) noexcept
    void bn_row_sums(bn_call *, Py_ssize_t) noexcept
    void bn_row_normalize(bn_call *, Py_ssize_t) noexcept
    void bn_row_gradient(bn_call *, Py_ssize_t) noexcept
    void bn_slab_train(bn_call *, Py_ssize_t) noexcept
    void bn_slab_backward(bn_call *, Py_ssize_t) noexcept
    void bn_column_moments(bn_call *, Py_ssize_t) noexcept
    void bn_column_sums(bn_call *, Py_ssize_t) noexcept
    void bn_column_normalize(bn_call *, Py_ssize_t) noexcept
    void bn_column_gradient(bn_call *, Py_ssize_t) noexcept

cdef extern from *:
    const unsigned long CYTHON_HEX_VERSION

STORAGE_DTYPES = ("float16", "bfloat16")
OPENMP = bool(BN_OPENMP)
CYTHON_VERSION = ".".join([str(CYTHON_HEX_VERSION >> shift & 255) for shift in (24, 16, 8)])

cdef tuple LEVELS = ("baseline", "x86-64-v3", "x86-64-v4")
cdef int level = bn_highest_level()


def limit_instruction_set(name):
    """Use no higher instruction set than ``name``, and none that the CPU does not have."""
    global level
    if name not in LEVELS:
        raise ValueError(f"expected one of {', '.join(LEVELS)}, got {name!r}")
    level = min(bn_highest_level(), LEVELS.index(name))


def assume_caches(Py_ssize_t core, Py_ssize_t last):
    """Cut the work for caches of so many bytes; the results do not depend on it."""
    global bn_core_cache, bn_last_cache
    bn_core_cache, bn_last_cache = core, last


assume_caches(*caches.sizes())


def unavailable():
    """Return None: where this module can be imported, it can run."""
    return None


def instruction_set():
    """Return the instruction set that the row kernels use."""
    return LEVELS[level]


def before_fork():
    """Stop OpenMP's threads: they would not exist in the child, which would wait for them."""
    BN_PAUSE()


def view(cnp.ndarray x, plan):
    """See `bnfast.backends.host_arrays.view`; an array that is a form already takes half its time."""
    cdef cnp.npy_intp[3] lengths
    cdef cnp.PyArray_Dims shape
    cdef tuple kernel_shape
    cdef int axis
    if plan.axes is None and cnp.PyArray_ISCARRAY_RO(x) and x.descr is plan.dtype:
        kernel_shape = plan.kernel_shape
        shape.ptr, shape.len = lengths, len(kernel_shape)
        for axis in range(shape.len):
            lengths[axis] = kernel_shape[axis]
        return cnp.PyArray_Newshape(x, &shape, cnp.NPY_CORDER)
    return host_arrays.view(x, plan)


cdef inline char *address(cnp.ndarray array) noexcept:
    return NULL if array is None else cnp.PyArray_BYTES(array)


cdef inline double *channels(cnp.ndarray vector) noexcept:
    return <double *>cnp.PyArray_DATA(vector)


cdef inline int column_of(int dtype) noexcept:
    """The column of the table for a dtype; bfloat16 has a number that NumPy gives when it is made."""
    if dtype == cnp.NPY_FLOAT32:
        return 0
    return 1 if dtype == cnp.NPY_FLOAT64 else 2 if dtype == cnp.NPY_FLOAT16 else 3


cdef inline void describe(
    bn_call *call, cnp.ndarray x, int inputs, int outputs, int num_threads
) noexcept:
    """Describe a call that reads and writes so many arrays like ``x``."""
    cdef bint last = cnp.PyArray_NDIM(x) == 2
    bn_describe(
        call,
        bn_table[level][column_of(cnp.PyArray_TYPE(x))],
        cnp.PyArray_DIM(x, 0),
        cnp.PyArray_DIM(x, 1),
        1 if last else cnp.PyArray_DIM(x, 2),
        last,
        inputs,
        outputs,
        num_threads,
    )
    call.x = address(x)


cdef int start(
    bn_call *call, const Phase *phases, int count, int num_threads, int needs
) except -1:
    """Allocate what the phases need, run them, free it."""
    cdef void *workspace = bn_allocate(call, needs)
    if workspace is NULL:
        raise MemoryError("no memory for the channel sums")
    with nogil:
        bn_run(call, phases, count, num_threads)
        free(workspace)
    return 0


cdef inline bint keeps_channels_whole(const bn_call *call, int num_threads) noexcept nogil:
    """Whether each channel is best done by one thread, in its cache.

    Not if threads would idle; and not for short runs that the last-level cache holds, where one
    pass over all is better foreseen than one over slabs (7x7 planes, training: 1.15 times).
    """
    if call.slabs == 0 or call.inner < 128 and not call.large:
        return False
    return call.slabs % num_threads == 0 or call.slabs >= 8 * num_threads


def moments(
    cnp.ndarray x,                                          # IN
    *, cnp.ndarray mean, cnp.ndarray m2,                    # OUT
    int num_threads,
):
    """See `bnfast.spec.Kernels.moments`."""
    cdef bn_call call
    cdef Phase[2] phases
    describe(&call, x, 1, 0, num_threads)
    call.mean, call.m2 = channels(mean), channels(m2)
    if call.rows:
        phases[0] = Phase(bn_column_moments, bn_panels(&call))
    else:
        phases[0] = Phase(bn_row_moments, call.slabs * call.tiles.count)
    phases[1] = Phase(bn_combine_moments, bn_groups(&call))
    start(&call, phases, 2, num_threads, BN_MOMENTS)


def normalize(
    cnp.ndarray x, cnp.ndarray mean, cnp.ndarray var, cnp.ndarray weight, cnp.ndarray bias,
    double eps, cnp.ndarray residual,                       # IN
    *, cnp.ndarray y,                                       # OUT
    bint relu, int num_threads,
):
    """See `bnfast.spec.Kernels.normalize`."""
    cdef bn_call call
    cdef Phase[2] phases
    describe(&call, x, 1, 1, num_threads)
    call.mean, call.var = channels(mean), channels(var)
    call.weight, call.bias = channels(weight), channels(bias)
    call.eps, call.relu = eps, relu
    write_forward(&call, residual, y)
    phases[0] = Phase(bn_affine_prelude, bn_preludes(&call))
    if call.rows:
        phases[1] = Phase(bn_column_normalize, call.spans)
    else:
        phases[1] = Phase(bn_row_normalize, call.units.count)
    start(&call, phases, 2, num_threads, BN_FACTORS)


def train(
    cnp.ndarray x, cnp.ndarray weight, cnp.ndarray bias, double eps, cnp.ndarray residual,  # IN
    *, cnp.ndarray y, cnp.ndarray mean, cnp.ndarray m2,                                     # OUT
    bint relu, int num_threads,
):
    """See `bnfast.spec.Kernels.train`."""
    cdef bn_call call
    cdef Phase[3] phases
    cdef int count = 3
    describe(&call, x, 1, 1, num_threads)
    call.mean, call.m2 = channels(mean), channels(m2)
    call.weight, call.bias = channels(weight), channels(bias)
    call.eps, call.relu = eps, relu
    write_forward(&call, residual, y)
    phases[1] = Phase(bn_moments_to_affine, bn_groups(&call))
    if call.rows:
        phases[0] = Phase(bn_column_moments, bn_panels(&call))
        phases[2] = Phase(bn_column_normalize, call.spans)
    elif keeps_channels_whole(&call, num_threads):
        phases[0] = Phase(bn_slab_train, call.slabs)
        count = 1
    else:
        phases[0] = Phase(bn_row_moments, call.slabs * call.tiles.count)
        phases[2] = Phase(bn_row_normalize, call.units.count)
    start(&call, phases, count, num_threads, BN_MOMENTS | BN_FACTORS)


cdef inline void write_forward(bn_call *call, cnp.ndarray residual, cnp.ndarray y) noexcept:
    """Describe what a forward call adds, and where and how it writes."""
    call.residual, call.y = address(residual), address(y)
    call.stream = call.y != call.x and call.y != call.residual and call.large


def backward_sums(
    cnp.ndarray dy, cnp.ndarray x, cnp.ndarray y, cnp.ndarray mean, cnp.ndarray invstd,     # IN
    *, cnp.ndarray sum_dy, cnp.ndarray sum_dy_xhat,                                         # OUT
    bint relu, int num_threads,
):
    """See `bnfast.spec.Kernels.backward_sums`."""
    cdef bn_call call
    cdef Phase[3] phases
    cdef int count
    read_backward(&call, dy, x, y, mean, invstd, num_threads)
    call.sum_dy, call.sum_dy_xhat = channels(sum_dy), channels(sum_dy_xhat)
    count = sum_phases(&call, phases)
    phases[count] = Phase(bn_combine_sums, bn_groups(&call))
    start(&call, phases, count + 1, num_threads, BN_SUMS)


def backward_input(
    cnp.ndarray dy, cnp.ndarray x, cnp.ndarray y, cnp.ndarray mean, cnp.ndarray invstd,
    cnp.ndarray weight, cnp.ndarray sum_dy, cnp.ndarray sum_dy_xhat, Py_ssize_t count,      # IN
    *, cnp.ndarray dx, cnp.ndarray dresidual,                                               # OUT
    bint relu, int num_threads,
):
    """See `bnfast.spec.Kernels.backward_input`."""
    cdef bn_call call
    cdef Phase[2] phases
    read_backward(&call, dy, x, y, mean, invstd, num_threads)
    call.sum_dy, call.sum_dy_xhat = channels(sum_dy), channels(sum_dy_xhat)
    call.weight, call.count = channels(weight), count
    write_backward(&call, dx, dresidual)
    phases[0] = Phase(bn_gradient_prelude, bn_preludes(&call))
    phases[1] = gradient_phase(&call)
    start(&call, phases, 2, num_threads, BN_FACTORS)


def backward(
    cnp.ndarray dy, cnp.ndarray x, cnp.ndarray y, cnp.ndarray mean, cnp.ndarray invstd,
    cnp.ndarray weight,                                                                     # IN
    *, cnp.ndarray dx, cnp.ndarray dresidual, cnp.ndarray sum_dy, cnp.ndarray sum_dy_xhat,  # OUT
    bint relu, int num_threads,
):
    """See `bnfast.spec.Kernels.backward`."""
    cdef bn_call call
    cdef Phase[4] phases
    cdef int count
    read_backward(&call, dy, x, y, mean, invstd, num_threads)
    call.sum_dy, call.sum_dy_xhat = channels(sum_dy), channels(sum_dy_xhat)
    call.weight = channels(weight)
    write_backward(&call, dx, dresidual)
    if not call.rows and keeps_channels_whole(&call, num_threads):
        phases[0] = Phase(bn_slab_backward, call.slabs)
        count = 1
    else:
        count = sum_phases(&call, phases)
        phases[count] = Phase(bn_sums_to_gradient, bn_groups(&call))
        phases[count + 1] = gradient_phase(&call)
        count += 2
    start(&call, phases, count, num_threads, BN_SUMS | BN_FACTORS)


cdef inline void read_backward(
    bn_call *call, cnp.ndarray dy, cnp.ndarray x, cnp.ndarray y, cnp.ndarray mean,
    cnp.ndarray invstd, int num_threads,
) noexcept:
    """Describe what a backward call reads."""
    describe(call, x, 2 if y is None else 3, 1, num_threads)
    call.dy, call.y_in = address(dy), address(y)
    call.mean, call.invstd = channels(mean), channels(invstd)


cdef inline void write_backward(bn_call *call, cnp.ndarray dx, cnp.ndarray dresidual) noexcept:
    """Describe where and how a backward call writes."""
    call.dx, call.dresidual = address(dx), address(dresidual)
    call.stream = call.dx != call.dy and call.large


cdef inline int sum_phases(bn_call *call, Phase *phases) noexcept:
    """Name the phases that leave the sums of all parts in the table; return how many they are."""
    if call.rows:
        phases[0] = Phase(bn_wide_mean_prelude, bn_preludes(call))
        phases[1] = Phase(bn_column_sums, bn_panels(call))
        return 2
    phases[0] = Phase(bn_row_sums, call.slabs * call.tiles.count)
    return 1


cdef inline Phase gradient_phase(const bn_call *call) noexcept:
    if call.rows:
        return Phase(bn_column_gradient, call.spans)
    return Phase(bn_row_gradient, call.units.count)
