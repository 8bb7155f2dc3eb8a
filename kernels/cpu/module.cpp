// The Python face. Each function takes tensors and numbers positionally, answers False where the kernels do not take them
// (another device, dtype or stride, shapes that disagree), checks every index that comes from tensor data (ValueError),
// and calls the variant chosen for this machine. Checks in Python would cost ten times as much as a small kernel.
#include "tape.h"

#include <string.h>

#include <type_traits>

#include "kernels.h"

namespace modelport {
namespace portable { extern const Kernels kernels; }
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAVE_X86 1
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512bf16 { extern const Kernels kernels; }
#ifdef MODELPORT_EMULATE
namespace emulated { extern const Kernels kernels; }
#endif
#endif
}  // namespace modelport

using namespace modelport;

static const Kernels *chosen;

struct Variant {
    const Kernels *kernels;
    bool runs;
};

// Best last.
static int variants(Variant (&list)[8]) {
    int n = 0;
    list[n++] = {&portable::kernels, true};
#ifdef HAVE_X86
    __builtin_cpu_init();
    bool two = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    // every processor with AVX2 has F16C; the compiler cannot ask for it by name
    bool five = two && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#ifdef MODELPORT_EMULATE
    list[n++] = {&emulated::kernels, two};
#endif
    list[n++] = {&avx2::kernels, two};
    list[n++] = {&avx512::kernels, five};
    list[n++] = {&avx512bf16::kernels, five && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")};
#endif
    return n;
}

// ---- tensors, read through torch's DLPack exchange table: no torch headers, some ten nanoseconds each

struct DLTensor {
    void *data;
    int32_t device_type, device_id, dims;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};
struct Exchange {
    uint32_t major, minor;
    void *previous, *allocate, *from_object, *to_object;
    int (*view)(void *object, DLTensor *out);  // borrowed: valid while the object lives
};
static const Exchange *exchange;
static PyObject *tensor_type, *parameter_type;

enum { INT32 = 10, INT64 = 11, FLOAT64 = 12, OTHER = 99 };

struct Tensor {
    char *data = nullptr;
    int dims = 0, dtype = OTHER;
    const int64_t *n = nullptr, *stride = nullptr;  // sizes and strides

    bool contiguous() const {
        int64_t expected = 1;
        for (int i = dims - 1; i >= 0; expected *= n[i--])
            if (n[i] == 0) return true;
            else if (n[i] != 1 && stride[i] != expected) return false;
        return true;
    }
    int64_t count() const {
        int64_t c = 1;
        for (int i = 0; i < dims; ++i) c *= n[i];
        return c;
    }
    bool floating() const { return dtype <= FLOAT16; }
    // Its last dimension is dense, so that rows can be read as they are.
    bool rows(int dimensions) const { return dims == dimensions && (stride[dims - 1] == 1 || n[dims - 1] <= 1); }
    bool list(int type, int64_t length) const { return dims == 1 && dtype == type && n[0] == length && contiguous(); }
};

// Reads the arguments of a call in order. `good` turns false where one is not what the kernels take: the caller then
// hears False and uses the torch reference, which also says what is wrong.
struct Reader {
    PyObject *const *args;
    Py_ssize_t count, at = 0;
    bool good = true;

    PyObject *next() { return at < count ? args[at++] : (++at, nullptr); }
    int64_t i() {
        PyObject *o = next();
        return o ? PyLong_AsLongLong(o) : 0;
    }
    double f() {
        PyObject *o = next();
        return o ? PyFloat_AsDouble(o) : 0;
    }
    Tensor t() {
        Tensor t;
        PyObject *o = next();
        PyObject *type = o ? (PyObject *)Py_TYPE(o) : nullptr;
        DLTensor view;
        if (!exchange || (type != tensor_type && type != parameter_type)) good = false;
        else if (exchange->view(o, &view)) PyErr_Clear(), good = false;
        else if (view.device_type != 1 || view.lanes != 1 || !view.strides) good = false;
        else {
            t.data = (char *)view.data + view.byte_offset, t.dims = view.dims, t.n = view.shape, t.stride = view.strides;
            int kind = view.code << 8 | view.bits;  // codes: 0 signed, 2 float, 4 bfloat
            t.dtype = kind == (2 << 8 | 32) ? (int)FLOAT32 : kind == (4 << 8 | 16) ? (int)BFLOAT16
                    : kind == (2 << 8 | 16) ? (int)FLOAT16 : kind == 8 ? (int)INT8
                    : kind == 32 ? (int)INT32 : kind == 64 ? (int)INT64
                    : kind == (2 << 8 | 64) ? (int)FLOAT64 : (int)OTHER;
        }
        return t;
    }
    Tensor maybe() {  // None leaves data null
        if (at < count && args[at] == Py_None) return ++at, Tensor();
        return t();
    }
    bool ok() {  // false: an error is set
        if (PyErr_Occurred()) return false;
        if (at == count) return true;
        PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", at, count);
        return false;
    }
};

static const char *data_of(PyObject *o) {  // null for what is not a tensor
    DLTensor view;
    PyObject *type = (PyObject *)Py_TYPE(o);
    if (type != tensor_type && type != parameter_type) return nullptr;
    if (exchange->view(o, &view)) return PyErr_Clear(), nullptr;
    return (const char *)view.data + view.byte_offset;
}

static PyObject *answer(bool done) {
    PyObject *o = done ? Py_True : Py_False;
    Py_INCREF(o);
    return o;
}
#define REQUIRE(condition) \
    if (!(condition)) return answer(false)

// Does f(a), a kernel's work on its argument record, and takes it down when the thread is recording; f answers with a
// Refusal where tensor data holds an index that leads outside. It captures nothing: all it needs is in the record, whose
// copy a tape keeps, while r's arguments own what the record points to. Every function that does anything ends here.
// Lets other Python threads run during `work` multiplications, when that is long enough to be worth it.
template <class A, class F> static PyObject *launch(const Reader &r, double work, const A &a, F f) {
    static_assert(std::is_empty<F>::value && std::is_trivially_copyable<A>::value, "a tape keeps copies");
    auto call = [a, f]() -> Refusal {
        if constexpr (std::is_void<decltype(f(a))>::value) return f(a), Refusal{};
        else return f(a);
    };
    Refusal refusal{};
    if (work > 1e6) {
        PyThreadState *state = PyEval_SaveThread();
        refusal = call();
        PyEval_RestoreThread(state);
    } else refusal = call();
    if (refusal.message) return refusal.raise();
    if (recording) {
        recording->calls.push_back(call);
        for (Py_ssize_t i = 0; i < r.count; ++i)
            if (const char *data = data_of(r.args[i])) recording->hold(r.args[i], data);
    }
    return answer(true);
}

// use(torch.Tensor, torch.nn.Parameter): where tensors come from. Subclasses are left to torch.
static PyObject *use(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (count != 2) return PyErr_Format(PyExc_TypeError, "expected 2 arguments, got %zd", count);
    PyObject *capsule = PyObject_GetAttrString(args[0], "__dlpack_c_exchange_api__");
    if (!capsule) return nullptr;
    const Exchange *found = (const Exchange *)PyCapsule_GetPointer(capsule, "dlpack_exchange_api");  // lives as long as torch
    Py_DECREF(capsule);
    if (!found) return nullptr;
    if (found->major != 1) return PyErr_Format(PyExc_ImportError, "unknown DLPack version %u", found->major);
    exchange = found;
    Py_INCREF(args[0]), Py_INCREF(args[1]);
    tensor_type = args[0], parameter_type = args[1];
    Py_RETURN_NONE;
}

// ---- the operations: f(inputs..., out, settings..., threads) -> whether it was done

static bool row_layout(const Tensor &x, const Tensor &out, Rows &a) {
    if (x.dims < 1 || !x.floating() || x.dtype != out.dtype || !out.contiguous() || x.dims != out.dims) return false;
    for (int i = 0; i < x.dims; ++i)
        if (x.n[i] != out.n[i]) return false;
    a.x = x.data, a.out = out.data, a.dtype = x.dtype, a.width = x.n[x.dims - 1];
    if (a.width < 1) return false;
    if (x.rows(2)) a.outer = 1, a.inner = x.n[0], a.inner_stride = x.stride[0];
    else if (x.rows(3)) a.outer = x.n[0], a.inner = x.n[1], a.outer_stride = x.stride[0], a.inner_stride = x.stride[1];
    else if (x.contiguous()) a.outer = 1, a.inner = x.count() / a.width, a.inner_stride = a.width;
    else return false;
    return true;
}
static double size(const Rows &a) { return (double)a.outer * a.inner * a.width; }

// Weights (width,), or (heads, width) for rows (tokens, heads, width).
static bool set_weight(Norm &a, const Tensor &weight, const Tensor &x) {
    bool own = weight.dims == 2 && x.dims == 3;
    if (!weight.floating() || !weight.contiguous() || (!own && weight.dims != 1)) return false;
    if (weight.n[weight.dims - 1] != a.rows.width || (own && weight.n[0] != x.n[1])) return false;
    a.weight = weight.data, a.weight_dtype = weight.dtype, a.weight_stride = own ? a.rows.width : 0;
    return !own || (a.rows.inner == x.n[1] && a.rows.outer == x.n[0]);
}

static PyObject *rms_norm(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    Norm a{};
    Tensor x = r.t(), weight = r.t(), out = r.t();
    a.eps = (float)r.f(), a.offset = (float)r.f(), a.rows.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    REQUIRE(r.good && row_layout(x, out, a.rows) && set_weight(a, weight, x));
    return launch(r, size(a.rows), a, [](const Norm &a) { chosen->rms_norm(a); });
}

static PyObject *layer_norm(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    Norm a{};
    Tensor x = r.t(), weight = r.t(), bias = r.maybe(), out = r.t();
    a.eps = (float)r.f(), a.rows.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    REQUIRE(r.good && row_layout(x, out, a.rows) && set_weight(a, weight, x));
    REQUIRE(!bias.data || (bias.dtype == weight.dtype && bias.dims == weight.dims && bias.contiguous()));
    for (int i = 0; i < weight.dims; ++i) REQUIRE(!bias.data || bias.n[i] == weight.n[i]);
    a.bias = bias.data;
    return launch(r, size(a.rows), a, [](const Norm &a) { chosen->layer_norm(a); });
}

struct Act {
    Rows rows;
    int kind;
};

static PyObject *activate(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    Rows a{};
    Tensor x = r.t(), out = r.t();
    int kind = (int)r.i();
    a.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    REQUIRE(r.good && x.dims > 0 && x.contiguous() && row_layout(x, out, a));
    if (a.inner == 1)  // one long row is cut, so that every thread gets some
        for (; a.width % 2 == 0 && a.width > 4096; a.width /= 2, a.inner_stride /= 2) a.inner *= 2;
    return launch(r, size(a) * 4, Act{a, kind}, [](const Act &a) { chosen->activate(a.rows, a.kind); });
}

static PyObject *gated(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    Rows a{};
    Tensor x = r.t(), out = r.t();
    int kind = (int)r.i();
    a.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    REQUIRE(r.good && x.rows(2) && x.floating() && x.dtype == out.dtype && out.dims == 2 && out.contiguous());
    REQUIRE(x.n[0] == out.n[0] && x.n[1] == 2 * out.n[1]);
    a.x = x.data, a.out = out.data, a.outer = 1, a.inner = x.n[0], a.inner_stride = x.stride[0], a.width = out.n[1];
    a.dtype = x.dtype;
    return launch(r, size(a) * 4, Act{a, kind}, [](const Act &a) { chosen->gated(a.rows, a.kind); });
}

static PyObject *best(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    Best a{};
    Tensor x = r.t(), places = r.t(), values = r.t();
    a.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    REQUIRE(r.good && x.rows(2) && x.floating() && x.n[1] > 0);
    REQUIRE(places.list(INT64, x.n[0]) && values.list(FLOAT32, x.n[0]));
    a.x = x.data, a.rows = x.n[0], a.width = x.n[1], a.stride = x.stride[0], a.dtype = x.dtype;
    a.places = (int64_t *)places.data, a.values = (float *)values.data;
    return launch(r, (double)a.rows * a.width, a, [](const Best &a) { chosen->best(a); });
}

static PyObject *draw(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    Draw a{};
    Tensor x = r.t(), best = r.t(), temperature = r.t(), top_k = r.t(), top_p = r.t(), min_p = r.t(), uniforms = r.t(),
           tokens = r.t();
    a.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    REQUIRE(r.good && x.rows(2) && x.floating() && x.n[1] > 0 && x.n[1] < 1 << 30);
    for (const Tensor &t : {best, temperature, min_p}) REQUIRE(t.list(FLOAT32, x.n[0]));
    for (const Tensor &t : {top_p, uniforms}) REQUIRE(t.list(FLOAT64, x.n[0]));
    for (const Tensor &t : {top_k, tokens}) REQUIRE(t.list(INT64, x.n[0]));
    a.x = x.data, a.rows = x.n[0], a.width = x.n[1], a.stride = x.stride[0], a.dtype = x.dtype;
    a.best = (const float *)best.data, a.temperature = (const float *)temperature.data;
    a.min_p = (const float *)min_p.data, a.top_k = (const int64_t *)top_k.data, a.top_p = (const double *)top_p.data;
    a.uniforms = (const double *)uniforms.data, a.tokens = (int64_t *)tokens.data;
    return launch(r, (double)a.rows * a.width * 8, a, [](const Draw &a) { chosen->draw(a); });
}

static PyObject *logprobs(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    Logprobs a{};
    Tensor x = r.t(), tokens = r.t(), own = r.t(), ranks = r.t(), ids = r.t(), values = r.t();
    a.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    REQUIRE(r.good && x.rows(2) && x.floating() && x.n[1] > 0 && x.n[1] < 1 << 30 && ids.dims == 2 && values.dims == 2);
    REQUIRE(tokens.list(INT64, x.n[0]) && own.list(FLOAT32, x.n[0]) && ranks.list(INT32, x.n[0]));
    for (const Tensor &t : {ids, values}) REQUIRE(t.contiguous() && t.n[0] == x.n[0] && t.n[1] == ids.n[1]);
    REQUIRE(ids.dtype == INT64 && values.dtype == FLOAT32 && ids.n[1] <= x.n[1] && ids.n[1] <= MOST_LIKELY);
    a.x = x.data, a.rows = x.n[0], a.width = x.n[1], a.stride = x.stride[0], a.k = ids.n[1], a.dtype = x.dtype;
    a.tokens = (const int64_t *)tokens.data, a.own = (float *)own.data, a.ranks = (int32_t *)ranks.data;
    a.ids = (int64_t *)ids.data, a.values = (float *)values.data;
    return launch(r, (double)a.rows * a.width * 8, a, [](const Logprobs &a) -> Refusal {
        for (int64_t i = 0; i < a.rows; ++i)
            if (a.tokens[i] < 0 || a.tokens[i] >= a.width)
                return {"token %lld is outside the vocabulary of %lld", a.tokens[i], a.width};
        chosen->logprobs(a);
        return {};
    });
}

static Refusal checked_rope_write(const RopeWrite &a) {
    if (a.cos_sin)
        for (int64_t t = 0; t < a.tokens; ++t)
            if (a.positions[t] < 0 || a.positions[t] >= a.max_position)
                return {"position %lld is outside the rotary table of %lld positions", a.positions[t], a.max_position};
    if (a.k)
        for (int64_t t = 0; t < a.tokens; ++t)
            if (a.slots[t] >= a.blocks * a.block_size)
                return {"slot %lld is outside the cache of %lld slots", a.slots[t], a.blocks * a.block_size};
    chosen->rope_write(a);
    return {};
}
static PyObject *run_rope_write(const Reader &r, const RopeWrite &a) {
    return launch(r, (double)a.tokens * (a.heads + 2 * a.kv_heads) * a.k_dim, a,
                  [](const RopeWrite &a) { return checked_rope_write(a); });
}

// q: what is rotated; also checks the tables.
static bool set_rotation(RopeWrite &a, const Tensor &q, const Tensor &positions, const Tensor &table) {
    if (!q.rows(3) || !q.floating() || !positions.list(INT64, q.n[0]) || table.dims != 2 || table.dtype != FLOAT32 ||
        !table.contiguous() || table.n[1] > q.n[2] || table.n[1] % 2)
        return false;
    a.q = q.data, a.tokens = q.n[0], a.heads = q.n[1], a.k_dim = q.n[2], a.q_token = q.stride[0], a.q_head = q.stride[1];
    a.positions = (const int64_t *)positions.data, a.cos_sin = (const float *)table.data;
    a.max_position = table.n[0], a.rotary = table.n[1], a.dtype = q.dtype;
    return true;
}
static bool set_write(RopeWrite &a, const Tensor &k, const Tensor &v, const Tensor &kc, const Tensor &vc, const Tensor &slots) {
    if (!k.rows(3) || !v.rows(3) || !kc.rows(4) || !vc.rows(4) || !k.floating() || k.dtype != v.dtype ||
        k.dtype != kc.dtype || k.dtype != vc.dtype || !slots.list(INT64, k.n[0]) || v.n[0] != k.n[0])
        return false;
    if (kc.n[0] != vc.n[0] || kc.n[1] != k.n[1] || vc.n[1] != k.n[1] || v.n[1] != k.n[1] || kc.n[2] != vc.n[2] ||
        kc.n[3] != k.n[2] || vc.n[3] != v.n[2] || kc.n[2] < 1)
        return false;
    a.k = k.data, a.k_token = k.stride[0], a.k_head = k.stride[1], a.v = v.data, a.v_token = v.stride[0];
    a.v_head = v.stride[1], a.tokens = k.n[0], a.kv_heads = k.n[1], a.k_dim = k.n[2], a.v_dim = v.n[2];
    a.k_cache = kc.data, a.k_block = kc.stride[0], a.k_cache_head = kc.stride[1], a.k_slot = kc.stride[2];
    a.v_cache = vc.data, a.v_block = vc.stride[0], a.v_cache_head = vc.stride[1], a.v_slot = vc.stride[2];
    a.blocks = kc.n[0], a.block_size = kc.n[2], a.slots = (const int64_t *)slots.data, a.dtype = k.dtype;
    return true;
}

static PyObject *rotate(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    RopeWrite a{};
    Tensor x = r.t(), positions = r.t(), table = r.t();
    a.interleaved = r.i(), a.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    REQUIRE(r.good && set_rotation(a, x, positions, table));
    return run_rope_write(r, a);
}

static PyObject *cache_write(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    RopeWrite a{};
    Tensor k = r.t(), v = r.t(), k_cache = r.t(), v_cache = r.t(), slots = r.t();
    a.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    REQUIRE(r.good && set_write(a, k, v, k_cache, v_cache, slots));
    return run_rope_write(r, a);
}

static PyObject *rope_write(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    RopeWrite a{};
    Tensor q = r.t(), k = r.t(), v = r.t(), positions = r.t(), table = r.t();
    a.interleaved = r.i();
    Tensor k_cache = r.t(), v_cache = r.t(), slots = r.t();
    a.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    REQUIRE(r.good && set_rotation(a, q, positions, table) && set_write(a, k, v, k_cache, v_cache, slots));
    REQUIRE(q.dtype == k.dtype && q.n[0] == k.n[0] && q.n[2] == k.n[2]);
    return run_rope_write(r, a);
}

static Refusal checked_attention(const Attention &a) {
    if (a.starts[0] != 0 || a.starts[a.seqs] > a.tokens)
        return {"query_starts must begin with 0 and end within the tokens; it ends with %lld of %lld",
                      a.starts[a.seqs], a.tokens};
    for (int64_t s = 0; s < a.seqs; ++s) {
        int64_t queries = a.starts[s + 1] - a.starts[s], len = a.lens[s];
        if (queries < 0) return {"query_starts goes down at sequence %lld of %lld", s, a.seqs};
        if (!queries) continue;
        if (len < queries && !a.ends) return {"a sequence has %lld keys but %lld queries", len, queries};
        int64_t used = (len + a.block_size - 1) / a.block_size;
        if (used > a.table_width) return {"a sequence needs %lld blocks, block_table has %lld columns", used, a.table_width};
        // blocks before a window may have been freed, so their entries are not looked at
        int64_t low = a.window > 0 && len - queries - a.window + 1 > 0 ? len - queries - a.window + 1 : 0;
        for (int64_t b = low / a.block_size; b < used; ++b) {
            int32_t block = a.table[s * a.table_stride + b];
            if (block < 0 || block >= a.blocks) return {"block_table names block %lld of %lld", block, a.blocks};
        }
    }
    chosen->attention(a);
    return {};
}

static PyObject *paged_attention(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    Attention a{};
    Tensor q = r.t(), k = r.t(), v = r.t(), table = r.t(), starts = r.t(), lens = r.t(), alibi = r.maybe(),
           sinks = r.maybe(), ends = r.maybe(), out = r.t();
    a.scale = (float)r.f(), a.window = r.i(), a.softcap = (float)r.f(), a.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    REQUIRE(r.good && q.rows(3) && k.rows(4) && v.rows(4) && q.floating() && q.dtype == k.dtype && q.dtype == v.dtype);
    REQUIRE(out.dims == 3 && out.contiguous() && out.dtype == q.dtype && out.n[0] == q.n[0] && out.n[1] == q.n[1]);
    REQUIRE(k.n[3] == q.n[2] && v.n[3] == out.n[2] && k.n[0] == v.n[0] && k.n[1] == v.n[1] && k.n[2] == v.n[2]);
    REQUIRE(k.n[1] > 0 && k.n[2] > 0 && q.n[1] % k.n[1] == 0 && q.n[1] > 0 && lens.dims == 1 && lens.n[0] >= 0);
    a.seqs = lens.n[0];
    REQUIRE(lens.list(INT32, a.seqs) && starts.list(INT32, a.seqs + 1));
    REQUIRE(table.rows(2) && table.dtype == INT32 && table.n[0] >= a.seqs);
    REQUIRE((!alibi.data || alibi.list(FLOAT32, q.n[1])) && (!sinks.data || sinks.list(FLOAT32, q.n[1])));
    REQUIRE(!ends.data || ends.list(INT32, q.n[0]));
    a.q = q.data, a.q_token = q.stride[0], a.q_head = q.stride[1], a.tokens = q.n[0], a.heads = q.n[1];
    a.head_dim = q.n[2], a.k = k.data, a.k_block = k.stride[0], a.k_head = k.stride[1], a.k_slot = k.stride[2];
    a.v = v.data, a.v_block = v.stride[0], a.v_head = v.stride[1], a.v_slot = v.stride[2];
    a.blocks = k.n[0], a.kv_heads = k.n[1], a.block_size = k.n[2], a.v_dim = v.n[3];
    a.table = (const int32_t *)table.data, a.table_stride = table.stride[0], a.table_width = table.n[1];
    a.starts = (const int32_t *)starts.data, a.lens = (const int32_t *)lens.data;
    a.ends = (const int32_t *)ends.data, a.alibi = (const float *)alibi.data, a.sinks = (const float *)sinks.data;
    a.out = out.data, a.dtype = q.dtype;
    double work = 0;
    for (int64_t s = 0; s < a.seqs; ++s)
        work += ((double)a.starts[s + 1] - a.starts[s]) * a.lens[s] * a.heads * a.head_dim;
    return launch(r, work, a, [](const Attention &a) { return checked_attention(a); });
}

static PyObject *linear(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    Linear a{};
    Tensor x = r.t(), weight = r.t(), scales = r.maybe(), bias = r.maybe(), residual = r.maybe(), out = r.t();
    a.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    REQUIRE(r.good && x.rows(2) && x.floating() && out.dims == 2 && out.contiguous() && out.dtype == x.dtype);
    a.rows = x.n[0], a.in = x.n[1], a.out = out.n[1];
    bool pairs = weight.dtype == BFLOAT16 || weight.dtype == INT8;
    REQUIRE(out.n[0] == a.rows && weight.contiguous() && weight.dims == (pairs ? 4 : 3) && a.in > 0 && a.out > 0);
    REQUIRE(weight.n[0] == (a.out + 15) / 16 && weight.n[1] == (pairs ? (a.in + 1) / 2 : a.in) && weight.n[2] == 16);
    REQUIRE(!pairs || weight.n[3] == 2);
    REQUIRE(weight.dtype == INT8 ? scales.data && scales.list(FLOAT32, a.out) : weight.dtype == x.dtype && !scales.data);
    REQUIRE(!bias.data || bias.list(x.dtype, a.out));
    REQUIRE(!residual.data || (residual.rows(2) && residual.dtype == x.dtype && residual.n[0] == a.rows && residual.n[1] == a.out));
    if (!a.rows) return answer(true);
    a.x = x.data, a.x_stride = x.stride[0], a.weight = weight.data, a.weight_dtype = weight.dtype;
    a.scales = (const float *)scales.data, a.bias = bias.data, a.residual = residual.data;
    a.residual_stride = residual.data ? residual.stride[0] : 0, a.result = out.data, a.dtype = x.dtype;
    return launch(r, (double)a.rows * a.in * a.out, a, [](const Linear &a) { chosen->linear(a); });
}

static Refusal checked_experts(const Experts &a) {
    for (int64_t i = 0; i < a.tokens * a.chosen; ++i)
        if (a.ids[i] < -1 || a.ids[i] >= a.experts) return {"a token chose expert %lld of %lld", a.ids[i], a.experts};
    chosen->experts(a);
    return {};
}

static PyObject *experts(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    Experts a{};
    Tensor x = r.t(), ids = r.t(), shares = r.t(), gate_up = r.t(), gate_up_scales = r.maybe(), gate_up_bias = r.maybe(),
           down = r.t(), down_scales = r.maybe(), down_bias = r.maybe(), residual = r.maybe(), extra = r.maybe(),
           inner = r.maybe(), out = r.t();
    a.width = r.i(), a.act = (int)r.i(), a.limit = (float)r.f(), a.alpha = (float)r.f(), a.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    REQUIRE(r.good && x.rows(2) && x.floating() && out.dims == 2 && out.contiguous() && out.dtype == x.dtype);
    a.tokens = x.n[0], a.hidden = x.n[1];
    REQUIRE(ids.dims == 2 && ids.dtype == INT64 && ids.contiguous() && ids.n[0] == a.tokens);
    a.chosen = ids.n[1];
    REQUIRE(shares.dims == 2 && shares.dtype == FLOAT32 && shares.contiguous() && shares.n[0] == a.tokens);
    REQUIRE(shares.n[1] == a.chosen && out.n[0] == a.tokens && out.n[1] == a.hidden && a.hidden > 0 && a.width > 0);
    bool pairs = gate_up.dtype == BFLOAT16 || gate_up.dtype == INT8;
    // (experts, parts, panels, in, 16); for bfloat16 (experts, parts, panels, in / 2, 16, 2)
    auto fits = [&](const Tensor &w, int64_t parts, int64_t out, int64_t in) {
        return w.dims == (pairs ? 6 : 5) && w.contiguous() && w.dtype == gate_up.dtype && w.n[0] == gate_up.n[0] &&
               w.n[1] == parts && w.n[2] == (out + 15) / 16 && w.n[3] == (pairs ? (in + 1) / 2 : in) && w.n[4] == 16 &&
               (!pairs || w.n[5] == 2);
    };
    REQUIRE(fits(gate_up, 2, a.width, a.hidden) && fits(down, 1, a.hidden, a.width));
    a.experts = gate_up.n[0];
    auto list = [&](const Tensor &t, int64_t parts, int64_t out) {
        return t.dims == 3 && t.dtype == FLOAT32 && t.contiguous() && t.n[0] == a.experts && t.n[1] == parts && t.n[2] == out;
    };
    if (gate_up.dtype == INT8) {
        REQUIRE(gate_up_scales.data && list(gate_up_scales, 2, a.width) && down_scales.data && list(down_scales, 1, a.hidden));
    } else REQUIRE(gate_up.dtype == x.dtype && !gate_up_scales.data && !down_scales.data);
    REQUIRE(!gate_up_bias.data || list(gate_up_bias, 2, a.width));
    REQUIRE(!down_bias.data || list(down_bias, 1, a.hidden));
    REQUIRE(!residual.data || (residual.rows(2) && residual.dtype == x.dtype && residual.n[0] == a.tokens && residual.n[1] == a.hidden));
    auto of_choices = [&](const Tensor &t, int64_t width) {
        return t.dtype == x.dtype && t.contiguous() && t.count() == a.tokens * a.chosen * width;
    };
    REQUIRE((!extra.data || of_choices(extra, 2 * a.width)) && (!inner.data || of_choices(inner, a.width)));
    a.ids = (const int64_t *)ids.data;
    if (!a.tokens) return answer(true);
    a.extra = extra.data, a.inner = inner.data;
    a.x = x.data, a.x_stride = x.stride[0], a.shares = (const float *)shares.data;
    a.gate_up = gate_up.data, a.down = down.data, a.weight_dtype = gate_up.dtype;
    a.gate_up_scales = (const float *)gate_up_scales.data, a.down_scales = (const float *)down_scales.data;
    a.gate_up_bias = (const float *)gate_up_bias.data, a.down_bias = (const float *)down_bias.data;
    a.residual = residual.data, a.residual_stride = residual.data ? residual.stride[0] : 0;
    a.result = out.data, a.dtype = x.dtype;
    return launch(r, (double)a.tokens * a.chosen * a.hidden * a.width, a, [](const Experts &a) { return checked_experts(a); });
}

// ---- low-rank updates

static Refusal checked_lora(const Lora &a) {
    for (int64_t i = 0; i < a.rows; ++i)
        if (a.slots[i] < -1 || a.slots[i] >= a.count) return {"a row names slot %lld of %lld", a.slots[i], a.count};
    for (int64_t i = 0; i < a.count; ++i)
        if (a.ranks[i] < 0 || a.ranks[i] > a.rank) return {"a slot has rank %lld of %lld", a.ranks[i], a.rank};
    for (int64_t i = 0; i < a.parts; ++i)
        if (a.starts[i] < 0 || a.starts[i + 1] < a.starts[i] || a.starts[i + 1] > a.out)
            return {"a part ends at output %lld of %lld", a.starts[i + 1], a.out};
    chosen->lora(a);
    return {};
}

static PyObject *lora(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    Lora a{};
    Tensor x = r.t(), slots = r.t(), down = r.t(), up = r.t(), ranks = r.t(), starts = r.t(), out = r.t();
    a.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    REQUIRE(r.good && x.rows(2) && x.floating() && out.rows(2) && out.dtype == x.dtype && out.n[0] == x.n[0]);
    REQUIRE(down.rows(3) && down.dtype == x.dtype && up.rows(3) && up.dtype == x.dtype && down.n[0] == up.n[0]);
    REQUIRE(starts.dims == 1 && starts.n[0] > 1 && starts.list(INT32, starts.n[0]));
    a.rows = x.n[0], a.in = x.n[1], a.out = out.n[1], a.count = up.n[0], a.rank = up.n[1], a.parts = starts.n[0] - 1;
    REQUIRE(slots.list(INT32, a.rows) && ranks.list(INT32, a.count));
    REQUIRE(down.n[1] == a.parts * a.rank && down.n[2] == a.in && up.n[2] == a.out);
    if (!a.rows || !a.count || !a.rank || !a.in) return answer(true);
    a.x = x.data, a.x_stride = x.stride[0], a.slots = (const int32_t *)slots.data;
    a.a = down.data, a.a_slot = down.stride[0], a.a_row = down.stride[1];
    a.b = up.data, a.b_slot = up.stride[0], a.b_row = up.stride[1];
    a.ranks = (const int32_t *)ranks.data, a.starts = (const int32_t *)starts.data;
    a.result = out.data, a.result_stride = out.stride[0], a.dtype = x.dtype;
    return launch(r, (double)a.rows * a.rank * (a.parts * a.in + a.out), a,
                  [](const Lora &a) { return checked_lora(a); });
}

// ---- state-space layers

static bool set_sequences(Sequences &q, int64_t tokens, const Tensor &state, const Tensor &positions, const Tensor &starts,
                          const Tensor &slots) {
    q.tokens = tokens, q.rows = state.n[0], q.seqs = slots.dims == 1 ? slots.n[0] : -1;
    q.positions = (const int64_t *)positions.data, q.starts = (const int32_t *)starts.data;
    q.slots = (const int32_t *)slots.data;
    return q.seqs >= 0 && positions.list(INT64, tokens) && starts.list(INT32, q.seqs + 1) && slots.list(INT32, q.seqs);
}
static Refusal check(const Sequences &q) {
    if (q.starts[0] != 0 || q.starts[q.seqs] > q.tokens)
        return {"query_starts must begin with 0 and end within the tokens; it ends with %lld of %lld", q.starts[q.seqs],
                q.tokens};
    for (int64_t s = 0; s < q.seqs; ++s) {
        if (q.starts[s + 1] < q.starts[s]) return {"query_starts goes down at sequence %lld of %lld", s, q.seqs};
        if (q.slots[s] < 0 || q.slots[s] >= q.rows) return {"state_slots names row %lld of %lld", q.slots[s], q.rows};
    }
    return {};
}

static PyObject *causal_conv(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    CausalConv a{};
    Tensor x = r.t(), weight = r.t(), bias = r.maybe(), state = r.t(), positions = r.t(), starts = r.t(), slots = r.t(),
           out = r.t();
    a.silu = (int)r.i(), a.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    REQUIRE(r.good && x.rows(2) && x.floating() && state.dtype == x.dtype && out.dtype == x.dtype);
    REQUIRE(weight.dims == 2 && weight.dtype == FLOAT32 && weight.contiguous() && weight.n[0] > 0);
    a.x = x.data, a.x_row = x.stride[0], a.channels = x.n[1], a.taps = weight.n[0];
    REQUIRE(a.taps <= MOST_TAPS && weight.n[1] == a.channels && (!bias.data || bias.list(FLOAT32, a.channels)));
    REQUIRE(state.dims == 3 && state.contiguous() && state.n[1] == a.taps - 1 && state.n[2] == a.channels);
    REQUIRE(out.dims == 2 && out.contiguous() && out.n[0] == x.n[0] && out.n[1] == a.channels);
    REQUIRE(set_sequences(a.q, x.n[0], state, positions, starts, slots));
    a.weight = (const float *)weight.data, a.bias = (const float *)bias.data, a.state = state.data, a.out = out.data;
    a.dtype = x.dtype;
    return launch(r, (double)a.q.tokens * a.channels * (a.taps + 4), a, [](const CausalConv &a) {
        Refusal refusal = check(a.q);
        if (!refusal.message) chosen->causal_conv(a);
        return refusal;
    });
}

static PyObject *selective_scan(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    SelectiveScan a{};
    Tensor x = r.t(), dt = r.t(), rates = r.t(), b = r.t(), c = r.t(), skip = r.t(), gate = r.maybe(), dt_bias = r.t(),
           state = r.t(), positions = r.t(), starts = r.t(), slots = r.t(), out = r.t();
    a.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    REQUIRE(r.good && x.rows(2) && x.floating() && out.dims == 2 && out.contiguous() && out.dtype == x.dtype);
    int64_t tokens = x.n[0];
    a.channels = x.n[1];
    REQUIRE(dt.rows(2) && dt.dtype == x.dtype && dt.n[0] == tokens && b.rows(2) && b.dtype == x.dtype &&
            b.n[0] == tokens && c.rows(2) && c.dtype == x.dtype && c.n[0] == tokens);
    REQUIRE(!gate.data || (gate.rows(2) && gate.dtype == x.dtype && gate.n[0] == tokens && gate.n[1] == a.channels));
    REQUIRE(rates.dims == 2 && rates.dtype == FLOAT32 && rates.contiguous() && rates.n[1] == a.channels);
    a.states = rates.n[0];
    REQUIRE(a.states > 0 && a.states <= 256 && b.n[1] == a.states && c.n[1] == a.states && dt.n[1] == a.channels);
    REQUIRE(out.n[0] == tokens && out.n[1] == a.channels);
    REQUIRE(skip.list(FLOAT32, a.channels) && dt_bias.list(FLOAT32, a.channels));
    REQUIRE(state.dims == 3 && state.dtype == FLOAT32 && state.contiguous() && state.n[1] == a.states &&
            state.n[2] == a.channels);
    REQUIRE(set_sequences(a.q, tokens, state, positions, starts, slots));
    a.x = x.data, a.dt = dt.data, a.b = b.data, a.c = c.data, a.gate = gate.data, a.x_row = x.stride[0];
    a.dt_row = dt.stride[0], a.b_row = b.stride[0], a.c_row = c.stride[0], a.gate_row = gate.data ? gate.stride[0] : 0;
    a.rates = (const float *)rates.data, a.skip = (const float *)skip.data, a.dt_bias = (const float *)dt_bias.data;
    a.state = (float *)state.data, a.out = out.data, a.dtype = x.dtype;
    return launch(r, (double)tokens * a.channels * a.states * 8, a, [](const SelectiveScan &a) {
        Refusal refusal = check(a.q);
        if (!refusal.message) chosen->selective_scan(a);
        return refusal;
    });
}

static PyObject *head_scan(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    HeadScan a{};
    Tensor x = r.t(), dt = r.t(), rates = r.t(), b = r.t(), c = r.t(), skip = r.t(), dt_bias = r.t(), state = r.t(),
           positions = r.t(), starts = r.t(), slots = r.t(), out = r.t();
    a.low = (float)r.f(), a.high = (float)r.f(), a.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    REQUIRE(r.good && x.rows(3) && x.floating() && out.dims == 3 && out.contiguous() && out.dtype == x.dtype);
    int64_t tokens = x.n[0];
    a.heads = x.n[1], a.head_dim = x.n[2];
    REQUIRE(out.n[0] == tokens && out.n[1] == a.heads && out.n[2] == a.head_dim);
    REQUIRE(dt.rows(2) && dt.dtype == x.dtype && dt.n[0] == tokens && dt.n[1] == a.heads);
    REQUIRE(b.rows(3) && b.dtype == x.dtype && b.n[0] == tokens && c.rows(3) && c.dtype == x.dtype && c.n[0] == tokens);
    a.groups = b.n[1], a.states = b.n[2];
    REQUIRE(a.groups > 0 && a.heads % a.groups == 0 && a.states > 0 && c.n[1] == a.groups && c.n[2] == a.states);
    REQUIRE(rates.list(FLOAT32, a.heads) && skip.list(FLOAT32, a.heads) && dt_bias.list(FLOAT32, a.heads));
    REQUIRE(state.dims == 4 && state.dtype == FLOAT32 && state.contiguous() && state.n[1] == a.heads &&
            state.n[2] == a.states && state.n[3] == a.head_dim);
    REQUIRE(set_sequences(a.q, tokens, state, positions, starts, slots));
    a.x = x.data, a.dt = dt.data, a.b = b.data, a.c = c.data, a.x_row = x.stride[0], a.x_head = x.stride[1];
    a.dt_row = dt.stride[0], a.b_row = b.stride[0], a.b_group = b.stride[1], a.c_row = c.stride[0];
    a.c_group = c.stride[1], a.rates = (const float *)rates.data, a.skip = (const float *)skip.data;
    a.dt_bias = (const float *)dt_bias.data, a.state = (float *)state.data, a.out = out.data, a.dtype = x.dtype;
    return launch(r, (double)tokens * a.heads * a.head_dim * a.states, a, [](const HeadScan &a) {
        Refusal refusal = check(a.q);
        if (!refusal.message) chosen->head_scan(a);
        return refusal;
    });
}

static PyObject *gated_norm(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    GatedNorm a{};
    Tensor x = r.t(), gate = r.t(), weight = r.t(), out = r.t();
    a.group = r.i(), a.eps = (float)r.f(), a.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    REQUIRE(r.good && x.rows(2) && gate.rows(2) && x.floating() && gate.dtype == x.dtype && out.dtype == x.dtype);
    a.tokens = x.n[0], a.width = x.n[1];
    REQUIRE(gate.n[0] == a.tokens && gate.n[1] == a.width && out.dims == 2 && out.contiguous() &&
            out.n[0] == a.tokens && out.n[1] == a.width);
    REQUIRE(weight.floating() && weight.list(weight.dtype, a.width) && a.group > 0 && a.width % a.group == 0);
    a.x = x.data, a.gate = gate.data, a.weight = weight.data, a.out = out.data, a.x_row = x.stride[0];
    a.gate_row = gate.stride[0], a.dtype = x.dtype, a.weight_dtype = weight.dtype;
    return launch(r, (double)a.tokens * a.width * 5, a, [](const GatedNorm &a) { chosen->gated_norm(a); });
}

// record(memory): see tape.h.
static PyObject *record(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    Tensor memory = r.t();
    if (!r.ok()) return nullptr;
    if (!r.good || !memory.contiguous()) return PyErr_Format(PyExc_TypeError, "record wants a contiguous tensor");
    DLTensor view;
    if (exchange->view(args[0], &view)) return nullptr;
    return start(memory.data, memory.data + memory.count() * (view.bits / 8));
}

// isa() names the variant in use, isa(name) also switches to it; for tests and benchmarks.
static PyObject *isa(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (count == 1) {
        Variant list[8];
        PyObject *bytes = PyUnicode_AsUTF8String(args[0]);
        if (!bytes) return nullptr;
        bool found = false;
        for (int i = 0, n = variants(list); i < n; ++i)
            if (list[i].runs && !strcmp(list[i].kernels->name, PyBytes_AsString(bytes)))
                chosen = list[i].kernels, found = true;
        Py_DECREF(bytes);
        if (!found) return PyErr_Format(PyExc_ValueError, "no such variant, or it does not run here: %R", args[0]);
    }
    return PyUnicode_FromString(chosen->name);
}

static PyObject *available(PyObject *, PyObject *const *, Py_ssize_t) {
    Variant list[8];
    PyObject *names = PyList_New(0);
    for (int i = 0, n = variants(list); i < n && names; ++i)
        if (list[i].runs) {
            PyObject *name = PyUnicode_FromString(list[i].kernels->name);
            if (name) PyList_Append(names, name), Py_DECREF(name);
        }
    return names;
}

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, nullptr}
static PyMethodDef methods[] = {METHOD(rms_norm), METHOD(layer_norm), METHOD(activate), METHOD(gated), METHOD(best),
                                METHOD(draw), METHOD(logprobs), METHOD(rotate),
                                METHOD(cache_write),
                                METHOD(rope_write), METHOD(paged_attention), METHOD(linear), METHOD(experts), METHOD(lora),
                                METHOD(causal_conv), METHOD(selective_scan), METHOD(head_scan), METHOD(gated_norm),
                                METHOD(isa), METHOD(use),
                                METHOD(available), METHOD(record), METHOD(recorded), METHOD(replay), METHOD(stop),
                                {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_lib", "CPU kernels; see modelport.kernels.", -1, methods,
                                 nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__lib(void) {
    Variant list[8];
    for (int i = 0, n = variants(list); i < n; ++i)
        if (list[i].runs) chosen = list[i].kernels;
    return PyModule_Create(&definition);
}
