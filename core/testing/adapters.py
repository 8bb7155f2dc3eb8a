"""Adapters: a request with one is a request to the merged model, whatever else is in the batch.

Decisions: adapters are made for every layer that takes them, under the names of the checkpoint, and merged into its
tensors in float64; where a tensor holds many matrices (stacked experts), each gets its own, and what the family's
rewriting does with places tells where to merge it. The second adapter has another rank and leaves every other layer
alone.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from modelport.loading.loader import Target, rewritten, targets
from modelport.modeling.embedding import Embedding, LMHead
from modelport.modeling.linear import Linear
from modelport.modeling.moe import ExpertLinear, Router
from modelport.request import LoRARequest
from modelport.testing.media import media_prompts
from modelport.testing.prompts import Prompt
from modelport.testing.reference import LOGITS_LIMIT, SENSITIVITY, GoldenReference
from modelport.testing.registry import Failure, Measured, conformance_check
from modelport.testing.subject import (
    GREEDY,
    Continuation,
    Subject,
    continuations,
    difference,
    largest,
    magnitude,
    needs,
)

RANKS = (4, 3)
TOKENS = 8  # that prompts are continued by: many ways are tried
SHORT = replace(GREEDY, max_tokens=TOKENS)
STRENGTH = 0.3  # spread of what is added, relative to that of a weight
KINDS = (Linear, LMHead, Embedding, Router, ExpertLinear)


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one weight: `scale * b @ a`; to a table of rows its transpose.

    :ivar a: (rank, in); :ivar b: (out, rank).
    """

    a: Tensor
    b: Tensor
    scale: float
    is_table: bool = False

    def delta(self) -> Tensor:
        """(out, in) float64; of a table (rows, size)."""
        product = self.scale * (self.b.double() @ self.a.double())
        return product.T if self.is_table else product


def write_adapter(folder: Path, factors: Mapping[str, Factors]) -> Path:
    """Write an adapter as PEFT does; modules may have ranks and alphas of their own."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    most = max(len(f.a) for f in factors.values())
    alphas = {module: f.scale * len(f.a) for module, f in factors.items()}
    usual = next(iter(alphas.values()))
    config = {
        "peft_type": "LORA",
        "r": most,
        "lora_alpha": usual,
        "rank_pattern": {re.escape(module): len(f.a) for module, f in factors.items() if len(f.a) != most},
        "alpha_pattern": {re.escape(module): alpha for module, alpha in alphas.items() if alpha != usual},
        "target_modules": sorted({module.rpartition(".")[2] for module in factors}),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for module, f in factors.items():
        names = ("lora_embedding_A", "lora_embedding_B") if f.is_table else ("lora_A.weight", "lora_B.weight")
        for name, tensor in zip(names, (f.a, f.b), strict=True):
            tensors[f"base_model.model.{module}.{name}"] = tensor.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@dataclass(frozen=True)
class Made:
    """An adapter as files, and the model with it merged in."""

    request: LoRARequest
    merged: Path
    count: int


def make_adapter(subject: Subject, number: int, rank: int, every: int = 1) -> Made:
    """An adapter of every layer that takes one, or of one in `every`."""
    generator = torch.Generator().manual_seed(number)
    merged, factors = dict(subject.tensors), {}
    layers = list(_layers(subject))
    for name, tensor, place in layers[::every]:
        for module, made, delta in _factors(name, tensor, place, rank, generator):
            factors[module] = made
            merged[name] = (merged[name].double() + delta).to(tensor.dtype)
    folder = write_adapter(subject.scratch / f"adapter-{number}", factors)
    request = LoRARequest(f"adapter-{number}", number, str(folder))
    return Made(request, subject.write(f"merged-{number}", merged), len(factors))


@dataclass(frozen=True)
class _Place:
    """What a checkpoint's tensor fills.

    :ivar places: for each element there the number of the checkpoint's element; None when it is the tensor itself.
    """

    path: str
    target: Target
    is_transposed: bool
    places: Tensor | None = None


def _layers(subject: Subject) -> Iterator[tuple[str, Tensor, _Place]]:
    """The checkpoint's tensors that are matrices of layers, and which."""
    known, about = targets(subject.build_empty()), subject.about
    tied = any(isinstance(m, LMHead) and m.is_tied for m in subject.build_empty().modules())
    for name, tensor in subject.tensors.items():
        if tensor.dim() not in (2, 3) or not tensor.is_floating_point():
            continue
        numbers = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
        try:
            made = list(rewritten([(name, numbers)], about.architecture, about.config, about.language))
        except (ValueError, RuntimeError, IndexError, KeyError, TypeError):
            continue  # the family wants its neighbours beside it
        made = [(path, out, known.get(path)) for path, out in made]
        made = [
            (path, out, target) for path, out, target in made if target is not None and target.parameter == "weight"
        ]
        if not made or not all(isinstance(target.module, KINDS) for _, _, target in made):
            continue
        path, out, target = made[0]
        if isinstance(target.module, Embedding) and tied:
            continue  # merged, it would change the head too
        if not all(torch.equal(out.round(), out) and out.dtype == numbers.dtype for _, out, _ in made):
            continue  # the weight is not used as it is stored
        if tensor.dim() == 2 and not isinstance(target.module, ExpertLinear):
            step = (out[0, 1] - out[0, 0]) if out.shape[1] > 1 else torch.tensor(1.0)
            yield name, tensor, _Place(path, target, bool(step != 1))
        else:
            yield from ((name, tensor, _Place(path, target, False, out)) for path, out, target in made)


