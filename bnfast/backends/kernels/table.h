/* One entry of the dispatch table: the kernels of rows.h and columns.h at REAL and BN_TARGET. */

static const bn_kernels FN(kernels) = {
    sizeof(REAL),        FN(row_moments),     FN(row_normalize),    FN(row_sums),
    FN(row_gradient),    FN(column_moments),  FN(column_normalize), FN(column_sums),
    FN(column_gradient), FN(pack_affine),     FN(pack_gradient),
};
