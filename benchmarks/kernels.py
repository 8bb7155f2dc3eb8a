# ruff: noqa: B023 - each closure is timed before its loop moves on
"""Measures the CPU kernels against this machine's own limits: ``python benchmarks/kernels.py [filter]``.

Limits: bytes per second that a plain read of a large buffer reaches, and torch's rate for a large square product. Each
figure is the median of several runs over enough copies of the data that no cache keeps them all, as in a real model.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from modelport.kernels import activation, attention, cpu, kv_cache, linear, norm

MODELS = {  # hidden, intermediate, heads, kv_heads, head_dim
    "SmolLM2-135M": (576, 1536, 9, 3, 64),
    "Llama-1B": (2048, 8192, 32, 8, 64),
}
WANTED = sys.argv[1] if len(sys.argv) > 1 else ""


def seconds(call: Callable[[int], object], least: float = 0.15, rounds: int = 5) -> float:
    """Median seconds of one call; call(i) gets a running number to choose its data by."""
    call(0)
    count, took = 1, 0.0
    while took < least / rounds:
        count *= 2
        began = time.perf_counter()
        for i in range(count):
            call(i)
        took = time.perf_counter() - began
    runs = []
    for _ in range(rounds):
        began = time.perf_counter()
        for i in range(count):
            call(i)
        runs.append((time.perf_counter() - began) / count)
    return statistics.median(runs)


def show(name: str, took: float, bytes_read: float, flops: float, limits: tuple[float, float]) -> None:
    bandwidth, rate = limits
    print(f"{name:58} {took * 1e6:10.1f} us  {bytes_read / took / 1e9:7.1f} GB/s ({bytes_read / took / bandwidth:4.0%})"
          f"  {flops / took / 1e9:7.1f} GFLOP/s ({flops / took / rate:4.0%})", flush=True)  # fmt: skip


def limits(dtype: torch.dtype) -> tuple[float, float]:
    big = torch.ones(1 << 26)  # 256 MiB
    read = big.nbytes / seconds(lambda _: big.sum(), 0.5)
    rates = []
    # without bf16 instructions torch is slower in bf16 than in float32, which is then the machine's rate for both
    for kind in {dtype, torch.float32}:
        a, b = torch.randn(768, 768).to(kind), torch.randn(768, 768).to(kind)
        rates.append(2 * 768**3 / seconds(lambda _, a=a, b=b: torch.nn.functional.linear(a, b), 0.3))
    return read, max(rates)


def linears(limit: dict[torch.dtype, tuple[float, float]]) -> None:
    for model, (hidden, wide, heads, kv_heads, dim) in MODELS.items():
        shapes = {"qkv": ((heads + 2 * kv_heads) * dim, hidden), "gate_up": (2 * wide, hidden), "down": (hidden, wide)}
        for part, (out, width) in shapes.items():
            for kind in ("float32", "bfloat16", "int8"):
                dtype = torch.bfloat16 if kind == "int8" else getattr(torch, kind)
                weights = [torch.randn(out, width).to(dtype) for _ in range(max(1, (192 << 20) // (4 * out * width)))]
                packed = [linear.pack_int8(w) if kind == "int8" else linear.pack(w) for w in weights]
                for tokens in (1, 4, 8, 32, 1024):
                    name = f"linear {model} {part} {kind} x{tokens}"
                    if WANTED not in name:
                        continue
                    x = torch.randn(tokens, width).to(dtype)
                    cost = (packed[0].nbytes, 2 * tokens * out * width, limit[dtype])
                    show(name, seconds(lambda i: linear.linear(x, packed[i % len(packed)])), *cost)
                    if kind != "int8":
                        took = seconds(lambda i: torch.nn.functional.linear(x, weights[i % len(weights)]))
                        show("  torch F.linear", took, *cost)


def paged(model: str, sizes: list[tuple[int, int]], dtype: torch.dtype) -> tuple[dict, float, float]:
    _, _, heads, kv_heads, dim = MODELS[model]
    per = -(-max(keys for _, keys in sizes) // 16)
    cache = torch.randn(2, per * len(sizes), kv_heads, 16, dim).to(dtype)
    arguments = {
        "q": torch.randn(sum(q for q, _ in sizes), heads, dim).to(dtype),
        "k_cache": cache[0],
        "v_cache": cache[1],
        "block_table": torch.randperm(per * len(sizes)).int().view(len(sizes), per),
        "query_starts": torch.tensor([0, *(q for q, _ in sizes)]).cumsum(0).int(),
        "seq_lens": torch.tensor([keys for _, keys in sizes], dtype=torch.int32),
    }
    read = sum(keys for _, keys in sizes) * kv_heads * dim * 2 * cache.element_size()
    pairs = sum(q * keys - q * (q - 1) / 2 for q, keys in sizes)
    return arguments, read, 4 * pairs * heads * dim


def attentions(limit: dict[torch.dtype, tuple[float, float]]) -> None:
    cases = {
        "1 x 150": [(1, 150)], "1 x 4096": [(1, 4096)], "8 x 150": [(1, 150)] * 8, "32 x 256": [(1, 256)] * 32,
        "128 x 256": [(1, 256)] * 128, "prefill 1024": [(1024, 1024)], "chunk 256 of 2048": [(256, 2048)],
    }  # fmt: skip
    for model in MODELS:
        for dtype in (torch.float32, torch.bfloat16):
            for case, sizes in cases.items():
                name = f"attention {model} {str(dtype)[6:]} {case}"
                if WANTED not in name:
                    continue
                made = [paged(model, sizes, dtype) for _ in range(4)]
                took = seconds(
                    lambda i: attention.paged_attention(**made[i % 4][0], scale=0.125, max_query_len=sizes[0][0])
                )
                show(name, took, *made[0][1:], limit[dtype])


def small(limit: dict[torch.dtype, tuple[float, float]]) -> None:
    hidden, wide, heads, kv_heads, dim = MODELS["SmolLM2-135M"]
    dtype = torch.bfloat16
    table = torch.randn(4096, dim)
    for tokens in (1, 32, 1024):
        x, weight = torch.randn(tokens, hidden).to(dtype), torch.randn(hidden).to(dtype)
        both = torch.randn(tokens, 2 * wide).to(dtype)
        fused = torch.randn(tokens, (heads + 2 * kv_heads) * dim).to(dtype).view(tokens, -1, dim)
        q, k, v = fused.split((heads, kv_heads, kv_heads), 1)
        cache = torch.zeros(2, tokens // 16 + 1, kv_heads, 16, dim, dtype=dtype)
        slots = torch.arange(tokens)

        def turn(rope_write: Callable[..., None], q: Tensor = q, k: Tensor = k, v: Tensor = v, cache: Tensor = cache,
                 slots: Tensor = slots) -> None:  # fmt: skip
            rope_write(q, k, v, slots, table, False, cache[0], cache[1], slots)

        for name, call, moved in (
            ("rms_norm", lambda _: norm.rms_norm(x, weight, 1e-5), 2 * x.nbytes),
            ("  reference", lambda _: norm.rms_norm_reference(x, weight, 1e-5), 2 * x.nbytes),
            ("gated silu", lambda _: activation.gated(both, "silu"), 1.5 * both.nbytes),
            ("  reference", lambda _: activation.gated_reference(both, "silu"), 1.5 * both.nbytes),
            ("rope_write", lambda _: turn(kv_cache.rope_write), 2.4 * fused.nbytes),
            ("  reference", lambda _: turn(kv_cache.rope_write_reference), 2.4 * fused.nbytes),
        ):  # fmt: skip
            if WANTED in name or not WANTED:
                show(f"{name} x{tokens}", seconds(call), moved, 0, limit[dtype])


def main() -> None:
    print(f"threads {torch.get_num_threads()}, kernels: {cpu.lib.isa() if cpu.lib else 'torch references'}")
    limit = {dtype: limits(dtype) for dtype in (torch.float32, torch.bfloat16)}
    for dtype, (read, rate) in limit.items():
        print(f"{str(dtype)[6:]}: read {read / 1e9:.1f} GB/s, torch matrix rate {rate / 1e9:.0f} GFLOP/s")
    with torch.inference_mode():
        small(limit)
        attentions(limit)
        linears(limit)


if __name__ == "__main__":
    main()
