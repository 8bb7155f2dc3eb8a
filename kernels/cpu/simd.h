// Vectors of LANES floats from the compiler's vector extensions, so that one source serves every instruction set.
// Included inside the variant's own namespace; system headers are included by variant.inc before.

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));
typedef int8_t vb __attribute__((vector_size(LANES)));
typedef float v4 __attribute__((vector_size(16)));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class To, class From> INLINE To as(From x) {
    static_assert(sizeof(To) == sizeof(From), "size");
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
template <class V> INLINE V read(const void *p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE vf splat(float x) { return x - vf{}; }  // x - 0 keeps the sign of zero
#if defined(HAS_AVX512)
INLINE vf most(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
#else
INLINE vf most(vf a, vf b) { return a > b ? a : b; }
#endif

// ---- conversions

INLINE float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return as<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest < 0x400) {  // subnormal: its integer value times 2^-24
        float f = (float)rest * 5.9604644775390625e-8f;
        return sign ? -f : f;
    }
    return as<float>(sign | ((rest << 13) + 0x38000000));
}
INLINE uint16_t float_to_half(float x) {
    uint32_t u = as<uint32_t>(x), sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (u >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (u < 0x38800000) return (uint16_t)(sign | (as<uint32_t>(as<float>(u) + 0.5f) - 0x3f000000));  // the add rounds
    u += 0xfff + (u >> 13 & 1);
    return (uint16_t)(sign | ((u - 0x38000000) >> 13));
}

INLINE vf load(const float *p) { return read<vf>(p); }
INLINE vf load(const bf16 *p) { return as<vf>(__builtin_convertvector(read<vh>(p), vu) << 16); }
INLINE void store(float *p, vf x) { memcpy(p, &x, sizeof x); }
INLINE vu bf16_bits(vf x) {  // in the high half: rounded to nearest even; a NaN stays one
    vu u = as<vu>(x);
    u += 0x7fff + (u >> 16 & 1);
    return x != x ? vu{} + 0x7fc00000 : u;
}
INLINE void store(bf16 *p, vf x) {
#if defined(HAS_AVX512BF16)  // the same but for subnormals, which become zero, as they are to its dot products
    __m256bh h = _mm512_cvtneps_pbh(as<__m512>(x));
    memcpy(p, &h, sizeof h);
#else
    vu u = bf16_bits(x) >> 16;
#if defined(HAS_AVX512)
    __m256i h = _mm512_cvtepi32_epi16(as<__m512i>(u));
    memcpy(p, &h, sizeof h);
#elif defined(HAS_AVX2)
    for (int i = 0; i < LANES / 8; ++i) {
        __m256i part = read<__m256i>((char *)&u + 32 * i);
        __m128i h = _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(part, part), 8));
        memcpy(p + 8 * i, &h, sizeof h);
    }
#else
    vh h = __builtin_convertvector(u, vh);
    memcpy(p, &h, sizeof h);
#endif
#endif
}
#if defined(HAS_AVX512)
INLINE vf load(const int8_t *p) { return __builtin_convertvector(as<vi>(_mm512_cvtepi8_epi32(read<__m128i>(p))), vf); }
INLINE vf load(const f16 *p) { return as<vf>(_mm512_cvtph_ps(read<__m256i>(p))); }
INLINE void store(f16 *p, vf x) {
    __m256i h = _mm512_cvtps_ph(as<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    memcpy(p, &h, sizeof h);
}
#elif defined(HAS_AVX2)
INLINE vf load(const int8_t *p) {
    vf x;
    for (int i = 0; i < LANES / 8; ++i) {
        __m256 y = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8 * i))));
        memcpy((char *)&x + 32 * i, &y, 32);
    }
    return x;
}
INLINE vf load(const f16 *p) {
    vf x;
    for (int i = 0; i < LANES / 8; ++i) {
        __m256 y = _mm256_cvtph_ps(read<__m128i>(p + 8 * i));
        memcpy((char *)&x + 32 * i, &y, 32);
    }
    return x;
}
INLINE void store(f16 *p, vf x) {
    for (int i = 0; i < LANES / 8; ++i) {
        __m128i h = _mm256_cvtps_ph(read<__m256>((char *)&x + 32 * i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        memcpy(p + 8 * i, &h, 16);
    }
}
#elif defined(__aarch64__)
INLINE vf load(const int8_t *p) { return __builtin_convertvector(__builtin_convertvector(read<vb>(p), vi), vf); }
INLINE vf load(const f16 *p) {
    typedef __fp16 vhalf __attribute__((vector_size(LANES * 2)));
    return __builtin_convertvector(read<vhalf>(p), vf);
}
INLINE void store(f16 *p, vf x) {
    typedef __fp16 vhalf __attribute__((vector_size(LANES * 2)));
    vhalf h = __builtin_convertvector(x, vhalf);
    memcpy(p, &h, sizeof h);
}
#else
INLINE vf load(const int8_t *p) { return __builtin_convertvector(__builtin_convertvector(read<vb>(p), vi), vf); }
INLINE vf load(const f16 *p) {
    vf x;
    for (int i = 0; i < LANES; ++i) x[i] = half_to_float(p[i].bits);
    return x;
}
INLINE void store(f16 *p, vf x) {
    for (int i = 0; i < LANES; ++i) p[i].bits = float_to_half(x[i]);
}
#endif

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) { return as<float>((uint32_t)x.bits << 16); }
INLINE float to_float(f16 x) { return half_to_float(x.bits); }
INLINE void put(float *p, float x) { *p = x; }
INLINE void put(bf16 *p, float x) {
    uint32_t u = as<uint32_t>(x);
    p->bits = x != x ? 0x7fc0 : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
INLINE void put(f16 *p, float x) { p->bits = float_to_half(x); }

template <class T> INLINE vf load_some(const T *p, int64_t n) {  // the first n lanes, zeros after
    T buffer[LANES] = {};
    memcpy(buffer, p, n * sizeof(T));
    return load(buffer);
}
template <class T> INLINE void store_some(T *p, vf x, int64_t n) {
    T buffer[LANES];
    store(buffer, x);
    memcpy(p, buffer, n * sizeof(T));
}
template <class T> INLINE vf load_upto(const T *p, int64_t n) { return n >= LANES ? load(p) : load_some(p, n); }
template <class T> INLINE void store_upto(T *p, vf x, int64_t n) {
    if (n >= LANES) store(p, x);
    else store_some(p, x, n);
}
// A value rounded to T and back.
INLINE vf rounded(vf x, const float *) { return x; }
INLINE vf rounded(vf x, const bf16 *) { return as<vf>(bf16_bits(x) & 0xffff0000); }
template <class T> INLINE vf rounded(vf x, const T *) {
    T buffer[LANES];
    store(buffer, x);
    return load(buffer);
}

// ---- reductions

INLINE v4 fold(vf x) {
#if LANES == 4
    return x;
#elif LANES == 8
    return __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
#else
    typedef float v8 __attribute__((vector_size(32)));
    v8 y = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
           __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(y, y, 0, 1, 2, 3) + __builtin_shufflevector(y, y, 4, 5, 6, 7);
#endif
}
INLINE v4 sums(vf a, vf b, vf c, vf d) {  // (sum a, sum b, sum c, sum d)
    v4 p = fold(a), q = fold(b), r = fold(c), s = fold(d);
    v4 pq = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
    v4 rs = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
    return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
}
INLINE float sum(vf x) {
    v4 y = fold(x);
    return (y[0] + y[2]) + (y[1] + y[3]);
}
INLINE float largest(vf x) {
    v4 y = read<v4>(&x);
    for (int i = 1; i < LANES / 4; ++i) {
        v4 z = read<v4>((char *)&x + 16 * i);
        y = y > z ? y : z;
    }
    float p = y[0] > y[1] ? y[0] : y[1], q = y[2] > y[3] ? y[2] : y[3];
    return p > q ? p : q;
}

// ---- functions (relative error about 1e-7)

INLINE vf exp(vf x) {
#if defined(HAS_AVX512)
    // Far enough that the power of two itself becomes zero or infinite; a NaN comes second, and so stays.
    __m512 y = _mm512_min_ps(_mm512_set1_ps(128.0f), _mm512_max_ps(_mm512_set1_ps(-128.0f), as<__m512>(x)));
    x = as<vf>(y);
    vf n = as<vf>(_mm512_roundscale_ps(as<__m512>(x * 1.44269504088896341f), 0));
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
#else
    vf kept = x < -87.3f ? splat(-87.3f) : x;  // comparisons written so that a NaN stays one
    kept = kept > 88.7f ? splat(88.7f) : kept;
    const float shift = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer in the low bits
    vf t = kept * 1.44269504088896341f + shift;
    vf n = t - shift;
    vf r = kept - n * 0.693359375f + n * 2.12194440e-4f;
#endif
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
#if defined(HAS_AVX512)
    return as<vf>(_mm512_scalef_ps(as<__m512>(p), as<__m512>(n)));
#else
    // 2^n in two factors: n may be 128, whose power alone overflows
    vi i = as<vi>(t) - 0x4b400000, half = i >> 1;
    vf y = p * as<vf>((half + 127) << 23) * as<vf>((i - half + 127) << 23);
    y = x < -87.3f ? vf{} : y;  // masked scores are -inf and must weigh exactly nothing
    return x > 88.7228f ? splat(__builtin_inff()) : y;
#endif
}
INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }
INLINE vf tanh(vf x) {  // small arguments by series, where 1 - 2 / (e^2x + 1) cancels
    vf s = x * x;
    vf series = x + x * s * (-0.333333333f + s * (0.133333333f + s * (-0.0539682540f + s * 0.0218694885f)));
    vf wide = 1.0f - 2.0f / (1.0f + exp(2.0f * x));
    return s < 0.0225f ? series : wide;
}
INLINE vf erf(vf x) {  // rational approximation, |x| <= 4
    x = x > 4.0f ? splat(4.0f) : x;
    x = x < -4.0f ? splat(-4.0f) : x;
    vf s = x * x;
    vf p = s * -2.72614225801306e-10f + 2.77068142495902e-08f;
    p = p * s + -2.10102402082508e-06f;
    p = p * s + -5.69250639462346e-05f;
    p = p * s + -7.34990630326855e-04f;
    p = p * s + -2.95459980854025e-03f;
    p = p * s + -1.60960333262415e-02f;
    vf q = s * -1.45660718464996e-05f + -2.13374055278905e-04f;
    q = q * s + -1.68282697438203e-03f;
    q = q * s + -7.37332916720468e-03f;
    q = q * s + -1.42647390514189e-02f;
    return x * p / q;
}

// ---- threads and memory

// f(thread, threads), in parallel when the work is worth waking somebody: about a microsecond per thread.
// The body is a function of its own: inlined into both branches it would double the code and the compile time.
template <class F> static __attribute__((noinline)) void call(void *f, int part, int parts) { (*(F *)f)(part, parts); }
template <class F> INLINE void parallel(int threads, int64_t tasks, double work, F f) {
    int64_t useful = least(tasks, (int64_t)(work / 20000.0));
    if (threads > 1 && useful > 1) run_parts(threads, call<F>, &f);
    else call<F>(&f, 0, 1);
}

// f(from, to) over [0, count), at most `chunk` at a time. Each thread has a range of its own, which it reads in order,
// and then helps with the others': none waits for one that is held up, and no two read the same stream by turns.
template <class F> INLINE void share(int threads, int64_t count, int64_t chunk, double work, F f) {
    struct alignas(64) Range { int64_t next, end; } ranges[64];
    int64_t chunks = (count + chunk - 1) / chunk;
    int many = threads < 64 ? threads : 64;
    for (int i = 0; i < many; ++i)
        ranges[i] = {count * i / many, count * (i + 1) / many};
    parallel(threads, chunks, work, [&](int part, int parts) {
        for (int i = 0; i < many; ++i) {
            Range &range = ranges[(part * many / parts + i) % many];
            for (int64_t from; (from = __atomic_fetch_add(&range.next, chunk, __ATOMIC_RELAXED)) < range.end;)
                f(from, least(from + chunk, range.end));
        }
    });
}

struct Scratch {  // grows, belongs to one thread; large ones are given back
    char *data = nullptr;
    size_t size = 0;
    void *get(size_t bytes) {
        if (bytes > size) {
            free(data);
            size = (bytes + 4095) / 4096 * 4096;
            if (posix_memalign((void **)&data, 64, size)) abort();
        }
        return data;
    }
    void trim() {
        if (size > ((size_t)8 << 20)) free(data), data = nullptr, size = 0;
    }
};
