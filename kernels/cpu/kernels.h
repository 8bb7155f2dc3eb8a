// What the Python module and the per-ISA variants share: argument records and one table of functions per variant.
// Strides count elements. Nothing here may be an inline function: a variant compiled for a newer instruction set would
// emit it with those instructions, and the linker could pick that copy for everybody.
#pragma once
#include <stdint.h>

namespace modelport {

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, INT8 = 3 };

struct Rows {  // rows of `width` elements, row (i, j) at x + i * outer_stride + j * inner_stride; output is contiguous
    const void *x;
    int64_t outer, inner, outer_stride, inner_stride, width;
    void *out;
    int dtype, threads;
};

struct Norm {
    Rows rows;
    const void *weight, *bias;  // bias may be null
    int64_t weight_stride;      // from the weights of row (i, j) to those of (i, j + 1); 0: all rows share them
    int weight_dtype;
    float eps, offset;
};

struct Best {  // x: (rows, width)
    const void *x;
    int64_t rows, width, stride;
    int64_t *places;  // (rows,): of the greatest element, the first of equals
    float *values;    // (rows,): that element; NaN when the row has one
    int dtype, threads;
};

struct Draw {  // x: (rows, width); the others (rows,)
    const void *x;
    int64_t rows, width, stride;
    const float *best, *temperature, *min_p;
    const int64_t *top_k;  // 0 for all
    const double *top_p, *uniforms;
    int64_t *tokens;
    int dtype, threads;
};

constexpr int64_t MOST_LIKELY = 128;
struct Logprobs {  // x: (rows, width)
    const void *x;
    int64_t rows, width, stride, k;  // k: at most MOST_LIKELY
    const int64_t *tokens;  // (rows,)
    float *own;             // (rows,): log-probability of that token
    int32_t *ranks;         // (rows,): of it, the likeliest has 1
    int64_t *ids;           // (rows, k): the likeliest tokens, of equals the lower id first
    float *values;          // (rows, k)
    int dtype, threads;
};

struct RopeWrite {  // q, k, v: (tokens, heads, dim); caches: (blocks, kv_heads, block_size, dim); null pointers are skipped
    void *q;
    int64_t q_token, q_head, heads;
    void *k;
    int64_t k_token, k_head;
    const void *v;
    int64_t v_token, v_head, tokens, kv_heads, k_dim, v_dim;
    const int64_t *positions;
    const float *cos_sin;  // (max_position, rotary), null: no rotation
    int64_t max_position, rotary, interleaved;
    void *k_cache;
    int64_t k_block, k_cache_head, k_slot;
    void *v_cache;
    int64_t v_block, v_cache_head, v_slot;
    int64_t blocks, block_size;
    const int64_t *slots;
    int dtype, threads;
};

struct Attention {
    const void *q;
    int64_t q_token, q_head, tokens, heads, head_dim;
    const void *k;
    int64_t k_block, k_head, k_slot;
    const void *v;
    int64_t v_block, v_head, v_slot;
    int64_t blocks, kv_heads, block_size, v_dim;
    const int32_t *table;
    int64_t table_stride, table_width;
    const int32_t *starts, *lens;
    int64_t seqs;
    const float *alibi, *sinks;  // (heads,) or null
    const int32_t *ends;         // (tokens,): row t sees keys [0, ends[t]); null: those up to its own position
    void *out;                   // (tokens, heads, v_dim) contiguous
    int dtype;
    int64_t window;
    float scale, softcap;
    int threads;
};

struct Linear {
    const void *x;
    int64_t x_stride, rows, in, out;
    const void *weight;  // blocked, see linear.py
    int weight_dtype;
    const float *scales;         // (out,) for INT8
    const void *bias;            // (out,) in dtype, or null
    const void *residual;        // (rows, out) in dtype, or null
    int64_t residual_stride;
    void *result;                // (rows, out) contiguous
    int dtype, threads;
};

