"""What adapters cost: ``python benchmarks/lora.py``, on the demo model, everything in one run and in turn.

Three engines decode the same batch: one that takes no adapters, one that takes them and gets none, and one whose 32
requests use 16 adapters of rank 16 on every linear layer. Then the time to read an adapter, and what a running step
waits for one that is new. Ratios are of medians over steps that followed each other.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from modelport import LLM, EngineConfig, LoRARequest, SamplingParams
from modelport.loading.checkpoint import read_config, resolve
from modelport.loading.loader import targets
from modelport.loading.model import build_empty, describe
from modelport.modeling.linear import Linear
from modelport.plugin import Plugins
from modelport.testing.adapters import Factors, write_adapter


def make_adapters(folder: Path, model: str, plugins: Plugins, count: int, rank: int) -> list[LoRARequest]:
    """Random ones of every linear layer."""
    settings = EngineConfig(model=model)
    checkpoint = resolve(model, None, plugins)
    about = describe(checkpoint, read_config(checkpoint, plugins), plugins, settings)
    shapes = {
        name.removesuffix(".weight"): target.shape
        for name, target in targets(build_empty(about, plugins, settings)).items()
        if isinstance(target.module, Linear) and not (target.part is None and target.module.parts)
    }
    made = []
    for number in range(1, count + 1):
        factors = {
            name: Factors(torch.randn(rank, size) / size**0.5, torch.randn(out, rank) * 0.02, 1.0)
            for name, (out, size) in shapes.items()
        }
        path = write_adapter(folder / str(number), factors)
        made.append(LoRARequest(f"a{number}", number, str(path)))
    return made


class Batch:
    """An engine with `size` requests that decode."""

    def __init__(self, llm: LLM, size: int, adapters: list[LoRARequest], steps: int):
        self.engine = llm._front.engine
        params = SamplingParams(temperature=0, max_tokens=steps + 8, ignore_eos=True)
        self.jobs = [
            llm._front.job(
                {"prompt_token_ids": [5 + (7 * i + j) % 1000 for j in range(128)]}, params, None,
                adapters[i % len(adapters)] if adapters else None,
            )
            for i in range(size)
        ]  # fmt: skip
        for job in self.jobs:
            self.engine.add(job.requests[0])
        while any(not job.requests[0].num_output_tokens for job in self.jobs):
            self.engine.step()
        for _ in range(3):  # a step is recorded when it comes again
            self.engine.step()

    def step(self) -> float:
        started = time.perf_counter()
        self.engine.step()
        return time.perf_counter() - started

    def close(self) -> None:
        for job in self.jobs:
            self.engine.abort(job.requests[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    args = parser.parse_args()
    settings = {"dtype": "bfloat16", "max_model_len": 512, "max_num_seqs": 64}
    plain = LLM(args.model, **settings)
    idle = LLM(args.model, enable_lora=True, max_loras=16, **settings)
    busy = LLM(args.model, enable_lora=True, max_loras=16, **settings)
    with tempfile.TemporaryDirectory() as folder:
        adapters = make_adapters(Path(folder), args.model, busy._front.plugins, 18, 16)
        reading = []
        for adapter in adapters[:16]:
            started = time.perf_counter()
            busy.add_lora(adapter)
            reading.append(time.perf_counter() - started)
        print(f"reading an adapter: median {statistics.median(reading) * 1e3:.0f} ms, most {max(reading) * 1e3:.0f} ms")
        for size in (1, 8, 32):
            times: dict[str, list[float]] = {"plain": [], "enabled": [], "adapted": []}
            for _ in range(args.rounds):
                batches = {
                    "plain": Batch(plain, size, [], args.steps),
                    "enabled": Batch(idle, size, [], args.steps),
                    "adapted": Batch(busy, size, adapters[:16], args.steps),
                }
                for _ in range(args.steps):
                    for name, batch in batches.items():
                        times[name].append(batch.step())
                for batch in batches.values():
                    batch.close()
            plainly, enabled, adapted = (statistics.median(times[name]) for name in ("plain", "enabled", "adapted"))
            print(
                f"batch {size}: step {plainly * 1e3:.1f} ms; of its speed enabled {plainly / enabled:.3f}x, "
                f"with adapters {plainly / adapted:.3f}x"
            )
        batch = Batch(busy, 8, adapters[:8], 40)
        usual = statistics.median(batch.step() for _ in range(12))
        job = busy._front.job(
            {"prompt_token_ids": [5]}, SamplingParams(temperature=0, max_tokens=4), None, adapters[16]
        )
        busy._front.engine.add(job.requests[0])
        first, second = batch.step(), batch.step()
        print(f"a step of 8: {usual * 1e3:.1f} ms; with a new one {first * 1e3:.1f} ms, the next {second * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
