"""How much memory is there, and what to make of it: cache blocks for every group of layers, rows for recurrent states.

Decisions: a group never gets more blocks than its requests can use at once, so a sliding window costs its window; what
the budget holds beyond that goes to the groups that keep everything.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from modelport.config import EngineConfig
from modelport.engine.cache import BlockPool, Group, most_blocks
from modelport.modeling.cache import CacheSpec, StateSpec
from modelport.parallel.groups import Place

logger = logging.getLogger(__name__)

DEFAULT_CPU_CACHE = 4 << 30
"""Most bytes of cache that a CPU engine takes without being asked; pages are only touched when they are used."""


def available_memory(device: torch.device) -> int:
    """Bytes that can be taken now on `device` without swapping; a container's limit counts."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [_meminfo()]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        found.append(int(text) - int(used.read_text()))
    return max(0, min(found))


def _meminfo() -> int:
    path = Path("/proc/meminfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 8 << 30  # no way to ask: a modest guess


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of zeros; on the CPU its pages take no memory until they are written, which `torch.zeros` would do."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def cache_budget(device: torch.device) -> int:
    """Bytes for the cache when the user named none."""
    available = available_memory(device)
    return int(available * 0.85) if device.type == "cuda" else min(available // 2, DEFAULT_CPU_CACHE)


MEDIA_KEYS = 1 << 13
"""Keys that cross attention to media of one request has room for, memory permitting, however short a request may be."""


@dataclass(frozen=True)
class Limits:
    """What an engine wants room for.

    :ivar max_model_len: tokens of one request; less is given when the cache has no room for it and the user named no
        length.
    :ivar num_rows: running requests; fewer are given when their states take half the memory and the user named none.
    :ivar chunk: most tokens that a request computes in one step.
    """

    max_model_len: int
    num_rows: int
    chunk: int


def cache_kinds(model: nn.Module) -> list[tuple[int, bool]]:
    """(window, cross) of each group of layers that forget alike, in the order in which layers have them."""
    specs = (getattr(module, "cache_spec", None) for module in model.modules())
    return list(dict.fromkeys((spec.window, spec.cross) for spec in specs if isinstance(spec, CacheSpec)))


@dataclass(frozen=True)
class Memory:
    """What a model got.

    :ivar groups: of its paged caches.
    :ivar num_rows: most running requests.
    :ivar max_model_len: most tokens of one request.
    :ivar shareable: whether equal beginnings of prompts can be shared between requests.
    :ivar states: of recurrent layers, (num_rows, *shape) each.
    """

    groups: list[Group]
    num_rows: int
    max_model_len: int
    shareable: bool
    states: list[torch.Tensor]


def attach_memory(
    model: nn.Module,
    settings: EngineConfig,
    dtype: torch.dtype,
    device: torch.device,
    limits: Limits,
    kinds: list[tuple[int, bool]] | None = None,
    place: Place | None = None,
) -> Memory:
    """Allocate and attach what the layers of `model` declare.

    :param kinds: `cache_kinds` of the whole model, when this is a part of it.
    :param place: whose part; all places get what the one with least room has room for.
    :raises ValueError: the user named a length that does not fit.
    """
    max_model_len, num_rows, chunk = limits.max_model_len, limits.num_rows, limits.chunk
    kinds = cache_kinds(model) if kinds is None else kinds
    layers = [module for module in model.modules() if hasattr(module, "cache_spec")]
    paged = [layer for layer in layers if isinstance(layer.cache_spec, CacheSpec)]
    recurrent = [layer for layer in layers if isinstance(layer.cache_spec, StateSpec)]
    budget = settings.kv_cache_memory_bytes or cache_budget(device)
    if place is not None and device.type == "cpu" and settings.kv_cache_memory_bytes is None:
        budget //= place.tp_size * place.pp_size * settings.data_parallel_size  # they share the machine's memory
    row = sum(layer.cache_spec.bytes_per_row(dtype) for layer in recurrent)
    if row and settings.max_num_seqs is None:
        num_rows = max(1, min(num_rows, budget // 2 // row))
    if place is not None:
        num_rows = place.least(num_rows)
    size = settings.block_size
    kept = dtype if settings.kv_cache_dtype == "auto" else torch.float8_e4m3fn
    bytes_of = [
        sum(s.bytes_per_block(size, kept) for s in (p.cache_spec for p in paged) if (s.window, s.cross) == kind)
        for kind in kinds
    ]
    per_row = [min(-(-max_model_len // size), most_blocks(window, chunk, size)) for window, _ in kinds]
    reads_media = not hasattr(model, "encode")
    least = [-(-MEDIA_KEYS // size) if cross and reads_media else 0 for _, cross in kinds]
    limits = [num_rows * max(pair) for pair in zip(per_row, least, strict=True)]
    if settings.num_kv_blocks is not None:
        blocks = settings.num_kv_blocks
    else:
        blocks = _blocks_within(max(0, budget - num_rows * row), bytes_of, limits)
    if place is not None:
        blocks = place.least(blocks)
    counts = [max(1, min(blocks, limit)) for limit in limits]
    if any(count < least for count, least in zip(counts, per_row, strict=True)):  # else the whole length fits
        max_model_len = _fitting_length(blocks * size, max_model_len, settings)
    groups = [Group(BlockPool(n), *kind) for n, kind in zip(counts, kinds, strict=True)]
    for layer in paged:
        spec, group = layer.cache_spec, kinds.index((layer.cache_spec.window, layer.cache_spec.cross))
        k_cache, v_cache = (
            zeros((counts[group], spec.num_kv_heads, size, dim), kept, device) if dim else None for dim in spec.dims
        )
        layer.attach(k_cache, v_cache, group)
    states = []
    for layer in recurrent:
        spec = layer.cache_spec
        mine = [zeros((num_rows, *s), d or dtype, device) for s, d in zip(spec.shapes, spec.dtypes, strict=True)]
        layer.attach(*mine)
        states.extend(mine)
    shareable = bool(kinds) and not recurrent and (reads_media or not any(cross for _, cross in kinds))
    if place is not None:
        shareable = bool(place.least(shareable))
    return Memory(groups, num_rows, max_model_len, shareable, states)


def _blocks_within(budget: int, bytes_of: list[int], limits: list[int]) -> int:
    """The most blocks for each group, or its limit where that is less, that `budget` bytes hold."""
    low, high = 1, max(limits, default=1)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(b * min(middle, limit) for b, limit in zip(bytes_of, limits, strict=True)) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def _fitting_length(capacity: int, wanted: int, settings: EngineConfig) -> int:
    if capacity >= wanted:
        return wanted
    if settings.max_model_len is not None:
        raise ValueError(
            f"max_model_len={wanted} tokens do not fit the cache, which has room for {capacity}; "
            "lower max_model_len, or raise kv_cache_memory_bytes or num_kv_blocks"
        )
    logger.warning("max_model_len is %d, not the model's %d: the cache has no room for more", capacity, wanted)
    return capacity
