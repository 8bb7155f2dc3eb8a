"""Everything that a GPU is wanted for, in one command of under ten minutes: ``make gpu``.

Tests of the kernels, the conformance kit for families of different kinds, the card's own limits, every kernel against
them, whole models of real shapes with random weights, and transformers beside them. Every part is a process with a
time limit, and what it found is written down at once, so that a part that fails or takes too long spoils no other.

``--device cpu --tiny`` runs the same code over toy shapes with the torch references, to see that it runs.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
SIDE_BY_SIDE = 6  # of the parts that measure nothing; most of their time compiles kernels
FAMILIES = (
    "LlamaForCausalLM", "Gemma2ForCausalLM", "GptOssForCausalLM", "BloomForCausalLM", "MixtralForCausalLM",
    "DeepseekV2ForCausalLM", "MambaForCausalLM", "Mamba2ForCausalLM", "JambaForCausalLM",
    "BartForConditionalGeneration",
)  # fmt: skip


BARS = (  # part, beginning of a figure's name, entry, the least that is wanted
    ("llama-8b", "decode 1", "share", 0.85),
    ("llama-8b", "decode 64", "share", 0.75),
    ("llama-8b", "prefill", "share", 0.60),
    ("mixtral", "decode 16", "share", 0.60),
    ("qwen2-moe", "decode 16", "share", 0.60),
    ("mamba-2.8b", "decode 1", "share", 0.70),
    ("mamba-2.8b", "decode 64", "share", 0.70),
)
MOST_START_S = 15.0  # to the first token, once kernels are compiled
LEAST_RATIO = 3.0  # of tokens per second at batch 64 to transformers', prompts included


def about(device: str) -> dict[str, object]:
    """The machine and the versions, as far as they bear on what is measured."""
    import torch
    import transformers

    from modelport import __version__

    found: dict[str, object] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "device": platform.processor() or "cpu",
        "modelport": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip
    if device == "cuda":
        import triton

        card = torch.cuda.get_device_properties(0)
        found |= {
            "device": card.name, "multiprocessors": card.multi_processor_count, "memory_bytes": card.total_memory,
            "l2_bytes": card.L2_cache_size, "capability": [card.major, card.minor], "cuda": torch.version.cuda,
            "triton": triton.__version__,
        }  # fmt: skip
    return found


def commands(device: str, tiny: bool, families: tuple[str, ...]) -> list[dict[str, tuple[list[str], float]]]:
    """Of each part: its command, and the most seconds that it may take. Parts that stand together run side by side."""
    python, where = sys.executable, ["--device", device, *(["--tiny"] if tiny else [])]
    folder = HERE.parent / "tests" / "kernels" / "gpu"
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    tests += ["--ignore", str(folder / "test_compiling.py")]  # here all is compiled anyway
    if find_spec("xdist") is not None:
        tests += ["-n", "6"]  # most of it is compilation
    kit = {
        f"kit {name}": ([python, "-m", "modelport", "check", name, "--device", device, "--json"], 150)
        for name in families
    }

    def alone(script: str, *arguments: str) -> list[str]:
        return [python, str(HERE / script), *where, *arguments]

    return [
        {"limits": (alone("gpu_kernels.py", "--only", "limits"), 60)},
        {"llama-8b": (alone("gpu_models.py", "llama-8b"), 120)},
        {"tests": (tests, 180), **kit},
        {"kernels": (alone("gpu_kernels.py"), 120)},
        {"transformers": (alone("gpu_peer.py", "generate"), 120)},
        {"mixtral": (alone("gpu_models.py", "mixtral"), 60)},
        {"qwen2-moe": (alone("gpu_models.py", "qwen2-moe"), 60)},
        {"mamba-2.8b": (alone("gpu_models.py", "mamba-2.8b"), 60)},
        {"start": (alone("gpu_models.py", "--start", "llama-8b"), 60)},
        {"transformers-batching": (alone("gpu_peer.py", "batching"), 90)},
    ]


def run(name: str, command: list[str], limit: float, device: str) -> dict[str, object]:
    """One part: its JSON, or the end of what it said when it failed."""
    began = time.monotonic()
    environment = {**os.environ, "MODELPORT_TEST_DEVICE": device, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=HERE.parent
    )
    try:
        out, err = process.communicate(timeout=limit)
        ended = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        ended = None
    found: dict[str, object] = {"seconds": round(time.monotonic() - began, 1), "returncode": ended}
    if name == "tests":
        lines = out.splitlines()
        found["said"] = [line for line in lines if line.startswith(("FAILED", "ERROR"))] + lines[-1:]
    elif name.startswith("kit"):
        checks = [
            c
            for r in (json.loads(out) if out.lstrip().startswith("[") and ended is not None else [])
            for c in r["checks"]
        ]
        found["checks"] = len(checks)
        found["failed"] = [c for c in checks if c["status"] in ("failed", "unexpected_pass")]
    else:
        found["figures"] = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    if ended != 0:
        found["error"] = "it took too long" if ended is None else (err or out)[-2000:]
    return found


def bars(parts: dict[str, dict]) -> list[dict[str, object]]:
    """What was wanted of an H100, and whether it was reached; `found` is None where nothing was measured."""

    def figure(part: str, name: str, entry: str) -> float | None:
        found = [f for f in parts.get(part, {}).get("figures", []) if f"{f['name']} ".startswith(f"{name} ")]
        return found[-1].get(entry) if found else None

    told = [(f"{part}, {name}: {entry}", figure(part, name, entry), least, True) for part, name, entry, least in BARS]
    told.append(("start: total_s", figure("start", "start", "total_s"), MOST_START_S, False))
    ours = figure("llama-8b", "decode 64", "total_tok_s")
    for part, name in (("transformers", "generate"), ("transformers-batching", "batching")):
        theirs = figure(part, name, "total_tok_s")
        told.append((f"llama-8b beside {part}", ours / theirs if ours and theirs else None, LEAST_RATIO, True))
    return [
        {
            "bar": name, "wanted": wanted, "found": found,
            "met": None if found is None else found >= wanted if at_least else found <= wanted,
        }
        for name, found, wanted, at_least in told
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to see that everything runs")
    parser.add_argument("--only", action="append", metavar="PART", help="run this part only; may be repeated")
    parser.add_argument("--families", default=",".join(FAMILIES), help="what the kit checks")
    parser.add_argument("--minutes", type=float, default=9.5, help="no part goes on after these")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the JSON file")
    args = parser.parse_args()
    began, result = time.monotonic(), {"machine": about(args.device), "tiny": args.tiny, "parts": {}}
    card = str(result["machine"]["device"]).lower().replace(" ", "-")
    file = args.out / f"{result['machine']['date'][:10]}-gpu-{card}.json"
    groups = commands(args.device, args.tiny, tuple(args.families.split(",")))
    names = [name for group in groups for name in group]
    wanted = [name for name in names if not args.only or name in args.only or name.split()[0] in args.only]
    if not wanted:
        parser.error(f"no part is called {' or '.join(args.only)}; there are {', '.join(names)}")

    def part(name: str, command: list[str], limit: float) -> dict[str, object]:
        left = args.minutes * 60 - (time.monotonic() - began)
        return {"error": "no time was left"} if left < 5 else run(name, command, min(limit, left), args.device)

    bad = []
    args.out.mkdir(parents=True, exist_ok=True)
    for group in groups:
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            waiting = {name: pool.submit(part, name, *group[name]) for name in group if name in wanted}
        for name, answer in waiting.items():
            found = result["parts"][name] = answer.result()
            bad += [name] * ("error" in found)
            print(f"{name:24} {'FAILED' if 'error' in found else 'done'} {json.dumps(found)[:1500]}", flush=True)
        result["bars"] = bars(result["parts"])
        file.write_text(json.dumps(result, indent=1) + "\n")
    for bar in result["bars"]:
        told = {None: "not measured", True: "met", False: "MISSED"}[bar["met"]]
        print(f"{bar['bar']:40} wanted {bar['wanted']:<6} found {bar['found'] or '-':<8.4} {told}")
    print(f"{file}: {'all parts ran' if not bad else 'not: ' + ', '.join(bad)}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
