// Plain matrix products for MLX's CPU stream, by the interface of CBLAS.
#include <complex.h>
#include <stddef.h>

enum { kRowMajor = 101, kTransposed = 112, kConjugated = 113 };

#define GEMM(letter, type, scalar_of, scalar, conjugate)                     \
  void cblas_##letter##gemm(                                                 \
      int order, int ta, int tb, int m, int n, int k, scalar alpha_,         \
      const type* a, int lda, const type* b, int ldb, scalar beta_, type* c, \
      int ldc) __asm("_cblas_" #letter "gemm$NEWLAPACK");                    \
  void cblas_##letter##gemm(int order, int ta, int tb, int m, int n, int k,  \
                            scalar alpha_, const type* a, int lda,           \
                            const type* b, int ldb, scalar beta_, type* c,   \
                            int ldc) {                                       \
    const type alpha = scalar_of(alpha_), beta = scalar_of(beta_);           \
    /* by columns it is the product of the transposed, in the other order */ \
    if (order != kRowMajor) {                                                \
      const type* matrix = a;                                                \
      int number = lda, kind = ta, size = m;                                 \
      a = b, lda = ldb, ta = tb, m = n;                                      \
      b = matrix, ldb = number, tb = kind, n = size;                         \
    }                                                                        \
    for (int i = 0; i < m; i++)                                              \
      for (int j = 0; j < n; j++) {                                          \
        type sum = 0;                                                        \
        for (int l = 0; l < k; l++) {                                        \
          type x = ta >= kTransposed ? a[(size_t)l * lda + i]                \
                                     : a[(size_t)i * lda + l];               \
          type y = tb >= kTransposed ? b[(size_t)j * ldb + l]                \
                                     : b[(size_t)l * ldb + j];               \
          sum += (ta == kConjugated ? conjugate(x) : x) *                    \
                 (tb == kConjugated ? conjugate(y) : y);                     \
        }                                                                    \
        type* to = &c[(size_t)i * ldc + j];                                  \
        *to = alpha * sum + (beta == 0 ? 0 : beta * *to);                    \
      }                                                                      \
  }

#define SAME(x) (x)
#define POINTED(x) (*(const float complex*)(x))
GEMM(s, float, SAME, float, SAME)
GEMM(d, double, SAME, double, SAME)
GEMM(c, float complex, POINTED, const void*, conjf)
