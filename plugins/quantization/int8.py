"""int8: weights as 8-bit integers with one scale per output, activations as they are; made while weights load."""

from collections.abc import Callable

from torch import Tensor

from modelport.kernels.linear import PackedWeight, pack_int8
from modelport.plugin import hookimpl

modelport_api = 1


@hookimpl
def quantization(name: str) -> Callable[[Tensor], PackedWeight] | None:
    return pack_int8 if name == "int8" else None
