#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512bf16,avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#define VARIANT avx512bf16
#define LANES 16
#define DOT_BF16 1
#define HAS_AVX512 1
#define HAS_AVX512BF16 1
#define HAS_AVX512VNNI 1  // every processor with the one has the other
#include "variant.inc"
#endif
