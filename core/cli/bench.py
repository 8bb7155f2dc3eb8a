"""`modelport bench`: how fast a model runs here: throughput by batch size, latency, and start-up.

Decisions: greedy, end of text ignored, token-id prompts that no round repeats; cases take turns within a round, and
medians over rounds are shown, so that a machine busy for a moment spoils no single case.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from modelport import __version__
from modelport.cli import measure
from modelport.cli.flags import add_engine_flags, engine_settings
from modelport.cli.table import table

_START = """
import json, sys, time
from modelport import LLM, SamplingParams
stamps = [time.monotonic()]
llm = LLM(**json.loads(sys.argv[1]))
stamps.append(time.monotonic())
llm.generate([[1] * int(sys.argv[2])], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True), use_tqdm=False)
stamps.append(time.monotonic())
from modelport.cli.measure import peak_memory
print(json.dumps([stamps, peak_memory()]))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    throughput = kinds.add_parser("throughput", help="tokens per second at each batch size")
    throughput.add_argument("--batch", type=_sizes, default=[1, 8, 32], metavar="N,N", help="default: 1,8,32")
    _add_number(throughput, "--input-len", 128, "tokens of each prompt")
    _add_number(throughput, "--output-len", 128, "tokens written for each prompt")
    latency = kinds.add_parser("latency", help="time to the first token and between tokens, alone and under load")
    _add_number(latency, "--input-len", 128, "tokens of the single request's prompt")
    _add_number(latency, "--output-len", 128, "tokens written for the single request; most for one of the trace")
    _add_number(latency, "--requests", 32, "requests of the trace; 0 leaves it out")
    latency.add_argument("--rate", type=_rate, default=4.0, metavar="X", help="arrivals per second (default: 4.0)")
    _add_number(latency, "--prefix-len", 192, "tokens of each of the trace's shared beginnings")
    _add_number(latency, "--prefixes", 4, "shared beginnings in the trace")
    startup = kinds.add_parser("startup", help="seconds from a new process to the first token")
    _add_number(startup, "--input-len", 16, "tokens of the prompt")
    for kind in (throughput, latency, startup):
        _add_number(kind, "--rounds", 3, "repetitions; medians are shown")
        kind.add_argument("--json", action="store_true", help="print JSON, with every round")
        add_engine_flags(kind)


def run(args: argparse.Namespace) -> int:
    settings = engine_settings(args)
    kind = {"throughput": _throughput, "latency": _latency, "startup": _startup}[args.kind]
    result, rows = kind(args, settings)
    result = {"benchmark": args.kind, "modelport": __version__, "settings": settings, **result}
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(table(*rows))
        print(_summary(result))
    return 0


def _throughput(args: argparse.Namespace, settings: dict[str, Any]) -> tuple[dict[str, Any], tuple]:
    bench = _Bench({"max_num_seqs": max(max(args.batch), 256), **settings})
    rounds: dict[int, list[measure.Figures]] = {size: [] for size in args.batch}
    for number in range(args.rounds):
        for size in rounds:
            _say(f"round {number + 1} of {args.rounds}, batch {size}")
            seed = ("throughput", number, size)
            prompts = bench.run(measure.batch(size, args.input_len, 1, bench.vocab, (*seed, "prefill")))
            found = bench.run(measure.batch(size, args.input_len, args.output_len, bench.vocab, seed))
            if found["decode_tok_s"] is None and args.output_len > 1 and found["seconds"] > prompts["seconds"]:
                # Short outputs: the batch was never whole, so take the prompts' time off.
                found["decode_tok_s"] = size * (args.output_len - 1) / (found["seconds"] - prompts["seconds"])
            rounds[size].append({**found, "prefill_tok_s": prompts["prefill_tok_s"]})
    shown = {size: measure.medians(found) for size, found in rounds.items()}
    titles = ("BATCH", "PREFILL tok/s", "DECODE tok/s", "ALL tok/s", "FIRST TOKEN", "BETWEEN TOKENS p50", "p99")
    rows = [
        (
            str(size),
            *(_rate_text(found[name]) for name in ("prefill_tok_s", "decode_tok_s", "total_tok_s")),
            *(_time_text(found[f"{name}_s"]) for name in ("first_token_p50", "inter_token_p50", "inter_token_p99")),
        )
        for size, found in shown.items()
    ]
    about = {"input_len": args.input_len, "output_len": args.output_len}
    cases = [{"batch": size, "median": shown[size], "rounds": rounds[size]} for size in rounds]
    return {**about, **bench.about(), "cases": cases}, (titles, rows)


