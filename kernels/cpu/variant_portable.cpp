// Whatever the compiler's default target has: SSE2 on x86-64, NEON on aarch64.
#define VARIANT portable
#define LANES 4
#include "variant.inc"
