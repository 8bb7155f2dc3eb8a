"""Whole models with random weights of real shapes: ``python benchmarks/gpu_models.py NAME``; one JSON line a figure.

Decode is set against the bytes that a step has to read (weights, of experts those that the batch is expected to use,
keys, values and states), prefill against the operations that it has to do; both at the limits measured just before.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu_clock import limits

from modelport import LLM
from modelport.cli import measure
from modelport.modeling.attention import Attention
from modelport.modeling.cache import StateSpec
from modelport.modeling.embedding import Embedding
from modelport.modeling.moe import ExpertLinear

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rope_parameters": LLAMA3_ROPE, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    # 20 of its 32 layers, 59 of 93 GB: all of them would not fit
    "mixtral": {
        "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 20, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
        "max_position_embeddings": 32768, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "qwen2-moe": {
        "architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 151936,
        "max_position_embeddings": 8192, "rope_theta": 1e6, "num_experts": 60, "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "tie_word_embeddings": False,
    },
    "mamba-2.8b": {
        "architectures": ["MambaForCausalLM"], "hidden_size": 2560, "num_hidden_layers": 64, "state_size": 16,
        "expand": 2, "vocab_size": 50280, "tie_word_embeddings": True,
    },
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
_START = """
import json, sys, time
from modelport import LLM, SamplingParams
stamps = [time.monotonic()]
llm = LLM(sys.argv[1], load_format="dummy", skip_tokenizer_init=True, device=sys.argv[2], max_model_len=4096)
stamps.append(time.monotonic())
llm.generate([[1] * 16], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True), use_tqdm=False)
stamps.append(time.monotonic())
print(json.dumps(stamps))
"""
BATCHES = {"llama-8b": (1, 64), "mixtral": (1, 16), "qwen2-moe": (1, 16), "mamba-2.8b": (1, 64)}


def config(name: str, tiny: bool) -> dict[str, Any]:
    """What stands in config.json."""
    shrunk = {key: value for key, value in TINY.items() if key in CONFIGS[name]} if tiny else {}
    return {**CONFIGS[name], **shrunk, "torch_dtype": "float32" if tiny else "bfloat16"}


def write(name: str, tiny: bool, folder: str) -> str:
    Path(folder, "config.json").write_text(json.dumps(config(name, tiny)))
    return folder


def step_bytes(
    model: torch.nn.Module, about: dict[str, Any], weights: int, batch: int, context: float
) -> float:  # fmt: skip
    """What one decode step has to read, and of states write."""
    total = float(weights)
    for module in model.modules():
        if isinstance(module, Embedding) and not module.is_shared:
            total -= module.weight.nbytes  # only the batch's rows
        elif isinstance(module, ExpertLinear):
            packed = module.packed
            count = packed.data.shape[0]
            total -= packed.nbytes * (1 - about.get("num_experts_per_tok", 0) / count) ** batch
        elif isinstance(module, Attention):
            per_token = sum(cache[0].nbytes // cache.shape[2] for cache in (module.k_cache, module.v_cache))
            total += batch * context * per_token
        elif isinstance(getattr(module, "cache_spec", None), StateSpec):
            total += batch * 2 * sum(state[0].nbytes for state in (module.conv_state, module.state))
    return total


def product_flop(model: torch.nn.Module, about: dict[str, Any], tokens: int) -> float:
    """Operations of a prompt: two for each weight that a token meets, and of attention half the square."""
    flop = 0.0
    for module in model.modules():
        packed = getattr(module, "packed", None)
        if isinstance(module, ExpertLinear):
            flop += 2.0 * tokens * packed.data[0].numel() * about["num_experts_per_tok"]
        elif hasattr(packed, "in_features") and not isinstance(module, Embedding):
            rows = 1 if type(module).__name__ == "LMHead" else tokens  # of a prompt only the last row has logits
            flop += 2.0 * rows * packed.out_features * packed.in_features
        elif isinstance(module, Attention):
            width = module.k_cache.shape[3] + module.v_cache.shape[3]
            flop += tokens**2 * width * about["num_attention_heads"]
    return flop


def figures(name: str, device: str, tiny: bool) -> None:
    card = limits(device, tiny)
    about = config(name, tiny)
    context, made, long = (24, 8, 48) if tiny else (1024, 64, 4096)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        llm = LLM(
            write(name, tiny, folder), load_format="dummy", skip_tokenizer_init=True, device=device,
            max_model_len=long + 64, max_num_seqs=64, enable_prefix_caching=False,
        )  # fmt: skip
        tell("load", seconds=time.perf_counter() - began)
    front = llm._front
    model, vocab = front.engine.model, about["vocab_size"]
    weights = measure.weight_bytes(front)
    for size in BATCHES[name]:
        rates = []
        for round_ in range(3):
            times, _, _ = measure.drive(front, measure.batch(size, context, made, vocab, (size, round_)))
            rates.append(measure.decode_rate(times))
            whole = max(stamps[-1] for stamps in times)
        rate = max(found for found in rates[1:] if found)  # the first compiles and captures
        ahead = front.engine.lookahead
        front.engine.lookahead = None
        times, _, _ = measure.drive(front, measure.batch(size, context, made, vocab, (size, "in turn")))
        in_turn, front.engine.lookahead = measure.decode_rate(times), ahead
        nbytes = step_bytes(model, about, weights, size, context + made / 2)
        recorder = front.engine.runner.recorder
        tell(
            f"decode {size}", tok_s=rate, total_tok_s=size * made / whole, step_ms=1e3 * size / rate, bytes=nbytes,
            steps_ahead=ahead.num_ahead if ahead else 0, step_ms_in_turn=1e3 * size / in_turn if in_turn else None,
            share=nbytes / card["read_bytes_s"] * rate / size, graph_steps=recorder.num_replays if recorder else 0,
            given_up=recorder.given_up if recorder else None,
        )  # fmt: skip
    took = []
    for round_ in range(3):
        times, _, _ = measure.drive(front, measure.batch(1, long, 1, vocab, ("long", round_)))
        took.append(times[0][0])
    flop = product_flop(model, about, long)
    tell(f"prefill {long}", seconds=min(took), flop=flop, share=flop / card["bf16_flop_s"] / min(took))
    if device == "cuda":
        tell("memory", peak_bytes=torch.cuda.max_memory_allocated(), weight_bytes=weights)


def start(name: str, device: str, tiny: bool) -> None:
    """From a new process to the first token; twice, since the first time compiles kernels."""
    with tempfile.TemporaryDirectory() as folder:
        for kernels in ("to compile", "compiled"):
            began = time.monotonic()
            command = [sys.executable, "-c", _START, write(name, tiny, folder), device]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            imported, loaded, first = (stamp - began for stamp in json.loads(done.stdout.splitlines()[-1]))
            parts = {"import_s": imported, "load_s": loaded - imported, "first_token_s": first - loaded}
            tell("start", kernels=kernels, total_s=first, **parts)


def tell(name: str, **found: object) -> None:
    print(json.dumps({"name": name, **found}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=tuple(CONFIGS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--start", action="store_true", help="only how long it takes to the first token")
    args = parser.parse_args()
    (start if args.start else figures)(args.name, args.device, args.tiny)


if __name__ == "__main__":
    main()
