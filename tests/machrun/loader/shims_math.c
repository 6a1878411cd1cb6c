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
// Of MLX's wheels for macOS 15 and later.
_Float16 mac___fmaxf16(_Float16 x, _Float16 y) { return (_Float16)fmaxf(x, y); }
_Float16 mac___fminf16(_Float16 x, _Float16 y) { return (_Float16)fminf(x, y); }

// The compiler's own, the same everywhere.
unsigned __int128 mac___udivti3(unsigned __int128 x, unsigned __int128 y) {
  return x / y;
}
__int128 mac___divti3(__int128 x, __int128 y) { return x / y; }
extern float _Complex __mulsc3(float, float, float, float);
float _Complex mac___mulsc3(float a, float b, float c, float d) {
  return __mulsc3(a, b, c, d);
}

// The two of double, the four of float; a function of one argument ignores `y`.
#define VECTORS(name)                                                      \
  Doubles mac__simd_##name##_d2(Doubles x, Doubles y) {                    \
    return (Doubles){CALL(name, x[0], y[0]), CALL(name, x[1], y[1])};      \
  }                                                                        \
  Floats mac__simd_##name##_f4(Floats x, Floats y) {                       \
    return (Floats){CALL(name##f, x[0], y[0]), CALL(name##f, x[1], y[1]),  \
                    CALL(name##f, x[2], y[2]), CALL(name##f, x[3], y[3])}; \
  }
#define CALL(name, x, y) ((void)(y), name(x))
// clang-format off
VECTORS(acos) VECTORS(acosh) VECTORS(asin) VECTORS(asinh) VECTORS(atan)
VECTORS(atanh) VECTORS(cosh) VECTORS(expm1) VECTORS(log) VECTORS(log10)
VECTORS(log1p) VECTORS(log2) VECTORS(sinh) VECTORS(tan) VECTORS(tanh)
#undef CALL
#define CALL(name, x, y) name(x, y)
VECTORS(atan2) VECTORS(pow) VECTORS(remainder)
