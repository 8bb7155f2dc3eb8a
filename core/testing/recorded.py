"""Recorded prompts with media: raw files through the input processor to the recorded rows, logits and tokens.

Decisions: a recorded prompt is as long as the model saw it, so the tokens of each item are looked for in it and a
placeholder is put in their place, which the processor then has to expand to the recorded tokens again; tokens whose
embeddings are replaced count for nothing there, since their ids are a choice. A case may say `prompt_ids` itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelport.inputs.processor import MODALITIES, Expanded, InputProcessor, MediaItem
from modelport.llm import LLM
from modelport.sampling_params import SamplingParams
from modelport.testing.prompts import Prompt
from modelport.testing.reference import LOGITS_LIMIT, GoldenReference
from modelport.testing.registry import Failure, Measured
from modelport.testing.subject import Continuation, Subject, continuations, difference, largest, magnitude, needs

WAYS = (
    {},
    {"enable_prefix_caching": True},
    {"max_num_batched_tokens": 7, "max_num_seqs": 2},
    {"pipeline_parallel_size": 2, "executor": "inproc"},
    {"tensor_parallel_size": 2, "executor": "inproc"},
)
"""Of running the recorded prompts together."""


def compare_recorded_media(subject: Subject) -> Measured:
    """The largest difference of rows and logits from what is recorded, and between ways of running.

    :raises Failure: other tokens than the recorded ones, or a prompt that is expanded otherwise.
    """
    golden = subject.reference
    assert isinstance(golden, GoldenReference)
    needs(golden.media_cases, f"{golden.name} holds no case with media")
    room = max(len(_recorded_ids(case)) + len(case["greedy_ids"]) for case in golden.media_cases.values())
    room = {"max_model_len": room, "max_num_batched_tokens": room}
    llm, tensors, worst = subject.llm(**room), golden.tensors(), 0.0
    bases, given = [], []
    for index, case in golden.media_cases.items():
        data, expanded, ids = _read(golden, case, llm, subject.config.vocab_size)
        worst = max(worst, _rows(llm, expanded, tensors[f"mm_embeds_{index}"]))
        given.append({"prompt_token_ids": ids, "multi_modal_data": data})
        bases.append(_alone(llm, given[-1], expanded.token_ids, len(case["greedy_ids"])))
        wanted = tensors[f"logits_{index}"].float()
        told = bases[-1].logits[: len(expanded.token_ids)]
        worst = max(worst, largest(told[-len(wanted) :] - wanted) / magnitude(wanted))
        if bases[-1].token_ids != case["greedy_ids"]:
            raise Failure(f"case {index} goes on with {bases[-1].token_ids}, the recorded is {case['greedy_ids']}")
    prompts = [base.prompt for base in bases]
    params = SamplingParams(temperature=0.0, max_tokens=len(bases[0].token_ids), ignore_eos=True, logprobs=0)
    for settings in WAYS:
        llm = subject.llm(**{**room, **settings})
        for _ in range(2 if "enable_prefix_caching" in settings else 1):
            found = continuations(prompts, llm.generate(given, params, use_tqdm=False))
            worst = max(worst, *(difference(base, other) for base, other in zip(bases, found, strict=True)))
    return Measured(worst, LOGITS_LIMIT, f"{len(bases)} recorded prompts")


def _recorded_ids(case: Mapping[str, Any]) -> list[int]:
    return case["mm_inputs"].get("expanded_input_ids") or case["input_ids"]


def _read(
    golden: GoldenReference, case: Mapping[str, Any], llm: LLM, vocab_size: int
) -> tuple[dict[str, list[str]], Expanded, list[int]]:
    """A case's files, what its prompt becomes with them, and the prompt with placeholders."""
    data: dict[str, list[str]] = {}
    for file in case["files"]:
        modality = next(modality for modality in MODALITIES if file.startswith(modality))
        data.setdefault(modality, []).append(str(golden.folder / file))
    reader, recorded = llm._front.media, _recorded_ids(case)
    items = reader.read(data)
    in_order = [item for several in items.values() for item in several]
    ids = case.get("prompt_ids") or with_placeholders(recorded, in_order, reader.processor, vocab_size)
    expanded = reader.processor.expand(list(ids), items)
    stands = np.ones(len(expanded.token_ids), bool)
    for placed in expanded.media:
        stands[placed.start + placed.item.row_places] = False
    if len(recorded) != len(stands) or (np.array(recorded) != expanded.token_ids)[stands].any():
        raise Failure(f"the prompt becomes {expanded.token_ids}, the recorded one is {recorded}")
    return data, expanded, ids


def with_placeholders(
    recorded: Sequence[int], items: Sequence[MediaItem], processor: InputProcessor, vocab_size: int
) -> list[int]:
    """A prompt as it was before its items were put in.

    :raises Failure: the tokens of an item are not in it, behind those of the item before.
    """
    ids: list[int] = []
    start = 0
    for number, item in enumerate(items):
        size, rows = len(item.token_ids), set(item.row_places.tolist())

        def fits(window: Sequence[int], exactly: bool, item: MediaItem = item, rows: set[int] = rows) -> bool:
            pairs = enumerate(zip(window, item.token_ids, strict=True))
            return all(a == b or not exactly and i in rows for i, (a, b) in pairs)

        places = range(start, len(recorded) - size + 1)
        found = next((p for p in places if fits(recorded[p : p + size], True)), None)
        if found is None:  # other ids for rows: known by the tokens around them, or by lying outside the vocabulary
            found = next(
                (
                    p
                    for p in places
                    if fits(recorded[p : p + size], False)
                    and (len(rows) < size or all(not 0 <= i < vocab_size for i in recorded[p : p + size]))
                ),
                None,
            )
        if found is None:
            raise Failure(f"item {number} stands for {list(item.token_ids)}, which {list(recorded)} does not hold")
        ids += [*recorded[start:found], processor.placeholder_id(item.modality)]
        start = found + size
    return [*ids, *recorded[start:]]


@torch.inference_mode()
def _rows(llm: LLM, expanded: Expanded, wanted: Tensor) -> float:
    """How far the model's rows are from the recorded ones, in the order of the prompt."""
    model, device = llm._front.engine.model, llm._front.engine.runner.device
    found = []
    for placed in expanded.media:
        tensors = {name: tensor.to(device) for name, tensor in placed.item.tensors.items()}
        found.append(model.embed_media(placed.item.modality, [tensors])[0].float().cpu())
    ours, wanted = torch.cat(found), wanted.float().flatten(0, -2)
    if ours.shape != wanted.shape:
        raise Failure(f"the media give rows {tuple(ours.shape)}, the recorded are {tuple(wanted.shape)}")
    worst = largest(ours - wanted) / largest(wanted)
    if not worst <= LOGITS_LIMIT:
        raise Failure("the rows that the media give are not the recorded ones", worst, LOGITS_LIMIT)
    return worst


def _alone(llm: LLM, prompt: Mapping[str, Any], expanded: Sequence[int], tokens: int) -> Continuation:
    """One prompt, with the logits at every position."""
    caught: list[Tensor] = []
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    runner = llm._front.engine.runner
    runner.on_logits = lambda logits: caught.append(logits.float().cpu().clone())
    try:
        outputs = llm.generate([prompt], params, use_tqdm=False)
    finally:
        runner.on_logits = None
    (found,) = continuations([Prompt(tuple(expanded))], outputs)
    return replace(found, logits=torch.cat(caught))