def _factors(
    name: str, tensor: Tensor, place: _Place, rank: int, generator: torch.Generator
) -> Iterator[tuple[str, Factors, Tensor]]:
    """Modules that change `tensor`, how, and what that adds to it."""
    spread = float(tensor.double().std()) or 0.02
    if place.places is None:
        out, size = tensor.T.shape if place.is_transposed else tensor.shape
        is_table = isinstance(place.target.module, Embedding)
        made = _random(*((size, out) if is_table else (out, size)), rank, spread, generator, is_table)
        delta = made.delta()
        yield name.removesuffix(".weight"), made, delta.T if place.is_transposed else delta
        return
    linear: ExpertLinear = place.target.module
    whole = place.places.reshape(-1, linear.weight.shape[-1])  # rows of all matrices that the tensor holds
    path = place.path.removesuffix(".weight")
    if place.target.part is None:
        spans, start = [], 0
        for part, width in linear.parts:
            spans.append((f"{path.rpartition('.')[0]}.{part}", start, start + width))
            start += width
    else:  # the checkpoint's own name, where it is a matrix there
        spans = [(path if tensor.numel() > whole.numel() else name.removesuffix(".weight"), 0, len(whole))]
    for module, start, end in spans:
        made = _random(end - start, whole.shape[1], rank, spread, generator)
        delta = torch.zeros(tensor.numel(), dtype=torch.float64)
        delta[whole[start:end].flatten().long()] = made.delta().flatten()
        yield module, made, delta.view(tensor.shape)


def _random(
    out: int, size: int, rank: int, spread: float, generator: torch.Generator, is_table: bool = False
) -> Factors:
    a = torch.randn(rank, size, generator=generator) / size**0.5
    b = torch.randn(out, rank, generator=generator) * (STRENGTH * spread * (size / rank) ** 0.5) * 2
    return Factors(a, b, 0.5, is_table)