def _latency(args: argparse.Namespace, settings: dict[str, Any]) -> tuple[dict[str, Any], tuple]:
    bench = _Bench(settings)
    rounds: dict[str, list[measure.Figures]] = {"one request": []}
    if args.requests:
        rounds[f"trace, {args.rate:g}/s"] = []
    for number in range(args.rounds):
        for name, found in rounds.items():
            _say(f"round {number + 1} of {args.rounds}, {name}")
            if name == "one request":
                work = measure.batch(1, args.input_len, args.output_len, bench.vocab, ("latency", number))
            else:
                work = measure.trace(
                    args.requests, args.rate, bench.vocab, ("trace", number), prefixes=args.prefixes,
                    prefix_len=args.prefix_len, longest_input=args.input_len, longest_output=args.output_len,
                )  # fmt: skip
            found.append(bench.run(work))
    shown = {name: measure.medians(found) for name, found in rounds.items()}
    titles = ("CASE", "FIRST TOKEN p50", "p99", "BETWEEN TOKENS p50", "p99", "OUTPUT tok/s", "PROMPT FROM CACHE")
    rows = [
        (
            name,
            *(_time_text(m[f"{part}_{p}_s"]) for part in ("first_token", "inter_token") for p in ("p50", "p99")),
            _rate_text(m["output_tok_s"]),
            f"{m['cached_share']:.0%}",
        )
        for name, m in shown.items()
    ]
    cases = [{"case": name, "median": shown[name], "rounds": rounds[name]} for name in rounds]
    return {**bench.about(), "cases": cases}, (titles, rows)


def _startup(args: argparse.Namespace, settings: dict[str, Any]) -> tuple[dict[str, Any], tuple]:
    rounds = []
    for number in range(args.rounds):
        _say(f"start {number + 1} of {args.rounds}")
        started = time.monotonic()
        command = [sys.executable, "-c", _START, json.dumps(settings), str(args.input_len)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"the model does not start: {reason}")
        stamps, peak = json.loads(done.stdout.splitlines()[-1])
        imported, loaded, first = (stamp - started for stamp in stamps)
        parts = {"import_s": imported, "load_s": loaded - imported, "first_token_s": first - loaded}
        rounds.append({**parts, "total_s": first, "peak_memory_bytes": peak})
    shown = measure.medians(rounds)
    names = ("import_s", "load_s", "first_token_s", "total_s")
    rows = [(str(n), *(_time_text(found[name]) for name in names)) for n, found in enumerate(rounds, 1)]
    rows.append(("median", *(_time_text(shown[name]) for name in names)))
    about = {"input_len": args.input_len, "peak_memory_bytes": shown["peak_memory_bytes"]}
    return {**about, "median": shown, "rounds": rounds}, (("RUN", "IMPORT", "LOAD", "FIRST TOKEN", "TOTAL"), rows)


class _Bench:
    """An engine without a tokenizer, warm: the first steps allocate and decide things that later ones do not."""

    def __init__(self, settings: dict[str, Any]):
        from modelport.frontend import Frontend, engine_config

        started = time.perf_counter()
        model = settings.pop("model")
        self.front = Frontend(engine_config(model, {"skip_tokenizer_init": True, **settings}))
        settings["model"] = model
        self.load_s = time.perf_counter() - started
        self.vocab = self.front.config.vocab_size
        short = min(32, self.front.engine.max_model_len // 2)
        self.run(measure.batch(2, short, min(4, short), self.vocab, "warm-up"))

    def run(self, work: Sequence[measure.Work]) -> measure.Figures:
        times, _, cached = measure.drive(self.front, work)
        return {**measure.figures(work, times), "cached_share": cached / sum(len(one.prompt) for one in work)}

    def about(self) -> dict[str, Any]:
        import torch

        return {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "load_s": self.load_s,
            "weight_bytes": measure.weight_bytes(self.front),
            "cache_bytes": measure.cache_bytes(self.front),
            "peak_memory_bytes": measure.peak_memory(),
        }


def _summary(result: dict[str, Any]) -> str:
    """The line under the table."""
    parts = []
    if "load_s" in result:
        parts.append(f"loaded in {result['load_s']:.2f} s")
    if result["peak_memory_bytes"] is not None:
        parts.append(f"peak memory {result['peak_memory_bytes'] / 1e6:.0f} MB")
    if "cache_bytes" in result:
        weights, cache = (result[name] / 1e6 for name in ("weight_bytes", "cache_bytes"))
        parts.append(f"weights {weights:.0f} MB, cache of up to {cache:.0f} MB; {result['threads']} threads")
    return "; ".join(parts)


def _add_number(parser: argparse.ArgumentParser, flag: str, default: int, text: str) -> None:
    least = 0 if flag == "--requests" else 1
    kind = _at_least_one if least else int
    parser.add_argument(flag, type=kind, default=default, metavar="N", help=f"{text} (default: {default})")


def _at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _sizes(text: str) -> list[int]:
    return [_at_least_one(part) for part in text.split(",")]


def _rate(text: str) -> float:
    if not (number := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _rate_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _time_text(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\r", file=sys.stderr, flush=True)
