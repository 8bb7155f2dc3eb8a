"""Parity: what the model computes is what its reference computes.

Decisions: the reference is run over the prompt and the tokens that we chose, whole; if each of those is the reference's
likeliest at its place then, by induction, our greedy tokens are the reference's, and one pass shows it. A token whose
logit is within rounding of the likeliest one's is as good: ties are no difference. bfloat16 is held against float32 by
the distance of log-probabilities, and may be no farther from it than the reference's own bfloat16 is, with some room.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from modelport.testing.prompts import Prompt
from modelport.testing.reference import LOGITS_LIMIT, GoldenReference, ModuleReference
from modelport.testing.registry import Failure, Measured, conformance_check
from modelport.testing.subject import Subject, largest, magnitude, needs

ROUNDING_ROOM = 1.5
"""How much farther than the reference's own bfloat16 ours may be: the order of sums differs, the number of roundings
hardly does. A forgotten float32 accumulation or a rounded rotary table lies beyond."""
WEIGHTS_ROOM = 3.0
"""The same against the distance that rounding the weights alone causes, where the reference cannot be run."""
NO_REFERENCE = "the architecture names no reference"


@conformance_check()
def runs(subject: Subject) -> Measured:
    """The model loads and continues every prompt with finite logits."""
    for continuation in subject.baseline:
        if not torch.isfinite(continuation.logits).all():
            raise Failure(f"the logits of a prompt of {len(continuation.prompt)} tokens are not finite")
    return Measured(detail=f"{len(subject.baseline)} prompts of up to {max(map(len, subject.prompts))} tokens")


@conformance_check(every_variant=True)
def logits(subject: Subject) -> Measured:
    """Float32 logits of every prompt are the reference's, to 1e-4 of the largest."""
    worst, where = 0.0, ""
    for ours, theirs in zip(*_prompt_logits(subject), strict=True):
        found = largest(ours[-len(theirs) :] - theirs) / magnitude(theirs)
        if not found <= worst:
            apart = (ours[-len(theirs) :] - theirs).abs().amax(-1)
            row = len(ours) - len(theirs) + int(apart.argmax())
            worst, where = found, f"farthest at position {row} of a prompt of {len(ours)} tokens"
    return Measured(worst, LOGITS_LIMIT, where)


@conformance_check(every_variant=True)
def greedy(subject: Subject) -> Measured:
    """32 greedy tokens of every prompt are the reference's."""
    needs(subject.reference, NO_REFERENCE)
    if isinstance(subject.reference, GoldenReference):
        return _golden_greedy(subject, subject.reference)
    closest, distinct = float("inf"), set()
    for ours in subject.baseline:
        told = _told(subject)[ours.prompt][len(ours.prompt) - 1 :]
        limit = 2 * LOGITS_LIMIT * magnitude(told)
        for step, token in enumerate(ours.token_ids):
            best = int(told[step].argmax())
            gap = float(told[step, best] - told[step, token])
            if gap > limit:
                raise Failure(
                    f"after a prompt of {len(ours.prompt)} tokens, token {step} is {token}, the reference's is {best}, "
                    f"by {gap:.2g}",
                    gap,
                    limit,
                )
            closest = min(closest, float(told[step].topk(2).values.diff().abs()))
        distinct |= set(ours.token_ids)
    return Measured(detail=f"{len(distinct)} different tokens; the closest call was {closest:.1e}")


@conformance_check()
def bfloat16(subject: Subject) -> Measured:
    """In bfloat16 the log-probabilities are about as near to float32 as the reference's own."""
    _, exact = _prompt_logits(subject)
    prompts = _prompts(subject)
    rounded = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in subject.tensors.items()
    }
    config = {k: v for k, v in subject.raw_config.items() if k != "torch_dtype"} | {"dtype": "bfloat16"}
    folder = subject.write("bfloat16", rounded, config)
    lower = _first_logits(subject, prompts, folder, dtype="bfloat16")
    if isinstance(subject.reference, ModuleReference):
        limit, against = ROUNDING_ROOM * _distance(subject.reference.rounded_logits(prompts), exact), "the reference's"
    else:
        weights_only = _first_logits(subject, prompts, folder, dtype="float32")
        limit, against = WEIGHTS_ROOM * _distance(weights_only, exact), "that of rounded weights"
    return Measured(_distance(lower, exact), limit, f"root mean square; the limit is a multiple of {against}")


def _prompts(subject: Subject) -> list[Prompt]:
    return subject.reference.prompts if isinstance(subject.reference, GoldenReference) else subject.prompts


def _prompt_logits(subject: Subject) -> tuple[list[Tensor], list[Tensor]]:
    """Ours for each prompt, (prompt, vocab_size), and the reference's, which may lack the first rows."""
    needs(subject.reference, NO_REFERENCE)
    if isinstance(subject.reference, GoldenReference):
        subject.reference.require_text()
        return [c.logits[: len(c.prompt)] for c in subject.golden_run], subject.reference.logits()
    told = _told(subject)
    return (
        [c.logits[: len(c.prompt)] for c in subject.baseline],
        [told[c.prompt][: len(c.prompt)] for c in subject.baseline],
    )


def _told(subject: Subject) -> dict[Prompt, Tensor]:
    """The reference's logits over each prompt and what we continued it by."""
    assert isinstance(subject.reference, ModuleReference)
    return subject.once(
        "told",
        lambda: {
            c.prompt: subject.reference.logits((*c.prompt.token_ids, *c.token_ids[:-1]), c.prompt.encoder_token_ids)
            for c in subject.baseline
        },
    )


def _first_logits(subject: Subject, prompts: Sequence[Prompt], folder: Path, dtype: str) -> list[Tensor]:
    return [c.logits for c in subject.alone(prompts, tokens=1, folder=folder, dtype=dtype)]


def _distance(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Root mean square over all positions and tokens of the difference in log-probability."""
    parts = [
        (a[-len(b) :].log_softmax(-1) - b.log_softmax(-1)).square().flatten() for a, b in zip(found, exact, strict=True)
    ]
    return float(torch.cat(parts).mean().sqrt())


def _golden_greedy(subject: Subject, golden: GoldenReference) -> Measured:
    golden.require_text()
    for ours, wanted in zip(subject.golden_run, golden.greedy, strict=True):
        found = ours.token_ids[: len(wanted)]
        if found != wanted:
            step = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
            raise Failure(
                f"after a prompt of {len(ours.prompt)} tokens, token {step} is {found[step]}, the recorded one is "
                f"{wanted[step]}"
            )
    return Measured(detail=f"{len(golden.greedy)} recorded prompts")
