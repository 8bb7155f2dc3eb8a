"""Compares modelport with other engines in one run: ``python benchmarks/compare.py --python vllm=path/to/python ...``.

Decisions: each engine lives in an interpreter of its own and stays alive; it waits for its turn on stdin, so that only
one computes at a time. Within a round every case goes through all engines in turn, the first one changing from round
to round, and ratios are taken within rounds: what slows the machine for a minute slows all. The machine's own limits
are measured in the same rounds. Engines give token times only; the arithmetic is the same for all of them.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from engine_process import EngineProcess
from plot import markdown
from summary import summarize

from modelport.cli import measure

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "modelport-benchmarks"


@dataclass(frozen=True)
class Case:
    """:ivar size: requests. :ivar rate: of arrivals; 0 for all at once. :ivar engines: None for all."""

    size: int
    input_len: int
    output_len: int
    rate: float = 0.0
    engines: tuple[str, ...] | None = None

    def work(self, vocab: int, seed: object) -> list[measure.Work]:
        if not self.rate:
            return measure.batch(self.size, self.input_len, self.output_len, vocab, seed)
        return measure.trace(self.size, self.rate, vocab, seed, prefix_len=192, longest_input=self.input_len,
                             longest_output=self.output_len)  # fmt: skip


WIDE = ("modelport", "transformers", "transformers-batch", "vllm", "llamacpp-bf16")
# The most telling first: a run that is cut short by --minutes lacks the last ones. Outputs are as long as a rate needs
# that stands still: it is read while the whole batch decodes.
CASES = {
    "decode-1": Case(1, 128, 64),
    "decode-8": Case(8, 128, 48),
    "prefill-1024": Case(2, 1024, 1),
    "decode-32": Case(32, 128, 48, engines=WIDE),
    "trace": Case(48, 128, 64, rate=16.0),
    "long-1024": Case(1, 1024, 32, engines=WIDE),
    "decode-128": Case(128, 128, 192, engines=WIDE),
}
ENGINES: dict[str, tuple[str, str, dict[str, Any]]] = {  # name: interpreter, form of the model, settings
    "modelport": ("modelport", "bf16", {}),
    "modelport-int8": ("modelport", "bf16", {"quantization": "int8"}),
    "modelport-f32": ("modelport", "bf16", {"dtype": "float32"}),
    "transformers": ("transformers", "bf16", {}),
    "transformers-batch": ("transformers", "bf16", {"batching": True}),
    "vllm": ("vllm", "bf16", {}),
    "llamacpp-q4_1": ("llamacpp", "original", {}),
    "llamacpp-q8_0": ("llamacpp", "q8_0.gguf", {}),
    "llamacpp-bf16": ("llamacpp", "bf16.gguf", {}),
}
BY_TORCH = ("transformers", "vllm")
"""Without bf16 instructions torch computes bf16 products some fifty times slower than float32 ones, so there these
engines get float32; `--set transformers:dtype=bfloat16` chooses otherwise."""


def main() -> int:
    args = _arguments()
    from export import export

    forms = export(args.model, args.cache)
    config = json.loads((forms["bf16"] / "config.json").read_text())
    args.logs.mkdir(parents=True, exist_ok=True)
    workers, skipped = _workers(args, forms)
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": _machine(),
        "model": {"name": args.model, **_sizes(config, forms["bf16"])},
        "cases": {name: vars(CASES[name]) for name in args.cases},
        "engines": {},
        "skipped": skipped,
        "starts": {},
        "limits": [],
        "rounds": [],
    }
    for name, why in skipped.items():
        print(f"{name} is left out: {why}", flush=True)
    try:
        _start_all(workers, args, config["vocab_size"], result)
        _run_rounds(workers, args, config["vocab_size"], result)
    finally:
        for worker in workers.values():
            worker.stop()
    for name, worker in workers.items():
        result["engines"][name] = {
            **worker.about,
            "settings": {k: v for k, v in worker.settings.items() if k != "model"},
            "environment": {k: re.sub(r"[^\s:=]*/", "", v) for k, v in worker.environment.items()},  # names, no folders
        }
    result.update(summarize(result))
    for record in result["rounds"]:
        del record["first_tokens"]  # they have served
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{markdown(result)}\nwritten to {args.out}")
    return 0


def _start_all(workers: dict[str, EngineProcess], args: argparse.Namespace, vocab: int, result: dict[str, Any]) -> None:
    """Start every engine, the quick ones several times; one that fails is left out with its reason."""
    for name in list(workers):
        worker, starts = workers[name], []
        while len(starts) < args.starts and not (starts and starts[0]["total_s"] > args.slow_start):
            worker.stop()
            try:
                starts.append(worker.start(measure.batch(1, 16, 1, vocab, (name, len(starts)))))
            except RuntimeError as error:
                result["skipped"][name] = f"does not start: {error}"
                print(f"{name} is left out, it {result['skipped'][name]}; see {worker.log}", flush=True)
                workers.pop(name).stop()
                break
            print(f"{name:20} started in {starts[-1]['first_token_s']:.1f} s", flush=True)
        else:
            result["starts"][name] = starts
            worker.run(measure.batch(2, 64, 8, vocab, (name, "warm-up")))


def _run_rounds(
    workers: dict[str, EngineProcess], args: argparse.Namespace, vocab: int, result: dict[str, Any]
) -> None:
    """All cases on all engines, round by round, until there were enough rounds or the minutes are over."""
    deadline = time.monotonic() + 60 * args.minutes
    unable: set[tuple[str, str]] = set()
    for number in range(-args.warm_up, args.rounds):
        if number >= 0:
            limits = subprocess.run(
                [sys.executable, str(HERE / "limits.py")], check=True, capture_output=True, text=True
            )
            result["limits"].append(json.loads(limits.stdout))
        for case_name in args.cases:
            if time.monotonic() > deadline:  # a case that was begun is finished, so that its ratios are whole
                print(f"{args.minutes:g} minutes are over before {case_name} in round {number + 1}", flush=True)
                return
            case = CASES[case_name]
            work = case.work(vocab, (case_name, number))
            names = [n for n in workers if (case.engines is None or n in case.engines) and (n, case_name) not in unable]
            turn = number % max(len(names), 1)
            for name in names[turn:] + names[:turn]:
                record: dict[str, Any] = {"round": number, "case": case_name, "engine": name}
                try:
                    times, tokens = workers[name].run(work)
                except (NotImplementedError, RuntimeError) as error:
                    unable.add((name, case_name))
                    result["skipped"][f"{name}, {case_name}"] = str(error)
                    print(f"{name} is left out of {case_name}: {error}", flush=True)
                    continue
                record["figures"] = measure.figures(work, times)
                record["first_tokens"] = [ids[0] for ids in tokens]
                if number >= 0:
                    result["rounds"].append(record)
                print(f"round {number + 1}  {case_name:13} {name:20} {_line(record['figures'])}", flush=True)


def _line(figures: measure.Figures) -> str:
    kinds = (("decode_tok_s", "decode"), ("prefill_tok_s", "prefill"), ("output_tok_s", "output"))
    shown = [f"{label} {figures[name]:8.1f} tok/s" for name, label in kinds if figures[name] is not None]
    return "  ".join([*shown, f"{figures['seconds']:6.2f} s"])


def _sizes(config: dict[str, Any], folder: Path) -> dict[str, float]:
    """What one token costs at least: bytes that a single sequence reads, and operations within a 1024-token prompt."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    matrices = {n: s[0] * s[1] for n, s in shapes.items() if len(s) == 2}
    inner = sum(size for name, size in matrices.items() if "embed" not in name and "lm_head" not in name)
    head = config["vocab_size"] * config["hidden_size"]
    width = config["num_attention_heads"] * config["head_dim"]
    attention = 4 * width * (1024 + 1) / 2 * config["num_hidden_layers"]  # scores and values over half the square
    return {"bytes_per_token": 2 * (inner + head), "flop_per_token_at_1024": 2 * inner + attention}


