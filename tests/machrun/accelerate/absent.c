// The rest of what MLX imports of Accelerate: nothing under test calls it, so a
// call ends the process and names the function.
#include <stdio.h>
#include <stdlib.h>

#define ABSENT(name, symbol)                                      \
  void name(void) __asm(symbol);                                  \
  void name(void) {                                               \
    fputs("machrun: Accelerate has no " #name " here\n", stderr); \
    abort();                                                      \
  }
#define LAPACK(name) ABSENT(name, "_" #name "$NEWLAPACK")

LAPACK(cgeev)
LAPACK(cgesdd)
LAPACK(cheevd)
LAPACK(dgeev)
LAPACK(dgeqrf)
LAPACK(dgesdd)
LAPACK(dgetrf)
LAPACK(dgetri)
LAPACK(dorgqr)
LAPACK(dpotrf)
LAPACK(dsyevd)
LAPACK(dtrtri)
LAPACK(sgeev)
LAPACK(sgeqrf)
LAPACK(sgesdd)
LAPACK(sgetrf)
LAPACK(sgetri)
LAPACK(sorgqr)
LAPACK(spotrf)
LAPACK(ssyevd)
LAPACK(strtri)
ABSENT(BNNSFilterApplyTwoInput, "_BNNSFilterApplyTwoInput")
ABSENT(BNNSFilterCreateLayerBroadcastMatMul,
       "_BNNSFilterCreateLayerBroadcastMatMul")
ABSENT(BNNSFilterDestroy, "_BNNSFilterDestroy")
