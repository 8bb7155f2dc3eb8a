"""Loads the compiled CPU kernels when they were built; otherwise `lib` is None and every op uses its torch reference.

For packaging: one optional extension, ``modelport.kernels.cpu._lib``, from `SOURCES` with `COMPILE_ARGS` (both in
``build.py`` beside this file, which imports nothing of modelport), language c++, limited API of Python 3.10.
It is compiled with OpenMP but not linked to it: before it is loaded, torch's own OpenMP library is made visible to
it, so that both share one pool of threads. Two pools, each spinning while the other works, make small machines crawl.
Tensors are read through the DLPack exchange table of torch (2.10 and later), so that a call costs little more than
Python's own overhead. A function of the library answers False where it does not take its arguments.

``MODELPORT_CPU_KERNELS=0`` chooses the torch references. Kernels know nothing of autograd.
"""

import ctypes
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16))  # what the kernels compute with

# Asked at every call: torch also hands its setting to a thread that is new to it on this occasion.
threads = torch.get_num_threads


def _share_openmp() -> None:
    if sys.platform != "linux":
        return
    home = Path(torch.__file__).parent
    bundled = [*home.glob("lib/libgomp*.so*"), *home.parent.glob("torch.libs/libgomp*.so*")]
    for name in [*map(str, bundled), "libgomp.so.1"]:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            return
        except OSError:
            continue


def _load() -> ModuleType | None:
    if os.environ.get("MODELPORT_CPU_KERNELS") == "0":
        return None
    _share_openmp()
    try:
        found = importlib.import_module("modelport.kernels.cpu._lib")
        found.use(torch.Tensor, torch.nn.Parameter)
    except (ImportError, AttributeError):  # never built, or built against something this machine or torch lacks
        return None
    return found


lib = _load()