def has_bf16() -> bool:
    """Whether this processor multiplies bf16 by itself; one of another kind than x86 is taken to."""
    instructions = _machine()["instructions"]
    return not instructions or bool({"avx512_bf16", "amx_bf16"} & set(instructions))


def _machine() -> dict[str, Any]:
    cpu, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        text = info.read_text()
        if found := re.search(r"model name\s*: (.+)", text):
            cpu = found[1].strip()
        flags = set(re.search(r"flags\s*: (.*)", text)[1].split()) if "flags" in text else set()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "instructions": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8"}),
        "system": platform.system(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _workers(args: argparse.Namespace, forms: dict[str, Path]) -> tuple[dict[str, EngineProcess], dict[str, str]]:
    pythons = {"modelport": sys.executable, "transformers": sys.executable, **dict(args.python)}
    workers, skipped = {}, {}
    for name in args.engines:
        kind, form, settings = ENGINES[name]
        if kind not in pythons:
            skipped[name] = f"no interpreter for it; give --python {kind}=path/to/python"
        elif form not in forms:
            skipped[name] = f"{args.model} is no GGUF file"
        else:
            own = {key: value for engine, key, value in args.set if engine == name}
            environment = {key: value for engine, key, value in args.env if engine == name}
            best = {"dtype": "bfloat16" if has_bf16() else "float32"} if kind in BY_TORCH else {}
            settings = {"model": str(forms[form]), **best, **settings, **own}
            script, log = HERE / "peers" / f"run_{kind}.py", args.logs / f"{name}.log"
            workers[name] = EngineProcess(name, pythons[kind], script, settings, environment, log)
    return workers, skipped


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="what modelport takes; a GGUF file for llama.cpp's sake")
    parser.add_argument("--python", action="append", type=_pair, default=[], metavar="NAME=PATH",
                        help="interpreter of llamacpp, vllm or transformers")  # fmt: skip
    parser.add_argument("--engines", type=_names(ENGINES), default=[e for e in ENGINES if e != "modelport-f32"],
                        metavar="A,B")  # fmt: skip
    parser.add_argument("--cases", type=_names(CASES), default=list(CASES), metavar="A,B")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before these, which do not count")
    parser.add_argument("--minutes", type=float, default=10, help="begin no case after this long")
    parser.add_argument("--starts", type=int, default=3, help="starts of each engine")
    parser.add_argument("--slow-start", type=float, default=20, help="an engine slower than this starts once")
    parser.add_argument("--set", action="append", type=_setting, default=[], metavar="ENGINE:NAME=VALUE",
                        help="a setting of one engine, value in JSON")  # fmt: skip
    parser.add_argument("--env", action="append", type=_variable, default=[], metavar="ENGINE:NAME=VALUE",
                        help="an environment variable of one engine")  # fmt: skip
    parser.add_argument("--cache", type=Path, default=CACHE / "smollm2", help="folder for the model's other forms")
    parser.add_argument("--logs", type=Path, default=CACHE / "logs", help="folder for what the engines print")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DATE-MACHINE.json")
    args = parser.parse_args()
    if args.warm_up < 0:
        parser.error(f"--warm-up {args.warm_up}: a number of rounds is 0 or more")
    if args.out is None:
        machine = _machine()
        words = re.sub(r"[^a-z0-9]+", "-", machine["cpu"].lower()).strip("-")
        args.out = HERE / "results" / f"{date.today().isoformat()}-{words}-{machine['cores']}-cores.json"
    return args


def _pair(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or name not in {kind for kind, *_ in ENGINES.values()}:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH with a NAME of modelport's or a peer's")
    return name, value


def _variable(text: str) -> tuple[str, str, str]:
    engine, _, rest = text.partition(":")
    name, found, value = rest.partition("=")
    if engine not in ENGINES or not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not ENGINE:NAME=VALUE; engines are {', '.join(ENGINES)}")
    return engine, name, value


def _setting(text: str) -> tuple[str, str, Any]:
    engine, name, value = _variable(text)
    try:
        return engine, name, json.loads(value)
    except ValueError:
        return engine, name, value


def _names(known: dict[str, Any]):
    def names(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return found

    return names


if __name__ == "__main__":
    sys.exit(main())
