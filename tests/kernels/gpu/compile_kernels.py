"""Compiles the kernels for an H100 (sm_90) without having one, down to machine code; a program of its own.

`Compiler` takes the GPU driver's place: a launch compiles for the arguments that it gets, and runs nothing. What the
assembler says of each kernel is printed, one JSON object a line. Shapes are those of real models, tensors are empty;
arguments name the types of the data, bfloat16 when there are none.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from modelport.kernels import gpu

TARGET = GPUTarget("cuda", 90, 32)


class Compiler:
    """Prints every kernel that is launched after `install`, once."""

    def __init__(self) -> None:
        self.label, self.seen = "", set()

    def install(self) -> None:
        driver.set_active(self)
        run = JITFunction.run

        def compile_only(function, *args, grid, warmup, **kwargs):
            kernel = run(function, *args, grid=grid, warmup=True, **kwargs)
            if kernel.hash not in self.seen:
                self.seen.add(kernel.hash)
                print(json.dumps({"for": self.label, "kernel": kernel.metadata.name, **usage(kernel)}), flush=True)

        JITFunction.run = compile_only

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def usage(kernel) -> dict[str, int]:
    """Registers of a thread, bytes it spills, and bytes of shared memory of a block; and tensor-core instructions."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout + told.stderr)}
    return {
        "registers": found["REG"],
        "spilled": found["STACK"] + found["LOCAL"],
        "shared": kernel.metadata.shared,
        "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
        "mma": kernel.asm["ptx"].count("mma.sync"),
    }


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def pointwise(dtype: torch.dtype) -> None:
    x, w = empty(64, 4096, dtype=dtype), empty(4096, dtype=dtype)
    heads = empty(64, 8, 128, dtype=dtype)
    gpu.norm.rms_norm(x, w, 1e-5, 0.0)
    gpu.norm.rms_norm(heads, w[:128], 1e-5, 1.0)
    gpu.norm.layer_norm(x, w, w, 1e-5)
    for code in range(6):
        gpu.activation.gated(x, code)
    gpu.activation.activate(x, 1)
    cache, slots = empty(8, 8, 16, 128, dtype=dtype), ints(64, dtype=torch.int64)
    q = empty(64, 32, 128, dtype=dtype)
    for interleaved in (False, True):
        gpu.rope.rope_write(q, heads, heads, slots, empty(9, 128), interleaved, cache, cache, slots)
    gpu.rope.rope_write(q, heads, heads, slots, empty(9, 64), False, cache, cache, slots)
    gpu.rope.rope_write(None, heads, heads, None, None, False, cache, cache, slots)
    gpu.rope.rotate_(q, slots, empty(9, 128), False)
    small = cache.to(torch.float8_e4m3fn)
    gpu.rope.rope_write(q, heads, heads, slots, empty(9, 128), False, small, small, slots)


def attention(dtype: torch.dtype) -> None:
    # heads, kv_heads, dim, v_dim: Llama 8B, Gemma 2, Phi, gpt-oss, Bloom's and DeepSeek's shapes
    for heads, kv, dim, v_dim in (
        (32, 8, 128, 128),
        (16, 8, 256, 256),
        (32, 32, 80, 80),
        (64, 8, 64, 64),
        (16, 1, 576, 512),
    ):
        for seqs, ql in ((1, 1), (64, 1), (2, 512)):
            k_cache = empty(8, kv, 16, dim, dtype=dtype)
            v_cache = k_cache[..., :v_dim] if dim == 576 else empty(8, kv, 16, v_dim, dtype=dtype)
            given = (
                empty(seqs * ql, heads, dim, dtype=dtype), k_cache, v_cache, ints(seqs, 64), ints(seqs + 1), ints(seqs),
                0.1,
            )  # fmt: skip
            gpu.attention.paged_attention(*given, 0, 0.0, None, None, None, ql)
            if dim == 64:
                extras = (empty(heads), empty(heads), ints(seqs * ql))
                gpu.attention.paged_attention(*given, 128, 30.0, *extras, ql)
            if dim == 128:
                small = [cache.to(torch.float8_e4m3fn) for cache in (k_cache, v_cache)]
                gpu.attention.paged_attention(given[0], *small, *given[3:], 0, 0.0, None, None, None, ql)


def products(dtype: torch.dtype) -> None:
    for kind in (torch.int8, torch.float8_e4m3fn, dtype):
        scaled = kind != dtype
        for rows in (1, 40, 500):
            x, added = empty(rows, 1024, dtype=dtype), empty(rows, 512, dtype=dtype)
            scales = empty(512) if scaled else None
            gpu.linear.linear(x, empty(512, 1024).to(kind), scales, added[0], added)
        gate_up, down = empty(8, 2, 256, 512).to(kind), empty(8, 1, 512, 256).to(kind)
        for rows in (1, 100, 2000):
            x, ids, shares = empty(rows, 512, dtype=dtype), ints(rows, 2, dtype=torch.int64), empty(rows, 2)
            scales = (empty(8, 2, 256), empty(8, 1, 512)) if scaled else (None, None)
            weights = (gate_up, scales[0], None), (down, scales[1], None)
            gpu.moe.experts(x, ids, shares, *weights, 6 if scaled else 0, 7.0, 1.7, x)
    for rows in (8, 2000):
        x, matrices = empty(rows, 4096, dtype=dtype), empty(4, 16, 4096, dtype=dtype)
        gpu.lora.lora(x, ints(rows), matrices, matrices, x)


def scans(dtype: torch.dtype) -> None:
    for tokens, seqs in ((4, 4), (600, 2)):
        at = (ints(tokens, dtype=torch.int64), ints(seqs + 1), ints(seqs))
        x = empty(tokens, 5120, dtype=dtype)
        gpu.ssm.causal_conv(x, empty(4, 5120), empty(5120), empty(8, 3, 5120, dtype=dtype), *at, True)
        b = empty(tokens, 16, dtype=dtype)
        gpu.ssm.selective_scan(
            x, x, empty(16, 5120), b, b, empty(5120), x, empty(5120), empty(8, 16, 5120), *at
        )  # fmt: skip
        b = empty(tokens, 1, 128, dtype=dtype)
        gpu.ssm.head_scan(
            x.view(tokens, 80, 64), x[:, :80], empty(80), b, b, empty(80), empty(80), (0.0, float("inf")),
            empty(8, 80, 128, 64), *at,
        )  # fmt: skip
        gpu.ssm.gated_norm(x, x, x[0], 1e-5, 5120)
    numbers = empty(64)
    gpu.draw.draw(
        empty(64, 128256, dtype=dtype), numbers, numbers, ints(64, dtype=torch.int64), numbers.double(), numbers,
        numbers.double(),
    )  # fmt: skip


if __name__ == "__main__":
    compiler = Compiler()
    compiler.install()
    parts: list[Callable[[torch.dtype], None]] = [pointwise, attention, products, scans]
    for part in parts:
        for dtype in (getattr(torch, name) for name in sys.argv[1:] or ["bfloat16"]):
            compiler.label = f"{part.__name__} {dtype}".replace("torch.", "")
            part(dtype)
