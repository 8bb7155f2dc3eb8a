"""What this machine can do at all: ``python benchmarks/limits.py`` prints bytes and operations per second as JSON.

Decisions: torch with all its threads is the yardstick; the best of several tries is the limit of one measurement,
since whatever disturbs one only ever makes it slower.
"""

import json
import time
from collections.abc import Callable

import torch


def measure(tries: int = 7) -> dict[str, float]:
    """Reading a buffer that no cache holds, and square products large enough to hide their overhead."""
    buffer = torch.ones(1 << 26)  # 256 MiB
    found = {"read_bytes_s": buffer.nbytes / _best(lambda: buffer.sum(), tries)}
    size = 1536
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        found[f"{str(dtype).removeprefix('torch.')}_flop_s"] = 2 * size**3 / _best(lambda a=a, b=b: a @ b, tries)
    return {**found, "threads": torch.get_num_threads()}


def _best(call: Callable[[], object], tries: int) -> float:
    call()
    least = float("inf")
    for _ in range(tries):
        began = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - began)
    return least


if __name__ == "__main__":
    print(json.dumps(measure()))
