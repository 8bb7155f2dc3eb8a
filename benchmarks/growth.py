"""How the cost of a step grows with batch, context, queue and plugins: ``python benchmarks/growth.py MODEL [PART]``.

Decisions: one table in Markdown per part (`batch`, `context`, `queue`, `plugins`). *Outside the model* is what a step
takes apart from the forward pass: planning, the batch's tensors, sampling and what follows from the tokens. What is
compared takes turns within one run, and medians are shown.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelport.cli import measure
from modelport.engine import runner
from modelport.frontend import Frontend, engine_config
from modelport.plugin import load_plugins
from modelport.request import Request
from modelport.sampling_params import SamplingParams

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
SAMPLED = {"top_k=50, top_p=0.9": {"temperature": 1.0, "top_k": 50, "top_p": 0.9}, "logprobs=1": {"logprobs": 1}}
CONTEXTS = (128, 512, 1024, 2048, 4096)
QUEUES = (100, 1_000, 10_000)
PLUGINS = (0, 10, 100)
PLUGIN = """
from modelport import Architecture, hookimpl
from modelport.plugins.text.llama import Llama, LlamaConfig

modelport_api = 1


@hookimpl
def register_architectures():
    return [Architecture("Grown{number}ForCausalLM", Llama, LlamaConfig)]
"""


class Bench:
    """An engine whose steps are timed, in all and inside the model."""

    def __init__(self, model: str, **settings: Any):
        self.front = Frontend(engine_config(model, {"skip_tokenizer_init": True, **settings}))
        self.engine = self.front.engine
        self._inside = 0.0
        mine = self.engine.runner
        runner.forward = self._timed(runner.forward)
        mine._logits = self._timed(mine._logits)
        if mine.recorder is not None:
            mine.recorder.run = self._timed(mine.recorder.run)

    def add(self, count: int, length: int, output: int, seed: object, **params: Any) -> list[Request]:
        wanted = SamplingParams(**{"temperature": 0.0, "max_tokens": output, "ignore_eos": True, **params})
        made = []
        for work in measure.batch(count, length, output, self.front.config.vocab_size, seed):
            made.extend(self.front.job(work.prompt, wanted).requests)
            self.engine.add(made[-1])
        return made

    @contextmanager
    def running(self, count: int, length: int, output: int, **params: Any) -> Iterator[None]:
        """Requests that decode together; they are ended afterwards."""
        requests = self.add(count, length, output, (count, length, str(params)), **params)
        while any(request.num_output_tokens < 4 for request in requests):
            self.engine.step()
        yield
        for request in requests:
            self.engine.abort(request)

    def step(self) -> tuple[float, float]:
        """Seconds of one step: all of it, and outside the model."""
        self._inside, began = 0.0, time.perf_counter()
        self.engine.step()
        took = time.perf_counter() - began
        return took, took - self._inside

    def steps(self, count: int) -> tuple[float, float]:
        """Medians, in milliseconds."""
        found = [self.step() for _ in range(count)]
        return statistics.median(f[0] for f in found) * 1e3, statistics.median(f[1] for f in found) * 1e3

    def _timed(self, function: Callable) -> Callable:
        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args)
            finally:
                self._inside += time.perf_counter() - began

        return timed


def batch(model: str) -> None:
    bench = Bench(model, max_model_len=512)
    print("| batch | step, ms | per token, ms | outside the model, ms | share |\n|---:|---:|---:|---:|---:|")
    for size in BATCHES:
        with bench.running(size, 32, 200):
            took, outside = bench.steps(max(8, 48 // size))
        print(f"| {size} | {took:.1f} | {took / size:.2f} | {outside:.2f} | {outside / took:.1%} |", flush=True)
    for name, params in SAMPLED.items():
        with bench.running(BATCHES[-1], 32, 200, **params):
            took, outside = bench.steps(8)
        print(
            f"| {BATCHES[-1]}, {name} | {took:.1f} | {took / BATCHES[-1]:.2f} | {outside:.2f} | {outside / took:.1%} |"
        )


def context(model: str) -> None:
    bench = Bench(model, max_model_len=CONTEXTS[-1] + 64)
    print("| tokens before | step, ms | outside the model, ms |\n|---:|---:|---:|")
    for length in CONTEXTS:
        with bench.running(1, length, 60):
            took, outside = bench.steps(24)
        print(f"| {length:,} | {took:.1f} | {outside:.2f} |", flush=True)


def queue(model: str) -> None:
    bench = Bench(model, max_model_len=256, max_num_seqs=8)
    print("| waiting requests | step, ms | outside the model, ms |\n|---:|---:|---:|")
    waiting = []
    with bench.running(8, 16, 230):
        for length in QUEUES:
            waiting += bench.add(length - len(waiting), 16, 8, ("queue", length))
            took, outside = bench.steps(24)
            print(f"| {length:,} | {took:.1f} | {outside:.3f} |", flush=True)
    for request in waiting:
        bench.engine.abort(request)


def plugins(model: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        for number in range(PLUGINS[-1]):
            (Path(folder) / f"grown_{number}.py").write_text(PLUGIN.format(number=number))
        names = [f"grown_{number}" for number in range(PLUGINS[-1])]
        load_plugins()  # the built-in ones are imported once
        benches, loaded = {}, {}
        for count in PLUGINS:
            began = time.perf_counter()
            load_plugins(extra=names[:count])
            loaded[count] = time.perf_counter() - began
            benches[count] = Bench(model, max_model_len=512, plugins=tuple(names[:count]))
        found: dict[int, list[float]] = {count: [] for count in PLUGINS}
        for _ in range(3):
            for count, bench in benches.items():
                with bench.running(1, 32, 60):
                    found[count].append(bench.steps(16)[0])
        print("| plugins besides the built-in ones | to load them, ms | step, ms |\n|---:|---:|---:|")
        for count in PLUGINS:
            print(f"| {count} | {loaded[count] * 1e3:.0f} | {statistics.median(found[count]):.1f} |")


PARTS = {"batch": batch, "context": context, "queue": queue, "plugins": plugins}

if __name__ == "__main__":
    model, *wanted = sys.argv[1:] or sys.exit(__doc__)
    for part in wanted or PARTS:
        print(f"\n{part}\n")
        PARTS[part](model)
