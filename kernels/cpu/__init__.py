"""Loads the compiled CPU kernels when they were built; otherwise `lib` is None and every op uses its torch reference.

For packaging: one optional extension, ``modelport.kernels.cpu._lib``, from `SOURCES` with `COMPILE_ARGS` (both in
``build.py`` beside this file, which imports nothing of modelport), language c++, limited API of Python 3.10.
It has threads of its own (pool.cpp), who share a kernel's work as they come: OpenMP teams assemble at every kernel, and
one busy processor then makes each of hundreds of kernels wait for a time slice.
Tensors are read through the DLPack exchange table of torch (2.10 and later), so that a call costs little more than
Python's own overhead. A function of the library answers False where it does not take its arguments.

``MODELPORT_CPU_KERNELS=0`` chooses the torch references. Kernels know nothing of autograd.
"""

import importlib
import os
from types import ModuleType

import torch

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16))  # what the kernels compute with

# Asked at every call: torch also hands its setting to a thread that is new to it on this occasion.
threads = torch.get_num_threads


def _load() -> ModuleType | None:
    if os.environ.get("MODELPORT_CPU_KERNELS") == "0":
        return None
    try:
        found = importlib.import_module("modelport.kernels.cpu._lib")
        found.use(torch.Tensor, torch.nn.Parameter)
    except (ImportError, AttributeError):  # never built, or built against something this machine or torch lacks
        return None
    return found


lib = _load()
