#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#define VARIANT avx512
#define LANES 16
#define HAS_AVX512 1
#include "variant.inc"
#endif
