"""Triton kernels for tensors on a GPU, one file for each operation; imported when the first such tensor comes.

Decisions: `kernels/<op>.py` asks `takes` and calls the function of the same name here, which follows its contract.
Nothing here looks at a number on the device, so every launch can be captured in a CUDA graph and none waits: indices
that come from tensors are not checked, and one that leads outside is left out instead of raised. Sums are float32
(products of float32 matrices included, not tf32), results rounded once.

``MODELPORT_GPU_KERNELS=0`` chooses the torch references on a GPU too. ``MODELPORT_GPU_KERNELS=interpret`` runs these
kernels on the CPU with Triton's interpreter, slowly, for tests; it must be set before triton is imported.
"""

import functools
import importlib
import importlib.util
import os
from types import ModuleType

from torch import Tensor

_setting = os.environ.get("MODELPORT_GPU_KERNELS", "1")
interpreted = _setting == "interpret"
"""Whether these kernels serve tensors on the CPU, through the interpreter."""
if interpreted:
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when triton is imported


@functools.cache
def _installed() -> bool:
    return _setting != "0" and importlib.util.find_spec("triton") is not None


def takes(x: Tensor) -> bool:
    """Whether the kernels here are to be used for `x`."""
    return interpreted or (x.is_cuda and _installed())


def __getattr__(name: str) -> ModuleType:
    """`gpu.norm` imports the module, and triton with it."""
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(name) from None
