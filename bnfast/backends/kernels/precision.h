/* The kernels for every dtype at one instruction set, BN_TARGET. BN_LEVEL is what it has: 1 for AVX2,
   FMA and F16C, 2 for AVX-512 too, 0 for neither.
   Included once per instruction set, on purpose: no include guard.

   REAL is what is computed in, STORE what arrays hold: the same, or 16 bits beside float. */

#define REAL float
#define BN_IS_DOUBLE 0

#define STORE float
#define BN_STORAGE BN_PLAIN
#define FN(name) BN_JOIN(name, float, BN_TARGET)
#include "instance.h"

#define STORE uint16_t
#define BN_STORAGE BN_HALF
#define FN(name) BN_JOIN(name, half, BN_TARGET)
#include "instance.h"

#define STORE uint16_t
#define BN_STORAGE BN_BFLOAT
#define FN(name) BN_JOIN(name, bfloat, BN_TARGET)
#include "instance.h"

#undef REAL
#undef BN_IS_DOUBLE
#define REAL double
#define BN_IS_DOUBLE 1

#define STORE double
#define BN_STORAGE BN_PLAIN
#define FN(name) BN_JOIN(name, double, BN_TARGET)
#include "instance.h"

#undef REAL
#undef BN_IS_DOUBLE
