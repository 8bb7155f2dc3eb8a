#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define VARIANT avx2
#define LANES 8
#define HAS_AVX2 1
#include "variant.inc"
#endif
