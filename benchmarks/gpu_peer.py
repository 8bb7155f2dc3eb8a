"""transformers at batch 64 on the same shape: ``python benchmarks/gpu_peer.py generate|batching``; one JSON line.

`generate` has a static cache and a compiled step, `batching` is its continuous batching (`generate_batch`) as it
chooses to run; its manager is kept, so that capturing is not in the figures. Weights are random, prompts are those of
`gpu_models.py`.
"""

import argparse
import json
import time

import torch
from gpu_models import config
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from modelport.cli import measure


def build(device: str, tiny: bool) -> torch.nn.Module:
    about = config("llama-8b", tiny)
    dtype = torch.float32 if tiny else torch.bfloat16
    cfg = AutoConfig.for_model("llama", **{k: v for k, v in about.items() if k not in ("architectures", "torch_dtype")})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(cfg, dtype=dtype)
    model = model.to_empty(device=device).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.02)
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(cfg)  # its table was left on meta
    return model


def timed(call, prompt_call, size: int, made: int, device: str) -> dict[str, float | None]:
    """Tokens per second, prompts' time included, and of decoding alone: what the whole takes beyond the prompts."""
    found = []
    for run in (prompt_call, call):
        run()  # compiles
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    prompts, whole = found
    decode = size * (made - 1) / (whole - prompts) if whole > prompts else None
    return {"prompts_s": prompts, "whole_s": whole, "total_tok_s": size * made / whole, "tok_s": decode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("how", choices=("generate", "batching"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    size, context, made = (2, 24, 4) if args.tiny else (64, 1024, 64)
    model = build(args.device, args.tiny)
    work = measure.batch(size, context, made, model.config.vocab_size, "peer")
    prompts = torch.tensor([one.prompt for one in work], device=args.device)

    def generate(tokens: int) -> None:
        extra = {"cache_implementation": "static"} if args.device == "cuda" else {}
        out = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=False, pad_token_id=0, **extra,
        )  # fmt: skip
        assert out.shape[1] == context + tokens

    kept = 0  # for how many tokens its manager was made, which holds the cache and the graphs

    def batching(tokens: int) -> None:
        nonlocal kept
        if kept not in (0, tokens):
            model.destroy_cached_continuous_batching_manager()
        kept = tokens
        settings = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        found = model.generate_batch(
            [one.prompt for one in work], generation_config=settings, progress_bar=False, persistent_manager=True
        )
        assert [len(one.generated_tokens) for one in found.values()] == [tokens] * size

    run = {"generate": generate, "batching": batching}[args.how]
    with torch.no_grad():  # its batching has a thread of its own
        found = timed(lambda: run(made), lambda: run(1), size, made, args.device)
        print(json.dumps({"name": f"{args.how} {size}", **found}))
    if args.how == "batching":
        model.destroy_cached_continuous_batching_manager()


if __name__ == "__main__":
    main()
