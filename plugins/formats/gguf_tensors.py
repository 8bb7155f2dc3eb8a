"""Read one tensor of a GGUF file as float32.

Decisions: the `gguf` library knows the quantisations; it is handed some thousand blocks at a time as one row, which is
several times faster than by its rows of a tensor, and needs no second copy of a large one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from modelport.plugins.formats.gguf_header import Header, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

_BLOCKS_AT_ONCE = 1 << 12  # of 32 values: half a megabyte of float32, which stays in the cache


def library() -> Any:
    """The package `gguf`; ImportError with the way to install it when it is not there."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"reading the weights of a GGUF file needs the package gguf ({error}); pip install 'modelport[gguf]'"
        ) from error
    return gguf


def _sizes(info: TensorInfo) -> tuple[int, int]:
    """Values and bytes in one block of the tensor's type."""
    gguf = library()
    try:
        return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(info.type)]
    except (KeyError, ValueError):
        raise ValueError(f"tensor {info.name!r} has GGML type {info.type}, unknown to gguf; upgrade gguf") from None


def check_size(header: Header) -> None:
    """Raise ValueError when the file ends before one of its tensors does."""
    size = header.path.stat().st_size
    for info in header.tensors:
        values, width = _sizes(info)
        end = info.offset + math.prod(info.shape) // values * width
        if end > size:
            raise ValueError(
                f"{header.path} is truncated: tensor {info.name!r} ends at byte {end}, the file at {size}; "
                "download or copy it again"
            )


def read_tensor(header: Header, info: TensorInfo) -> Tensor:
    """Return one tensor as float32, in row-major shape."""
    import numpy as np
    import torch

    gguf = library()
    kind, (values, width) = gguf.GGMLQuantizationType(info.type), _sizes(info)
    out = np.empty(math.prod(info.shape), np.float32)
    step = _BLOCKS_AT_ONCE * 32 // values
    with header.path.open("rb", buffering=0) as file:
        file.seek(info.offset)
        for start in range(0, out.size // values, step):
            count = min(step, out.size // values - start)
            raw = np.fromfile(file, np.uint8, count * width)
            if raw.size < count * width:
                raise ValueError(f"{header.path} ends inside tensor {info.name!r}; download it again")
            try:  # one row of many blocks: the library then works on all of them at once
                part = gguf.quants.dequantize(raw.reshape(1, -1), kind)
            except NotImplementedError:
                raise ValueError(
                    f"tensor {info.name!r} is stored as {kind.name}, which the package gguf cannot dequantise; "
                    "use another quantisation of this model"
                ) from None
            out[start * values : (start + count) * values] = part.reshape(-1)
    return torch.from_numpy(out).view(info.shape)
