// A tape: kernel calls with their arguments resolved, kept in order so that a whole step can be done again without Python.
//
// A call is recorded where it is made (`launch` in module.cpp), as a copy of its argument record. What such a record points
// to belongs to tensors, so the tape holds those that the call was given, but for those in the memory of the recording,
// which uses their places again. Indices that come from tensor data are other ones at every replay: a call checks them each
// time it runs, and answers with a Refusal.
#pragma once
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <functional>
#include <vector>

namespace modelport {

struct Refusal {
    const char *message;  // with places for two numbers; null: all is well
    long long value, limit;

    PyObject *raise() const { return PyErr_Format(PyExc_ValueError, message, value, limit); }
};

struct Tape {
    std::vector<std::function<Refusal()>> calls;
    std::vector<PyObject *> held;
    const char *from, *to;  // memory that stays without being held

    void hold(PyObject *tensor, const char *data);
};

extern thread_local Tape *recording;  // the tape that takes down this thread's calls, or null

// start(from, to) -> tape: from now on this thread's calls are taken down; stop() ends that.
// recorded() -> how many there are; replay(tape, first, end) does calls [first, end) again, other threads running.
PyObject *start(const char *from, const char *to);
PyObject *recorded(PyObject *, PyObject *const *args, Py_ssize_t count);
PyObject *replay(PyObject *, PyObject *const *args, Py_ssize_t count);
PyObject *stop(PyObject *, PyObject *const *args, Py_ssize_t count);

}  // namespace modelport
