"""Timing on a GPU, and what the card can do at most; shared by the parts of `gpu.py`.

Short kernels are timed inside a CUDA graph that runs several of them, over data that changes from one to the next, so
that neither launches nor caches are what is measured.
"""

import statistics
import time
from collections.abc import Callable

import torch


def seconds(call: Callable[[int], object], device: str, inner: int = 10, rounds: int = 20) -> float:
    """Median seconds of one call; call(i) gets a running number to choose its data by."""
    if device == "cpu":
        call(0)
        began = time.perf_counter()
        call(1)
        return time.perf_counter() - began
    for i in range(3):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for i in range(inner):
                call(i)
        again = graph.replay
    except RuntimeError:  # something in it looks at the device

        def again() -> None:
            for i in range(inner):
                call(i)

    again()
    took = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        again()
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end) / 1e3 / inner)
    return statistics.median(took)


def limits(device: str, tiny: bool) -> dict[str, float]:
    """Bytes per second that reads and copies reach, and bf16 operations per second of a large product."""
    size = 1 << 20 if tiny else 1 << 30  # float32 numbers
    big = torch.randn(size // 4, device=device).repeat(4)
    other = torch.empty_like(big)
    read = big.nbytes / seconds(lambda _, big=big: big.sum(), device, inner=2)
    copied = 2 * big.nbytes / seconds(lambda _, big=big, other=other: other.copy_(big), device, inner=2)
    n = 128 if tiny else 8192
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    rate = 2 * n**3 / seconds(lambda _, a=a, b=b: a @ b, device, inner=3)
    del big, other, a, b
    if device == "cuda":
        torch.cuda.empty_cache()  # an engine takes what is free
    return {"read_bytes_s": max(read, copied), "sum_bytes_s": read, "copy_bytes_s": copied, "bf16_flop_s": rate}
