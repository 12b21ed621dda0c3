"""The rooms where the arithmetic is done, one file each; the registry imports them on first use.

numpy_reference    the definition, written like the formula; the last resort
cython_openmp      C row kernels compiled per instruction set, OpenMP ``prange``
numba_parallel     ``@njit(parallel=True)``, compiled on first use
host_arrays        not a backend: how the three above see NumPy arrays
"""
