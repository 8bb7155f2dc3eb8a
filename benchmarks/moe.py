"""Measures a mixture of experts on the CPU: ``python benchmarks/moe.py [filter]``, such as ``"prefill 512"``.

At prefill against one dense product of the same operations by the linear kernel, at decode against the rate at which a
plain read of a large buffer goes: each used expert's weights are counted once. The two sides of a comparison take
turns, and each counts with its best time: whatever disturbs one only ever makes it slower.
"""

import sys
import time
from collections.abc import Callable

import torch

from modelport.kernels import cpu, linear, moe

SHAPE = (2048, 1408, 64, 6)  # hidden, width, experts, chosen
WANTED = sys.argv[1] if len(sys.argv) > 1 else ""


def best(*calls: Callable[[int], object], rounds: int = 5) -> list[float]:
    """Least seconds of each call; call(i) gets a running number to choose its data by."""
    took = [float("inf")] * len(calls)
    for i in range(-1, rounds):
        for which, call in enumerate(calls):
            began = time.perf_counter()
            call(i)
            if i >= 0:
                took[which] = min(took[which], time.perf_counter() - began)
    return took


def layer(dtype: torch.dtype) -> tuple[moe.PackedExperts, moe.PackedExperts]:
    hidden, width, count, _ = SHAPE
    made = []
    for shape in ((count, 2, width, hidden), (count, 1, hidden, width)):
        weight = torch.empty(shape, dtype=dtype)
        for expert in weight:
            expert.copy_(torch.randn(shape[1:]) / shape[3] ** 0.5)
        made.append(moe.pack(weight))
    return made[0], made[1]


def prefill(tokens: int, dtype: torch.dtype, packed: tuple[moe.PackedExperts, moe.PackedExperts]) -> None:
    hidden, width, count, chosen = SHAPE
    x = torch.randn(tokens, hidden).to(dtype)
    ids, shares = torch.rand(tokens, count).topk(chosen).indices, torch.rand(tokens, chosen)
    # two thirds of the multiplications in one product: every token's row once for each of its experts
    dense = linear.pack((torch.randn(2 * width, hidden) / hidden**0.5).to(dtype))
    rows = torch.randn(tokens * chosen, hidden).to(dtype)
    took, same = best(
        lambda _: moe.experts(x, ids, shares, *packed, "silu"), lambda _: linear.linear(rows, dense), rounds=4
    )
    rate, dense_rate = (n * tokens * chosen * hidden * width / t / 1e9 for n, t in ((6, took), (4, same)))
    print(f"  {took * 1e3:8.1f} ms {rate:6.1f} GFLOP/s of {dense_rate:.1f} ({rate / dense_rate:.0%})", flush=True)


def decode(tokens: int, dtype: torch.dtype, packed: tuple[moe.PackedExperts, moe.PackedExperts]) -> None:
    hidden, width, count, chosen = SHAPE
    x, shares = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, chosen)
    # the choices wander, so that no cache keeps a used expert
    ids = [torch.rand(tokens, count).topk(chosen).indices for _ in range(20)]
    used = len(ids[0].unique())
    # rounds differ in how many experts they use; all of them use the first's, each in an order of its own
    ids = [torch.randperm(count)[ids[0]] for _ in ids]
    big = torch.ones(1 << 26)  # 256 MiB
    took, read = best(lambda i: moe.experts(x, ids[i], shares, *packed, "silu"), lambda _: big.sum(), rounds=19)
    rate, limit = used * 3 * hidden * width * dtype.itemsize / took / 1e9, big.nbytes / read / 1e9
    print(f"  {took * 1e3:8.2f} ms {used:3} experts {rate:6.1f} GB/s of {limit:.1f} ({rate / limit:.0%})", flush=True)


def main() -> None:
    print(f"threads {torch.get_num_threads()}, kernels: {cpu.lib.isa() if cpu.lib else 'torch references'}, {SHAPE}")
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            packed = layer(dtype)
            for what, tokens in [(decode, n) for n in (1, 4, 16)] + [(prefill, n) for n in (256, 512, 1024)]:
                name = f"{what.__name__} {tokens} {str(dtype)[6:]}"
                if WANTED in name:
                    print(f"{name:24}", end="")
                    what(tokens, dtype, packed)


if __name__ == "__main__":
    main()
