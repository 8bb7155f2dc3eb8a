"""What a layer says about the memory that it keeps between steps; the core sums it up, allocates and attaches.

A layer with memory has a `cache_spec` and an `attach` method: for a `CacheSpec` `attach(k_cache, v_cache, group)`, for
a `StateSpec` `attach(*states)`.
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CacheSpec:
    """Keys and values of every token, in blocks: (blocks, num_kv_heads, block_size, dim) each.

    :ivar window: only the last `window` keys are ever read, so older blocks are given back; 0 for all.
    :ivar v_head_dim: of the values; `head_dim` when not given, 0 when values are read out of the keys (latent
        attention): `v_cache` is None then.
    :ivar cross: keys of the encoder's tokens, written once.
    """

    num_kv_heads: int
    head_dim: int
    window: int = 0
    v_head_dim: int | None = None
    cross: bool = False

    @property
    def dims(self) -> tuple[int, int]:
        """Sizes of a key's and a value's head."""
        return self.head_dim, self.head_dim if self.v_head_dim is None else self.v_head_dim

    def bytes_per_block(self, block_size: int, dtype: torch.dtype) -> int:
        return self.num_kv_heads * block_size * sum(self.dims) * dtype.itemsize


@dataclass(frozen=True)
class StateSpec:
    """Recurrent state: for each running sequence one row of tensors, (rows, *shape) each.

    A row holds anything, NaN included, when a sequence gets it: the layer starts from nothing where a sequence's first
    row has position 0. There are no prefix-cache hits in models with such layers.

    :ivar shapes: of one row of each tensor.
    :ivar dtypes: of each tensor; None for the model's own.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype | None, ...]

    def bytes_per_row(self, dtype: torch.dtype) -> int:
        return sum(math.prod(s) * (d or dtype).itemsize for s, d in zip(self.shapes, self.dtypes, strict=True))
