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
double mac___exp10(double x) { return exp10(x); }
// Of MLX's wheels for macOS 15 and later.
_Float16 mac___fmaxf16(_Float16 x, _Float16 y) { return (_Float16)fmaxf(x, y); }
_Float16 mac___fminf16(_Float16 x, _Float16 y) { return (_Float16)fminf(x, y); }

#define ONE(name)                                                \
  Doubles mac__simd_##name##_d2(Doubles x) {                     \
    return (Doubles){name(x[0]), name(x[1])};                    \
  }                                                              \
  Floats mac__simd_##name##_f4(Floats x) {                       \
    return (Floats){name##f(x[0]), name##f(x[1]), name##f(x[2]), \
                    name##f(x[3])};                              \
  }
#define TWO(name)                                              \
  Doubles mac__simd_##name##_d2(Doubles x, Doubles y) {        \
    return (Doubles){name(x[0], y[0]), name(x[1], y[1])};      \
  }                                                            \
  Floats mac__simd_##name##_f4(Floats x, Floats y) {           \
    return (Floats){name##f(x[0], y[0]), name##f(x[1], y[1]),  \
                    name##f(x[2], y[2]), name##f(x[3], y[3])}; \
  }
#define SIMD_ONE(X)                                                           \
  X(acos)                                                                     \
  X(acosh)                                                                    \
  X(asin) X(asinh) X(atan) X(atanh) X(cosh) X(expm1) X(log) X(log10) X(log1p) \
      X(log2) X(sinh) X(tan) X(tanh)
#define SIMD_TWO(X) X(atan2) X(pow) X(remainder)
SIMD_ONE(ONE)
SIMD_TWO(TWO)
