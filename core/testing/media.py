"""Prompts with media, against the reference.

Decisions: media are noise of several sizes, prepared by the architecture's own input processor, and the reference gets
the tensors that it made (preprocessing itself is for a family's own tests to compare); the processor's names of them
are the reference's arguments. Where tokens of a whole prompt see each other (`Expanded.spans`), it gets `spans`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modelport.inputs.processor import InputProcessor
from modelport.llm import LLM
from modelport.modeling.cache import CacheSpec
from modelport.testing.prompts import TOKENS, Prompt
from modelport.testing.recorded import compare_recorded_media
from modelport.testing.reference import LOGITS_LIMIT, SENSITIVITY, ModuleReference
from modelport.testing.registry import Failure, Measured
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

SIZES = ((40, 52), (91, 33), (30, 30))
FILMS = ((3, 40, 52), (3, 50, 31), (3, 30, 30))  # frames, as many in each, since references stack them; width, height
BLOCK = 16
SOUNDS = (1900, 3100, 1300)  # samples
DIVIDED = ({"pipeline_parallel_size": 2, "executor": "inproc"}, {"tensor_parallel_size": 2, "executor": "inproc"})


def compare_pictures(subject: Subject) -> Measured:
    """The largest difference over prompts with media: together, again from the cache, in chunks, preempted, divided.

    :raises Failure: another token than the reference's, or an item that does not matter.
    """
    needs(subject.architecture.inputs is not None, "the model takes text only")
    seen = list(subject.architecture.inputs.modalities)
    if not isinstance(subject.reference, ModuleReference):
        needs(subject.reference, "the architecture names no reference")
        return compare_recorded_media(subject)
    llm = subject.llm(enable_prefix_caching=True)
    prompts = _prompts(llm, seen)
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    bases = [told(subject, llm, p, o.prompt_token_ids) for p, o in zip(prompts, outputs, strict=True)]
    worst = farthest(bases, outputs)
    again = llm.generate(prompts, GREEDY, use_tqdm=False)
    if subject.shares_prefixes and not all(output.num_cached_tokens for output in again if len(_ids(output)) > 32):
        raise Failure("prompts with media were run twice, and nothing came from the cache")
    worst = max(worst, farthest(bases, again))
    for settings in (
        {"max_num_batched_tokens": 7, "max_num_seqs": 2},
        {"max_num_batched_tokens": 33, "max_num_seqs": 1},
        *DIVIDED,
    ):
        worst = max(worst, farthest(bases, subject.llm(**settings).generate(prompts, GREEDY, use_tqdm=False)))
    worst = max(worst, _preempted(subject, prompts, bases))
    for number, modality in enumerate(seen):
        _require_sight(bases[2 * number : 2 * number + 2], modality)
    return Measured(worst, LOGITS_LIMIT, f"{len(prompts)} prompts, with media of kind {' and '.join(seen)}")


def media_prompts(llm: LLM) -> list[dict[str, Any]]:
    """Prompts with items of every kind that the model takes."""
    return _prompts(llm, list(llm._front.media.processor.modalities))


def _preempted(subject: Subject, prompts: Sequence[dict[str, Any]], bases: Sequence[Continuation]) -> float:
    """The difference where requests with media lose their cache to others and go on."""
    if not subject.is_paged or any(spec.cross for spec in subject.cache_specs if isinstance(spec, CacheSpec)):
        return 0.0  # media that are keys themselves want room of their own, in which all tokens fit
    room = max(len(base.prompt) for base in bases) + TOKENS + 1
    llm = subject.llm(num_kv_blocks=-(-room // BLOCK) + 1, max_model_len=room)
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    if not sum(output.metrics.num_preemptions for output in outputs):
        raise Failure(f"{len(outputs)} prompts with media fitted in {room} tokens: nothing was preempted")
    return farthest(bases, outputs)


def noise(processor: InputProcessor) -> dict[str, list[Any]]:
    """Three items of each modality that a model takes."""
    import numpy as np
    from PIL import Image

    source = np.random.default_rng(5)
    pictures = [Image.fromarray(source.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]
    films = [source.integers(0, 256, (frames, h, w, 3), dtype=np.uint8) for frames, w, h in FILMS]
    sounds = [(source.uniform(-0.5, 0.5, length).astype(np.float32), processor.audio_rate) for length in SOUNDS]
    made = {"image": pictures, "video": films, "audio": sounds}
    return {modality: made[modality] for modality in processor.modalities}


def takes(processor: InputProcessor, modality: str, count: int) -> bool:
    """Whether a prompt may have `count` items of a modality."""
    most = processor.modalities[modality]
    return most is None or most >= count


def _prompts(llm: LLM, modalities: Sequence[str]) -> list[dict[str, Any]]:
    """One item, another one in its place, for each modality; several where they are taken, modalities mixed, none."""
    processor = llm._front.media.processor
    media, places = noise(processor), {modality: processor.placeholder_id(modality) for modality in modalities}
    layouts: list[tuple[list[int], dict[str, list[Any]]]] = []
    for modality, here in places.items():
        layouts += [([5, here, 7, 8, 9], {modality: [item]}) for item in media[modality][:2]]
    for modality, here in places.items():
        if takes(processor, modality, 3):
            layouts.append(([here, 11, 12, here, 13, 14, here, 15], {modality: media[modality]}))
    if len(places) > 1:
        ids = [5, *(token for here in reversed(places.values()) for token in (here, 7))]
        layouts.append((ids, {modality: media[modality][:1] for modality in modalities}))
    made = [{"prompt_token_ids": ids, "multi_modal_data": given} for ids, given in layouts]
    return [*made, {"prompt_token_ids": [5, 6, 7, 8, 9]}]


@torch.inference_mode()
def told(subject: Subject, llm: LLM, prompt: Mapping[str, Any], token_ids: Sequence[int]) -> Continuation:
    """What the reference makes of a prompt; every step computes the whole sequence again."""
    media = llm._front.media.read(prompt.get("multi_modal_data", {}))
    tensors: dict[str, Any] = {}
    for several in media.values():
        tensors |= {name: _padded([item.tensors[name] for item in several]) for name in several[0].tensors}
    expanded = llm._front.media.processor.expand(list(prompt["prompt_token_ids"]), media)
    if expanded.spans:  # which the ids do not say, once tokens follow
        tensors["spans"] = expanded.spans
    ids = list(token_ids)
    for _ in range(TOKENS):
        logits = subject.reference.model(input_ids=torch.tensor([ids]), use_cache=False, **tensors).logits[0].float()
        ids.append(int(logits[-1].argmax()))
    made = ids[len(token_ids) :]
    logprobs = logits[len(token_ids) - 1 :].log_softmax(-1).gather(1, torch.tensor(made)[:, None])[:, 0]
    return Continuation(Prompt(tuple(token_ids)), made, logprobs, logits)


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of several sizes as one, each with zeros behind it, as the published processors stack them."""
    largest = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    stacked = tensors[0].new_zeros((len(tensors), *largest))
    for place, tensor in zip(stacked, tensors, strict=True):
        place[tuple(slice(size) for size in tensor.shape)] = tensor
    return stacked


def farthest(bases: Sequence[Continuation], outputs: Sequence[Any]) -> float:
    """The largest difference of a batch's outputs from what they are held against."""
    found = continuations([base.prompt for base in bases], outputs)
    return max(difference(base, other) for base, other in zip(bases, found, strict=True))


def _require_sight(bases: Sequence[Continuation], modality: str) -> None:
    """Two items in the same place make a difference, or nothing was proved."""
    first, other = (base.steps[0] for base in bases[:2])
    moved = largest(first - other) / magnitude(first)
    if moved < SENSITIVITY:
        raise Failure(
            f"another {modality} moves the logits by {moved:.1e} of the largest only; choose other sizes in `tiny`"
        )


def _ids(output: Any) -> Sequence[int]:
    return output.prompt_token_ids
