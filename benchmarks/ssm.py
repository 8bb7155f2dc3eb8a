"""Whether a state-space step costs the same however far a sequence is: ``python benchmarks/ssm.py [NAME]``.

Decisions: two engines of one shape with made-up weights (those of mamba-130m and mamba2-130m, eight layers of them, and
a hybrid stack for comparison, whose attention does grow); one decodes near position 100 and one near 10,000. Their
steps take turns, so that what disturbs one disturbs the other, and medians are shown with the ratio of the two. The
scan itself, a layer's share of it, is measured alike.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from growth import Bench

from modelport.batch import Batch
from modelport.kernels import cpu
from modelport.modeling import MambaMixer

NEAR, FAR, STEPS = 100, 10_000, 40
SHAPE = {"hidden_size": 768, "num_hidden_layers": 8, "vocab_size": 50280, "torch_dtype": "float32"}
HYBRID = {"intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 4, "num_experts": 1}
CONFIGS = {
    "mamba": {"architectures": ["MambaForCausalLM"], "state_size": 16, **SHAPE},
    "mamba2": {
        "architectures": ["Mamba2ForCausalLM"], "num_heads": 24, "head_dim": 64, "state_size": 128, "n_groups": 1,
        "hidden_act": "silu", **SHAPE,
    },
    "jamba": {"architectures": ["JambaForCausalLM"], "max_position_embeddings": 2 * FAR, **SHAPE, **HYBRID},
}  # fmt: skip


def medians(*calls: Callable[[], object], rounds: int = STEPS) -> list[float]:
    """Median milliseconds of each call; they take turns, and their order turns too."""
    took: list[list[float]] = [[] for _ in calls]
    for i in range(rounds):
        for which in range(len(calls)) if i % 2 else reversed(range(len(calls))):
            began = time.perf_counter()
            calls[which]()
            took[which].append(time.perf_counter() - began)
    return [statistics.median(found) * 1e3 for found in took]


def scan(rows: int) -> list[float]:
    """One mixer's step for `rows` sequences, at both positions."""
    layer = MambaMixer(768, 1536, 16, 4, 48)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for module in layer.modules():
        if hasattr(module, "pack"):
            module.pack()
    layer.attach(*(torch.zeros(rows, *shape) for shape in layer.cache_spec.shapes))
    x, starts = torch.randn(rows, 768), torch.arange(rows + 1).int()

    def step(position: int) -> Callable[[], object]:
        lens = torch.full((rows,), position + 1).int()
        batch = Batch(torch.full((rows,), position), starts, lens, (), starts[:-1], 1)
        return lambda: layer(x, batch)

    calls = step(NEAR), step(FAR)
    medians(*calls, rounds=4)
    return medians(*calls)


def engine(name: str, batch: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(CONFIGS[name]))
        settings = {"load_format": "dummy", "max_model_len": FAR + 256, "max_num_seqs": batch}
        benches = [Bench(folder, **settings) for _ in (NEAR, FAR)]
    near, far = benches
    with near.running(batch, NEAR, STEPS + 60), far.running(batch, FAR, STEPS + 60):
        calls = near.engine.step, far.engine.step
        medians(*calls, rounds=8)  # steps are recorded by then
        return medians(*calls)


def main() -> None:
    wanted = sys.argv[1:] or ["layer", "mamba", "mamba2"]
    print(f"threads {torch.get_num_threads()}, kernels: {cpu.lib.isa() if cpu.lib else 'torch references'}\n")
    print(f"| what | batch | at {NEAR:,}, ms | at {FAR:,}, ms | ratio |\n|---|---:|---:|---:|---:|")
    with torch.inference_mode():
        for name in wanted:
            for batch in (1, 4):
                near, far = scan(batch) if name == "layer" else engine(name, batch)
                print(f"| {name} | {batch} | {near:.2f} | {far:.2f} | {far / near:.3f} |", flush=True)


if __name__ == "__main__":
    main()
