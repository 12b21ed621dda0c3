/* One entry of the dispatch table: the kernels at STORE, REAL and BN_TARGET. */

static const bn_kernels FN(kernels) = {
    sizeof(STORE),        sizeof(REAL),         FN(row_moments),      FN(row_sums),
    FN(column_moments),   FN(column_sums),      FN(row_normalize),    FN(column_normalize),
    FN(row_gradient),     FN(column_gradient),  FN(find_affine),      FN(pack_gradient),
};
