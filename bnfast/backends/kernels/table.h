/* One entry of the dispatch table: the kernels of rows.h and columns.h at REAL and BN_TARGET. */

#define BN_TEXT_(x) #x
#define BN_TEXT(x) BN_TEXT_(x)

static const bn_kernels FN(kernels) = {
    BN_TEXT(BN_TARGET),   sizeof(REAL),         FN(row_moments),      FN(row_normalize),
    FN(row_sums),         FN(row_gradient),     FN(column_moments),   FN(column_normalize),
    FN(column_sums),      FN(column_gradient),  FN(pack_affine),      FN(pack_gradient),
};

#undef BN_TEXT
#undef BN_TEXT_
