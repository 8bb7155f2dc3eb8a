// The Python face: each function takes plain integers and floats positionally (METH_FASTCALL, well under a microsecond a
// call), checks every index that comes from tensor data, and calls the variant chosen for this machine.
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string.h>

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
    list[n++] = {&avx512bf16::kernels, five && __builtin_cpu_supports("avx512bf16")};
#endif
    return n;
}

// Reads the arguments of a call in order; errors show at the end.
struct Reader {
    PyObject *const *args;
    Py_ssize_t count, at = 0;
    PyObject *next() { return at < count ? args[at++] : (++at, nullptr); }
    int64_t i() {
        PyObject *o = next();
        return o ? PyLong_AsLongLong(o) : 0;
    }
    void *p() { return (void *)(intptr_t)i(); }
    double f() {
        PyObject *o = next();
        return o ? PyFloat_AsDouble(o) : 0;
    }
    bool ok() {
        if (PyErr_Occurred()) return false;
        if (at == count) return true;
        PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", at, count);
        return false;
    }
};

// Lets other Python threads run during `work` multiplications, when that is long enough to be worth it.
template <class F> static PyObject *release(double work, F f) {
    if (work > 1e6) {
        PyThreadState *state = PyEval_SaveThread();
        f();
        PyEval_RestoreThread(state);
    } else f();
    Py_INCREF(Py_None);
    return Py_None;
}

static PyObject *refuse(const char *message, int64_t value, int64_t limit) {
    return PyErr_Format(PyExc_ValueError, message, (long long)value, (long long)limit);
}

static void read_rows(Reader &r, Rows &a) {
    a.x = r.p(), a.outer = r.i(), a.inner = r.i(), a.outer_stride = r.i(), a.inner_stride = r.i(), a.width = r.i();
}

static PyObject *rms_norm(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    Norm a{};
    read_rows(r, a.rows);
    a.weight = r.p(), a.weight_dtype = (int)r.i(), a.rows.out = r.p(), a.rows.dtype = (int)r.i();
    a.eps = (float)r.f(), a.offset = (float)r.f(), a.rows.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    return release((double)a.rows.outer * a.rows.inner * a.rows.width, [&] { chosen->rms_norm(a); });
}

static PyObject *layer_norm(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    Norm a{};
    read_rows(r, a.rows);
    a.weight = r.p(), a.bias = r.p(), a.weight_dtype = (int)r.i(), a.rows.out = r.p(), a.rows.dtype = (int)r.i();
    a.eps = (float)r.f(), a.rows.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    return release((double)a.rows.outer * a.rows.inner * a.rows.width, [&] { chosen->layer_norm(a); });
}

static PyObject *act(PyObject *const *args, Py_ssize_t count, bool gated) {
    Reader r{args, count};
    Rows a{};
    a.x = r.p(), a.outer = 1, a.inner = r.i(), a.width = r.i(), a.inner_stride = r.i(), a.out = r.p();
    a.dtype = (int)r.i();
    int kind = (int)r.i();
    a.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    return release((double)a.inner * a.width * 4, [&] { (gated ? chosen->gated : chosen->activate)(a, kind); });
}
static PyObject *activate(PyObject *, PyObject *const *args, Py_ssize_t count) { return act(args, count, false); }
static PyObject *gated(PyObject *, PyObject *const *args, Py_ssize_t count) { return act(args, count, true); }

static PyObject *run_rope_write(RopeWrite &a) {
    if (a.cos_sin)
        for (int64_t t = 0; t < a.tokens; ++t)
            if (a.positions[t] < 0 || a.positions[t] >= a.max_position)
                return refuse("position %lld is outside the rotary table of %lld positions", a.positions[t], a.max_position);
    if (a.k)
        for (int64_t t = 0; t < a.tokens; ++t)
            if (a.slots[t] >= a.blocks * a.block_size)
                return refuse("slot %lld is outside the cache of %lld slots", a.slots[t], a.blocks * a.block_size);
    return release((double)a.tokens * (a.heads + 2 * a.kv_heads) * a.k_dim, [&] { chosen->rope_write(a); });
}

static PyObject *rotate(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    RopeWrite a{};
    a.q = r.p(), a.tokens = r.i(), a.heads = r.i(), a.k_dim = r.i(), a.q_token = r.i(), a.q_head = r.i();
    a.positions = (const int64_t *)r.p(), a.cos_sin = (const float *)r.p(), a.max_position = r.i(), a.rotary = r.i();
    a.interleaved = r.i(), a.dtype = (int)r.i(), a.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    return run_rope_write(a);
}

