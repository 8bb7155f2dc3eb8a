#include "tape.h"

namespace modelport {

thread_local Tape *recording = nullptr;
static thread_local PyObject *recording_capsule = nullptr;  // keeps it alive until `stop`

static const char *const NAME = "modelport.tape";

void Tape::hold(PyObject *tensor, const char *data) {
    if (data >= from && data < to) return;
    Py_INCREF(tensor);
    held.push_back(tensor);
}

static void destroy(PyObject *capsule) {
    Tape *tape = (Tape *)PyCapsule_GetPointer(capsule, NAME);
    for (PyObject *o : tape->held) Py_DECREF(o);
    delete tape;
}

PyObject *start(const char *from, const char *to) {
    if (recording) return PyErr_Format(PyExc_RuntimeError, "this thread is recording already");
    Tape *tape = new Tape{{}, {}, from, to};
    PyObject *capsule = PyCapsule_New(tape, NAME, destroy);
    if (!capsule) return delete tape, nullptr;
    Py_INCREF(capsule);
    recording = tape, recording_capsule = capsule;
    return capsule;
}

PyObject *recorded(PyObject *, PyObject *const *, Py_ssize_t) {
    return PyLong_FromSsize_t(recording ? (Py_ssize_t)recording->calls.size() : 0);
}

PyObject *stop(PyObject *, PyObject *const *, Py_ssize_t) {
    recording = nullptr;
    Py_CLEAR(recording_capsule);
    Py_RETURN_NONE;
}

PyObject *replay(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (count != 3) return PyErr_Format(PyExc_TypeError, "expected 3 arguments, got %zd", count);
    Tape *tape = (Tape *)PyCapsule_GetPointer(args[0], NAME);
    Py_ssize_t first = PyLong_AsSsize_t(args[1]), end = PyLong_AsSsize_t(args[2]);
    if (!tape || PyErr_Occurred()) return nullptr;
    if (first < 0 || first > end || end > (Py_ssize_t)tape->calls.size() || tape == recording)
        return PyErr_Format(PyExc_IndexError, "no calls %zd to %zd on this tape", first, end);
    Refusal refusal{};
    PyThreadState *state = PyEval_SaveThread();
    for (Py_ssize_t i = first; i < end && !refusal.message; ++i) refusal = tape->calls[i]();
    PyEval_RestoreThread(state);
    if (refusal.message) return refusal.raise();
    Py_RETURN_NONE;
}

}  // namespace modelport
