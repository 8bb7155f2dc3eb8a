"""How much memory is there, and how many cache blocks to make of it."""

import math
from pathlib import Path

import numpy as np
import torch

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