@conformance_check()
def lora(subject: Subject) -> Measured:
    """An adapter on every linear layer is the merged model, and two adapters in a batch do not mix."""
    needs(subject.tensors, "there are no weights to merge an adapter into")
    first = make_adapter(subject, 1, RANKS[0])
    second = make_adapter(subject, 2, RANKS[1], every=2)
    longest = max(subject.prompts, key=len)
    prompts = [p for p in subject.prompts if p is longest or len(p) in (1, 17)]
    known = {c.prompt: _begun(c) for c in subject.baseline}
    wanted: list[tuple[LoRARequest | None, list[Continuation]]] = [(None, [known[p] for p in prompts])]
    wanted += [(made.request, subject.alone(prompts, TOKENS, made.merged)) for made in (first, second)]
    _require_effect(wanted)
    worst = 0.0
    for adapter, want in wanted[1:]:
        found = subject.alone(prompts, TOKENS, adapter=adapter, enable_lora=True)
        worst = max(worst, *(difference(w, f) for w, f in zip(want, found, strict=True)))
    cases = [(adapter, c) for index in range(len(prompts)) for adapter, of in wanted for c in of[index : index + 1]]
    room = min(subject.max_model_len, len(longest) + TOKENS + 1)
    runs = (
        {"enable_prefix_caching": True},
        {"max_num_batched_tokens": 24, "max_num_seqs": 3, "max_loras": 1},
        {"num_kv_blocks": -(-room // 16) + 1, "max_model_len": room},
        {"tensor_parallel_size": 2, "executor": "inproc"},
        {"pipeline_parallel_size": 2, "executor": "inproc"},
    )
    for settings in runs:
        try:
            llm = subject.llm(enable_lora=True, **settings)
        except ValueError as error:
            if "cannot be" not in str(error):
                raise
            continue
        for _ in range(2 if "enable_prefix_caching" in settings else 1):
            outputs = subject.together([c.prompt for _, c in cases], SHORT, llm, [a for a, _ in cases])
            found = continuations([c.prompt for _, c in cases], outputs)
            worst = max(worst, *(difference(c, f) for (_, c), f in zip(cases, found, strict=True)))
    if subject.architecture.inputs is not None and not isinstance(subject.reference, GoldenReference):
        worst = max(worst, _with_media(subject, first))
    return Measured(worst, LOGITS_LIMIT, f"{first.count} modules")


def _begun(continuation: Continuation) -> Continuation:
    """Its first tokens."""
    rows = len(continuation.prompt) + TOKENS - 1
    return replace(
        continuation,
        token_ids=continuation.token_ids[:TOKENS],
        logprobs=continuation.logprobs[:TOKENS],
        logits=continuation.logits[:rows],
    )


def _require_effect(wanted: Sequence[tuple[LoRARequest | None, Sequence[Continuation]]]) -> None:
    """Adapters that hardly change anything prove nothing."""
    base, *others = [continuations[-1].logits[0] for _, continuations in wanted]
    for other in others:
        moved = largest(other - base) / magnitude(base)
        if moved < SENSITIVITY:
            raise Failure(
                f"an adapter moves the logits by {moved:.1e} of the largest only; choose other sizes in `tiny`"
            )


def _with_media(subject: Subject, made: Made) -> float:
    """The worst difference of prompts with media, with an adapter and merged."""
    merged, adapted = subject.llm(made.merged), subject.llm(enable_lora=True, enable_prefix_caching=True)
    prompts = media_prompts(merged)
    want = merged.generate(prompts, SHORT, use_tqdm=False)
    for adapter in (None, made.request):  # the same media by the model as it is come first
        found = adapted.generate(prompts, SHORT, use_tqdm=False, lora_request=adapter)
    bases = continuations([Prompt(tuple(o.prompt_token_ids)) for o in want], want)
    others = continuations([base.prompt for base in bases], found)
    scale, worst = magnitude(subject.baseline[-1].logits), 0.0
    for base, other in zip(bases, others, strict=True):
        apart = (i for i, (a, b) in enumerate(zip(base.token_ids, other.token_ids, strict=True)) if a != b)
        # where two tokens are as likely they may part, and what follows is another text
        until = next(apart, len(base.token_ids) - 1) + 1
        worst = max(worst, largest(other.logprobs[:until] - base.logprobs[:until]) / scale)
    return worst
