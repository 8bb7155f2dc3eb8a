"""Measures a mixture of experts on the CPU: ``python benchmarks/moe.py [hidden width experts chosen]``.

At prefill against one dense product of the same operations by the linear kernel, at decode against the rate at which a
plain read of a large buffer goes: each used expert's weights are counted once.
"""

import sys

import torch

from kernels import limits, seconds
from modelport.kernels import cpu, linear, moe

SHAPE = tuple(map(int, sys.argv[1:5])) or (2048, 1408, 64, 6)


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
    took = seconds(lambda _: moe.experts(x, ids, shares, *packed, "silu"), 0.01, 3)
    # as many multiplications in one product: every token's row for each of its experts
    dense = linear.pack((torch.randn(2 * width, hidden) / hidden**0.5).to(dtype))
    rows = torch.randn(tokens * chosen, hidden).to(dtype)
    same = seconds(lambda _: linear.linear(rows, dense), 0.01, 3) * 1.5
    rate = 6 * tokens * chosen * hidden * width / 1e9
    print(
        f"prefill {tokens:5} {str(dtype)[6:]:8} {took * 1e3:8.1f} ms {rate / took:6.1f} GFLOP/s"
        f"  dense {rate / same:6.1f}  ratio {same / took:4.0%}",
        flush=True,
    )


def decode(tokens: int, dtype: torch.dtype, packed: tuple[moe.PackedExperts, moe.PackedExperts], read: float) -> None:
    hidden, width, count, chosen = SHAPE
    x, shares = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, chosen)
    # the choices wander, so that no cache keeps a used expert
    ids = [torch.rand(tokens, count).topk(chosen).indices for _ in range(8)]
    used = sum(len(i.unique()) for i in ids) / len(ids)
    took = seconds(lambda i: moe.experts(x, ids[i % len(ids)], shares, *packed, "silu"), 0.2)
    moved = used * 3 * hidden * width * dtype.itemsize
    print(
        f"decode  {tokens:5} {str(dtype)[6:]:8} {took * 1e3:8.2f} ms  {used:4.1f} experts"
        f"  {moved / took / 1e9:6.1f} GB/s of {read / 1e9:.1f} ({moved / took / read:4.0%})",
        flush=True,
    )


def main() -> None:
    print(f"threads {torch.get_num_threads()}, kernels: {cpu.lib.isa() if cpu.lib else 'torch references'}, {SHAPE}")
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            packed, (read, _) = layer(dtype), limits(dtype)
            for tokens in (1, 4, 16):
                decode(tokens, dtype, packed, read)
            for tokens in (256, 512, 1024):
                prefill(tokens, dtype, packed)


if __name__ == "__main__":
    main()