static PyObject *rope_write(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    RopeWrite a{};
    a.q = r.p(), a.q_token = r.i(), a.q_head = r.i(), a.heads = r.i();
    a.k = r.p(), a.k_token = r.i(), a.k_head = r.i(), a.v = r.p(), a.v_token = r.i(), a.v_head = r.i();
    a.tokens = r.i(), a.kv_heads = r.i(), a.k_dim = r.i(), a.v_dim = r.i();
    a.positions = (const int64_t *)r.p(), a.cos_sin = (const float *)r.p(), a.max_position = r.i(), a.rotary = r.i();
    a.interleaved = r.i();
    a.k_cache = r.p(), a.k_block = r.i(), a.k_cache_head = r.i(), a.k_slot = r.i();
    a.v_cache = r.p(), a.v_block = r.i(), a.v_cache_head = r.i(), a.v_slot = r.i();
    a.blocks = r.i(), a.block_size = r.i(), a.slots = (const int64_t *)r.p(), a.dtype = (int)r.i(), a.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    return run_rope_write(a);
}

static PyObject *paged_attention(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    Attention a{};
    a.q = r.p(), a.q_token = r.i(), a.q_head = r.i(), a.tokens = r.i(), a.heads = r.i(), a.head_dim = r.i();
    a.k = r.p(), a.k_block = r.i(), a.k_head = r.i(), a.k_slot = r.i();
    a.v = r.p(), a.v_block = r.i(), a.v_head = r.i(), a.v_slot = r.i();
    a.blocks = r.i(), a.kv_heads = r.i(), a.block_size = r.i(), a.v_dim = r.i();
    a.table = (const int32_t *)r.p(), a.table_stride = r.i(), a.table_width = r.i();
    a.starts = (const int32_t *)r.p(), a.lens = (const int32_t *)r.p(), a.seqs = r.i();
    a.alibi = (const float *)r.p(), a.sinks = (const float *)r.p(), a.out = r.p(), a.dtype = (int)r.i(), a.window = r.i();
    a.scale = (float)r.f(), a.softcap = (float)r.f(), a.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    if (a.starts[0] != 0 || a.starts[a.seqs] > a.tokens)
        return refuse("query_starts must begin with 0 and end within the tokens; it ends with %lld of %lld",
                      a.starts[a.seqs], a.tokens);
    double work = 0;
    for (int64_t s = 0; s < a.seqs; ++s) {
        int64_t queries = a.starts[s + 1] - a.starts[s], len = a.lens[s];
        if (queries < 0) return refuse("query_starts goes down at sequence %lld of %lld", s, a.seqs);
        if (!queries) continue;
        if (len < queries) return refuse("a sequence has %lld keys but %lld queries", len, queries);
        int64_t used = (len + a.block_size - 1) / a.block_size;
        if (used > a.table_width) return refuse("a sequence needs %lld blocks, block_table has %lld columns", used, a.table_width);
        // blocks before a window may have been freed, so their entries are not looked at
        int64_t low = a.window > 0 && len - queries - a.window + 1 > 0 ? len - queries - a.window + 1 : 0;
        for (int64_t b = low / a.block_size; b < used; ++b) {
            int32_t block = a.table[s * a.table_stride + b];
            if (block < 0 || block >= a.blocks) return refuse("block_table names block %lld of %lld", block, a.blocks);
        }
        work += (double)queries * a.heads * len * a.head_dim;
    }
    return release(work, [&] { chosen->attention(a); });
}

static PyObject *linear(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Reader r{args, count};
    Linear a{};
    a.x = r.p(), a.x_stride = r.i(), a.rows = r.i(), a.in = r.i(), a.out = r.i(), a.weight = r.p();
    a.weight_dtype = (int)r.i(), a.scales = (const float *)r.p(), a.bias = r.p(), a.residual = r.p();
    a.residual_stride = r.i(), a.result = r.p(), a.dtype = (int)r.i(), a.threads = (int)r.i();
    if (!r.ok()) return nullptr;
    return release((double)a.rows * a.in * a.out, [&] { chosen->linear(a); });
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
static PyMethodDef methods[] = {METHOD(rms_norm), METHOD(layer_norm), METHOD(activate), METHOD(gated), METHOD(rotate),
                                METHOD(rope_write), METHOD(paged_attention), METHOD(linear), METHOD(isa),
                                METHOD(available), {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_lib", "CPU kernels; see modelport.kernels.", -1, methods,
                                 nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__lib(void) {
    Variant list[8];
    for (int i = 0, n = variants(list); i < n; ++i)
        if (list[i].runs) chosen = list[i].kernels;
    return PyModule_Create(&definition);
}
