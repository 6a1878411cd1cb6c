// Mathematics that libSystem has under its own names: of vectors, of sine and
// cosine together.
#define _GNU_SOURCE
#include <math.h>

#include "shims.h"

typedef double Doubles __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));
typedef struct {
  double sine, cosine;
} SineCosine;
typedef struct {
  float sine, cosine;
} SineCosineF;

SineCosine mac___sincos_stret(double x) { return (SineCosine){sin(x), cos(x)}; }
SineCosineF mac___sincosf_stret(float x) {
  return (SineCosineF){sinf(x), cosf(x)};
}

// The two of double, the four of float; a function of one argument ignores `y`.
#define VECTORS(name)                                          \
  Doubles mac__simd_##name##_d2(Doubles x, Doubles y) {        \
    return (Doubles){CALL(name, x[0], y[0]),                   \
                     CALL(name, x[1], y[1])};                  \
  }                                                            \
  Floats mac__simd_##name##_f4(Floats x, Floats y) {           \
    return (Floats){                                           \
        CALL(name##f, x[0], y[0]), CALL(name##f, x[1], y[1]),  \
        CALL(name##f, x[2], y[2]), CALL(name##f, x[3], y[3])}; \
  }
#define CALL(name, x, y) ((void)(y), name(x))
SIMD_ONE(VECTORS)
#undef CALL
#define CALL(name, x, y) name(x, y)
SIMD_TWO(VECTORS)
