"""Every kernel against the card's limits: ``python benchmarks/gpu_kernels.py [--only NAME]``; one JSON line each.

`bytes` are those that have to be read and written once, `flop` those that have to be done; `share` is the time that
the larger of the two takes at the card's limit, over the time that was measured.
"""

import argparse
import json
from collections.abc import Callable, Iterator

import torch
from gpu_clock import limits, seconds
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from modelport.kernels import activation, attention, cpu, draw, gpu, kv_cache, linear, moe, norm, ssm

Case = tuple[str, Callable[[int], object], float, float]  # name, call, bytes, flop


class Shapes:
    """Makes the data; `tiny` divides every size."""

    def __init__(self, device: str, tiny: bool):
        self.device, self.tiny = device, tiny
        self.copies = 2 if tiny else 8  # rotated, so that the second-level cache keeps none

    def size(self, n: int, least: int = 4) -> int:
        return max(least, n // 64) if self.tiny else n

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype)

    def several(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        return [self.randn(*shape, dtype=dtype) for _ in range(self.copies)]


def pointwise(s: Shapes) -> Iterator[Case]:
    hidden, width = s.size(4096), s.size(14336)
    for rows in (64, s.size(4096)):
        xs, w = s.several(rows, hidden), s.randn(hidden)
        nbytes = 2 * xs[0].nbytes
        yield f"rms_norm {rows}", lambda i, xs=xs, w=w: norm.rms_norm(xs[i % len(xs)], w, 1e-5), nbytes, 0.0
        xs = s.several(rows, 2 * width)
        yield f"gated {rows}", lambda i, xs=xs: activation.gated(xs[i % len(xs)], "silu"), 1.5 * xs[0].nbytes, 0.0
        q, k, v = s.randn(rows, 32, 128), s.randn(rows, 8, 128), s.randn(rows, 8, 128)
        caches = [s.randn(rows // 16 + 1, 8, 16, 128) for _ in range(2)]
        at = torch.arange(rows, device=s.device)
        angles = s.randn(rows, 128, dtype=torch.float32)
        nbytes = 2 * q.nbytes + 3 * k.nbytes + 2 * v.nbytes
        yield f"rope_write {rows}", lambda i, q=q, k=k, v=v, at=at, angles=angles, caches=caches: kv_cache.rope_write(
            q, k, v, at, angles, False, *caches, at
        ), nbytes, 0.0  # fmt: skip


def attentions(s: Shapes) -> Iterator[Case]:
    cases = {  # seqs, rows of each, keys of each, heads, kv_heads, dim, v_dim
        "decode 1 of 8k": (1, 1, s.size(8192, 32), 32, 8, 128, 128),
        "decode 64 of 1k": (64, 1, s.size(1024, 32), 32, 8, 128, 128),
        "decode 64 of 1k, float8 cache": (64, 1, s.size(1024, 32), 32, 8, 128, 128),
        "prefill 4k": (1, s.size(4096, 32), s.size(4096, 32), 32, 8, 128, 128),
        "latent decode 64 of 1k": (64, 1, s.size(1024, 32), 16, 1, 576, 512),
    }
    for name, (seqs, rows, keys, heads, kv_heads, dim, v_dim) in cases.items():
        blocks = seqs * keys // 16
        k_cache = s.randn(blocks, kv_heads, 16, dim)
        v_cache = k_cache[..., :v_dim] if dim != v_dim else s.randn(blocks, kv_heads, 16, v_dim)
        if "float8" in name and s.device == "cuda":
            k_cache, v_cache = k_cache.to(torch.float8_e4m3fn), v_cache.to(torch.float8_e4m3fn)
        qs = s.several(seqs * rows, heads, dim)
        table = torch.randperm(blocks, device=s.device).int().view(seqs, -1)
        starts = (torch.arange(seqs + 1, device=s.device) * rows).int()
        lens = torch.full((seqs,), keys, dtype=torch.int32, device=s.device)
        nbytes = k_cache.nbytes + (0 if dim != v_dim else v_cache.nbytes) + 2 * qs[0].nbytes
        flop = 2.0 * seqs * rows * keys * heads * (dim + v_dim) / (2 if rows > 1 else 1)
        given = (k_cache, v_cache, table, starts, lens, dim**-0.5)
        yield f"attention {name}", lambda i, qs=qs, given=given, rows=rows: attention.paged_attention(
            qs[i % len(qs)], *given, max_query_len=rows
        ), nbytes, flop  # fmt: skip
        if dim == v_dim and "float8" not in name:  # torch's own, which has no pages
            k, v = s.randn(seqs, kv_heads, keys, dim), s.randn(seqs, kv_heads, keys, dim)
            dense = [q.view(seqs, rows, heads, dim).transpose(1, 2) for q in qs]
            yield f"attention {name} by torch", lambda i, qs=dense, k=k, v=v, rows=rows: scaled_dot_product_attention(
                qs[i % len(qs)], k, v, is_causal=rows > 1, enable_gqa=True
            ), nbytes, flop  # fmt: skip


def products(s: Shapes) -> Iterator[Case]:
    hidden, width = s.size(4096), s.size(14336)
    for outer, inner in ((2 * width, hidden), (hidden, width)):
        weights = s.several(outer, inner)
        kinds: dict[str, list[linear.PackedWeight]] = {
            "bf16": [linear.pack(w) for w in weights], "int8": [linear.pack_int8(w) for w in weights]
        }  # fmt: skip
        for rows in (1, 16, 64, s.size(4096)):
            x = s.randn(rows, inner)
            flop = 2.0 * rows * outer * inner
            for kind, packed in kinds.items():
                nbytes = packed[0].nbytes + 2 * rows * (inner + outer)
                name = f"linear {kind} {rows} x {outer} x {inner}"
                yield name, lambda i, x=x, p=packed: linear.linear(x, p[i % len(p)]), nbytes, flop
            if gpu.takes(x):  # what cuBLAS is chosen over
                nbytes = weights[0].nbytes + 2 * rows * (inner + outer)
                yield f"linear bf16 by Triton {rows} x {outer} x {inner}", lambda i, x=x, w=weights: gpu.linear.linear(
                    x, w[i % len(w)], None
                ), nbytes, flop  # fmt: skip
    if s.device == "cuda":
        x, rows = s.randn(64, hidden), torch.arange(64, device=s.device, dtype=torch.int32) % 4
        a, b = s.randn(4, 16, hidden), s.randn(4, 16, hidden)
        nbytes = a.nbytes + b.nbytes + 2 * x.nbytes
        yield "lora 64 rows, 4 adapters", lambda i: gpu.lora.lora(x, rows, a, b, x), nbytes, 4.0 * 64 * 16 * hidden


def experts(s: Shapes) -> Iterator[Case]:
    for name, (hidden, width, count, chosen) in {
        "Mixtral": (4096, 14336, 8, 2), "Qwen2-MoE": (2048, 1408, 60, 4)
    }.items():  # fmt: skip
        hidden, width, count = s.size(hidden), s.size(width), s.size(count, 4 if s.tiny else count)
        gate_up = moe.pack(s.randn(count, 2, width, hidden))
        down = moe.pack(s.randn(count, 1, hidden, width))
        for rows in (1, 16, s.size(4096)):
            x, shares = s.randn(rows, hidden), torch.rand(rows, chosen, device=s.device)
            ids = torch.rand(rows, count, device=s.device).topk(chosen).indices
            used = len(ids.unique())
            nbytes = (gate_up.nbytes + down.nbytes) * used / count + 4 * rows * hidden
            flop = 6.0 * rows * chosen * hidden * width
            yield f"experts {name} {rows}", lambda i, x=x, ids=ids, shares=shares, g=gate_up, d=down: moe.experts(
                x, ids, shares, g, d, "silu"
            ), nbytes, flop  # fmt: skip


def scans(s: Shapes) -> Iterator[Case]:
    inner, states = s.size(5120), 16
    for seqs, rows in ((1, 1), (64, 1), (1, s.size(1024))):
        tokens = seqs * rows
        at = ssm.Sequences(
            torch.arange(1, rows + 1, device=s.device).repeat(seqs),
            (torch.arange(seqs + 1, device=s.device) * rows).int(), torch.arange(seqs, device=s.device).int(),
        )  # fmt: skip
        x, dt, gate = (s.randn(tokens, inner) for _ in range(3))
        b, c = s.randn(tokens, states), s.randn(tokens, states)
        rates = -torch.rand(states, inner, device=s.device)
        skip, bias = torch.randn(inner, device=s.device), torch.randn(inner, device=s.device)
        state = s.randn(seqs, states, inner, dtype=torch.float32)
        given = (x, dt, rates, b, c, skip, gate, bias, state, at)
        nbytes = 2 * state.nbytes + 4 * x.nbytes + rates.nbytes
        yield f"selective_scan {seqs} x {rows}", lambda i, given=given: ssm.selective_scan(*given), nbytes, 0.0
        weight, kept = torch.randn(4, inner, device=s.device), s.randn(seqs, 3, inner)
        yield f"causal_conv {seqs} x {rows}", lambda i, x=x, weight=weight, kept=kept, at=at: ssm.causal_conv(
            x, weight, None, kept, at
        ), 2 * x.nbytes + 2 * kept.nbytes, 0.0  # fmt: skip


def draws(s: Shapes) -> Iterator[Case]:
    vocab = s.size(128256)
    for rows in (1, 64):
        x, numbers = s.randn(rows, vocab), torch.rand(rows, device=s.device)
        ones = torch.ones(rows, device=s.device)
        for name, k, p in (("plain", 0, 1.0), ("top_k", 50, 1.0), ("top_p", 0, 0.9)):
            given = (
                x, x.amax(-1).float(), ones, torch.full((rows,), k, device=s.device), ones.double() * p, ones * 0,
                numbers.double(),
            )  # fmt: skip
            yield f"draw {name} {rows}", lambda i, given=given: draw.draw(*given), x.nbytes, 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default="", help="part of a kernel's name, or 'limits'")
    args = parser.parse_args()
    if args.device == "cpu":
        cpu.lib = None  # weights as they lie on a GPU
    torch.manual_seed(0)
    card = limits(args.device, args.tiny)
    print(json.dumps({"name": "limits", **card}), flush=True)
    if args.only == "limits":
        return
    with torch.inference_mode():
        for part in (pointwise, attentions, products, experts, scans, draws):
            for name, call, nbytes, flop in part(Shapes(args.device, args.tiny)):
                if args.only not in name:
                    continue
                took = seconds(call, args.device)
                floor = max(nbytes / card["read_bytes_s"], flop / card["bf16_flop_s"])
                line = {"name": name, "us": took * 1e6, "bytes": nbytes, "flop": flop, "share": floor / took}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
