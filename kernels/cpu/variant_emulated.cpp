// For tests on machines without AVX-512: sixteen lanes and bf16 dot products, spelled in AVX2. Built only on request.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(MODELPORT_EMULATE)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define VARIANT emulated
#define LANES 16
#define DOT_BF16 1
#define HAS_AVX2 1
#include "variant.inc"
#endif