struct Lora {
    const void *x;  // (rows, in) in dtype
    int64_t x_stride, rows, in, out;
    const int32_t *slots;   // (rows,): -1 for none
    int64_t count, parts, rank;
    const void *a;          // (count, parts * rank, in) in dtype
    int64_t a_slot, a_row;
    const void *b;          // (count, rank, out) in dtype
    int64_t b_slot, b_row;
    const int32_t *ranks;   // (count,): how many of a slot's rank are in use
    const int32_t *starts;  // (parts + 1,): first output of each part
    void *result;           // (rows, out), added to
    int64_t result_stride;
    int dtype, threads;
};

struct Experts {
    const void *x;  // (tokens, hidden) in dtype
    int64_t x_stride, tokens, hidden, width, experts, chosen;
    const int64_t *ids;   // (tokens, chosen) experts; -1 for none
    const float *shares;  // (tokens, chosen)
    const void *gate_up, *down;  // blocked, see moe.py
    int weight_dtype;
    const float *gate_up_scales, *down_scales;  // (experts, 2, width) and (experts, hidden) for INT8
    const float *gate_up_bias, *down_bias;      // of the same shapes, or null
    const void *residual;                       // (tokens, hidden) in dtype, or null
    int64_t residual_stride;
    const void *extra;  // (tokens, chosen, 2, width) in dtype, added before the activation, or null
    void *inner;        // (tokens, chosen, width) in dtype, what goes into the down product, or null
    void *result;       // (tokens, hidden) contiguous
    int act;
    float limit, alpha;
    int dtype, threads;
};

struct Sequences {  // rows of a step that belong together, and where their states lie
    const int64_t *positions;      // (tokens,); a sequence whose first row has position 0 starts from nothing
    const int32_t *starts, *slots; // (seqs + 1,), (seqs,)
    int64_t seqs, tokens, rows;    // rows: how many states there are
};

constexpr int64_t MOST_TAPS = 16;
struct CausalConv {
    const void *x;
    int64_t x_row, channels, taps;
    const float *weight, *bias;  // (taps, channels); (channels,) or null
    void *state;                 // (slots, taps - 1, channels) in dtype
    void *out;                   // (tokens, channels)
    Sequences q;
    int silu, dtype, threads;
};

struct SelectiveScan {
    const void *x, *dt, *b, *c, *gate;  // (tokens, channels or states); gate may be null
    int64_t x_row, dt_row, b_row, c_row, gate_row, channels, states;
    const float *rates, *skip, *dt_bias;  // (states, channels), (channels,), (channels,)
    float *state;                         // (slots, states, channels)
    void *out;                            // (tokens, channels)
    Sequences q;
    int dtype, threads;
};

struct HeadScan {
    const void *x, *dt, *b, *c;  // (tokens, heads, head_dim), (tokens, heads), (tokens, groups, states)
    int64_t x_row, x_head, dt_row, b_row, b_group, c_row, c_group, heads, head_dim, groups, states;
    const float *rates, *skip, *dt_bias;  // (heads,)
    float low, high;                      // of dt
    float *state;                         // (slots, heads, states, head_dim)
    void *out;                            // (tokens, heads, head_dim)
    Sequences q;
    int dtype, threads;
};

struct GatedNorm {
    const void *x, *gate, *weight;
    int64_t x_row, gate_row, tokens, width, group;
    void *out;  // (tokens, width)
    float eps;
    int dtype, weight_dtype, threads;
};

// f(with, part, parts) for every part in [0, parts), some of them on other threads; see pool.cpp.
void run_parts(int parts, void (*f)(void *, int, int), void *with);

struct Kernels {
    const char *name;
    void (*rms_norm)(const Norm &);
    void (*layer_norm)(const Norm &);
    void (*activate)(const Rows &, int kind);
    void (*gated)(const Rows &, int kind);  // width is the output's, a row of x is twice that
    void (*best)(const Best &);
    void (*draw)(const Draw &);
    void (*logprobs)(const Logprobs &);
    void (*rope_write)(const RopeWrite &);
    void (*attention)(const Attention &);
    void (*linear)(const Linear &);
    void (*experts)(const Experts &);
    void (*lora)(const Lora &);
    void (*causal_conv)(const CausalConv &);
    void (*selective_scan)(const SelectiveScan &);
    void (*head_scan)(const HeadScan &);
    void (*gated_norm)(const GatedNorm &);
};

}  // namespace modelport
