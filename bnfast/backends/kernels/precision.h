/* The kernels for float and for double at one instruction set, BN_TARGET, and their tables.
   Included once per instruction set, on purpose: no include guard. */

#define REAL float
#define FN(name) BN_JOIN(name, float, BN_TARGET)
#define BN_IS_DOUBLE 0
#include "rows.h"
#include "columns.h"
#include "table.h"
#undef REAL
#undef FN
#undef BN_IS_DOUBLE

#define REAL double
#define FN(name) BN_JOIN(name, double, BN_TARGET)
#define BN_IS_DOUBLE 1
#include "rows.h"
#include "columns.h"
#include "table.h"
#undef REAL
#undef FN
#undef BN_IS_DOUBLE
