"""int8 and fp8: weights as 8-bit integers or floats (e4m3) with one scale per output; made while weights load.

Activations stay as they are. fp8 is for GPUs: on a CPU it saves memory only.
"""

from collections.abc import Callable

from torch import Tensor

from modelport.kernels.linear import PackedWeight, pack_fp8, pack_int8
from modelport.plugin import hookimpl

modelport_api = 1


@hookimpl
def quantization(name: str) -> Callable[[Tensor], PackedWeight] | None:
    return {"int8": pack_int8, "fp8": pack_fp8}.get(name)
