"""What becomes of media beyond the mathematics: their order, rows given in their place, rows that are kept, wrong ones.

Decisions: rows of the caller's and kept rows are held against the same prompts with the items themselves, which the
check of media holds against the reference; that rows come from where they should is shown by counting the calls of
`embed_media`. Wrong media go to `LLM.generate`, and each has to be refused within a second.
"""

from __future__ import annotations

import logging
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from modelport.inputs.processor import MODALITIES, InputProcessor
from modelport.llm import LLM
from modelport.testing.media import DIVIDED, farthest, noise, takes, told
from modelport.testing.parity import NO_REFERENCE
from modelport.testing.prompts import Prompt
from modelport.testing.recorded import compare_recorded_media
from modelport.testing.reference import LOGITS_LIMIT, SENSITIVITY, GoldenReference
from modelport.testing.registry import Failure, Measured, conformance_check
from modelport.testing.subject import GREEDY, Continuation, Subject, continuations, largest, magnitude, needs

SECOND = 1.0
TEXT = {"prompt_token_ids": [5, 6, 7, 8, 9]}


@conformance_check()
def several_items(subject: Subject) -> Measured:
    """Several items stand in the order in which they are given, modalities mixed in any order."""
    inputs = _inputs(subject)
    needs(subject.reference, NO_REFERENCE)
    if isinstance(subject.reference, GoldenReference):
        counts = [len(case["files"]) for case in subject.reference.media_cases.values()]
        needs(max(counts, default=0) > 1, f"{subject.reference.name} holds no case with several items")
        return compare_recorded_media(subject)
    several = [modality for modality in inputs.modalities if takes(inputs, modality, 3)]
    needs(several or len(inputs.modalities) > 1, "a prompt of this model has one item")
    llm = subject.llm()
    places, media, pairs = _places(llm), noise(llm._front.media.processor), []
    for modality in several:
        here, (first, second, third) = places[modality], media[modality]
        ids = [here, 11, here, 12, 13, here, 14]
        pairs.append([_prompt(ids, {modality: items}) for items in ([first, second, third], [third, first, second])])
    for one in places:
        for other in places:
            if one < other:
                ids = [[5, places[first], 7, places[second], 8] for first, second in ((one, other), (other, one))]
                pairs.append([_prompt(i, {one: media[one][:1], other: media[other][:1]}) for i in ids])
    prompts = [prompt for pair in pairs for prompt in pair]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    bases = [told(subject, llm, p, o.prompt_token_ids) for p, o in zip(prompts, outputs, strict=True)]
    for first, other in zip(bases[::2], bases[1::2], strict=True):
        if largest(first.steps[0] - other.steps[0]) < SENSITIVITY * magnitude(first.steps[0]):
            raise Failure("the reference's logits do not tell the order of items; choose other sizes in `tiny`")
    return Measured(farthest(bases, outputs), LOGITS_LIMIT, f"{len(prompts)} prompts")


@conformance_check()
def embedded_items(subject: Subject) -> Measured:
    """Rows given in place of an item are the item: alone, among items, in chunks, divided."""
    modalities = [modality for modality in _inputs(subject).modalities if modality in _inputs(subject).embeddable]
    needs(modalities, "the model takes no rows in place of its media")
    llm = subject.llm()
    places, media, wanted, given = _places(llm), noise(llm._front.media.processor), [], []
    for modality in modalities:
        here, items = places[modality], media[modality]
        rows = [_rows(llm, modality, item) for item in items]
        layouts = [([5, here, 7, 8], items[:1], rows[:1])]
        if takes(llm._front.media.processor, modality, 3):
            layouts.append(([here, 11, here, 12, here, 13], items, [rows[0], items[1], rows[2]]))
        for ids, own, mixed in layouts:
            wanted.append(_prompt(ids, {modality: own}))
            given.append(_prompt(ids, {modality: mixed}))
    bases = [_alone(llm, prompt) for prompt in wanted]
    with _counted(subject.llm()) as (fresh, calls):
        worst = farthest(bases[:1], fresh.generate(given[:1], GREEDY, use_tqdm=False))
        if calls:
            raise Failure("rows were given, and the model's encoder ran nevertheless")
    for settings in ({}, {"max_num_batched_tokens": 7, "max_num_seqs": 2}, *DIVIDED):
        outputs = subject.llm(**settings).generate([*given, TEXT], GREEDY, use_tqdm=False)
        worst = max(worst, farthest(bases, outputs[:-1]))
    return Measured(worst, LOGITS_LIMIT, f"{len(given)} prompts, with rows for {' and '.join(modalities)}")


@conformance_check()
def kept_items(subject: Subject) -> Measured:
    """An item that was encoded for an earlier prompt is not encoded again, and gives the same as one that is."""
    _inputs(subject)
    worst, last = 0.0, 0
    with _counted(subject.llm()) as (llm, calls):
        prompts = [
            _prompt([5, here, 7, 8], {modality: [item]})
            for modality, here in _places(llm).items()
            for item in noise(llm._front.media.processor)[modality][:2]
        ]
        bases = [_alone(llm, prompt) for prompt in prompts]
        made = len(calls)
        if not made:
            raise Failure("prompts with media were run, and `embed_media` was not called")
        worst = farthest(bases, llm.generate(prompts, GREEDY, use_tqdm=False))
        if len(calls) > made:
            raise Failure("items that were encoded a moment before were encoded again: is their digest the same?")
    with _counted(subject.llm()) as (llm, calls):
        items = [
            item
            for p in prompts
            for several in llm._front.media.read(p["multi_modal_data"]).values()
            for item in several
        ]
        llm._front.engine.scheduler.media.capacity = max(item.num_rows for item in items)  # room for one
        for _ in range(2):
            for base, prompt in zip(bases, prompts, strict=True):
                worst = max(worst, farthest([base], llm.generate([prompt], GREEDY, use_tqdm=False)))
            last, made = made, len(calls)
        if made < 2 * last:
            raise Failure(f"with room for one item of several, {made} were encoded instead of {2 * last}")
    return Measured(worst, LOGITS_LIMIT, f"{len(prompts)} items")


@conformance_check()
def refused_items(subject: Subject) -> Measured:
    """Media that are wrong, too many or misplaced, or that fail in the model, end their request alone, in a second."""
    _inputs(subject)
    llm = subject.llm()
    before = _alone(llm, TEXT)
    slowest, wrong, tiny = 0.0, _wrong(llm), _tiny(llm)
    for name, prompt in {**wrong, **tiny}.items():
        started = time.perf_counter()
        try:
            (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
        except ValueError as error:
            if not str(error):
                raise Failure(f"{name}: refused without a word") from None
        except Exception as error:
            raise Failure(f"{name}: {type(error).__name__} instead of a ValueError: {error}") from error
        else:
            if name not in tiny:
                raise Failure(f"{name}: it was not refused")
            continuations([Prompt(tuple(output.prompt_token_ids))], [output])
            continue
        slowest = max(slowest, time.perf_counter() - started)
        if slowest > SECOND:
            raise Failure(f"{name}: it took {slowest:.1f} s to refuse it", slowest, SECOND)
    model, log = llm._front.engine.model, logging.getLogger("modelport.engine.runner")
    model.embed_media = _fails
    log.disabled = True  # it would tell of what is done on purpose
    try:
        for modality, here in _places(llm).items():
            seen = _prompt([5, here, 7], {modality: noise(llm._front.media.processor)[modality][0]})
            lost, other = llm.generate([seen, TEXT], GREEDY, use_tqdm=False)
            if lost.outputs[0].finish_reason != "error":
                raise Failure(f"{modality}: `embed_media` failed, and the request ended as if it had not")
            farthest([before], [other])
    finally:
        del model.embed_media
        log.disabled = False
    return Measured(slowest, SECOND, f"seconds for the slowest of {len(wrong)}")


def _fails(modality: str, items: list[Any]) -> list[Tensor]:
    raise RuntimeError("no rows are made, on purpose")


def _wrong(llm: LLM) -> dict[str, dict[str, Any]]:
    """Prompts that must be refused."""
    reader, places = llm._front.media, _places(llm)
    processor, items, found = reader.processor, noise(reader.processor), {}
    for modality, here in places.items():
        most, item = reader.most[modality], items[modality][0]

        def add(name: str, given: Any, ids: Sequence[int] = (5, here, 7), modality: str = modality) -> None:
            found[f"{modality}, {name}"] = _prompt(list(ids), {modality: given})

        add("none for a placeholder", [])
        add("one for two placeholders", [item], [5, here, 7, here])
        if most > 1:
            add("two for one placeholder", [item, item])
        add("a thousand", [item] * 1000, [here] * 1000)
        add("a text", b"This is no picture, no film and no sound.\n" * 9)
        add("no bytes", b"")
        add("a file that is not there", "/nowhere/at/all")
        add("another type", [object()])
        width = reader.width
        add("rows of another width", torch.ones(4, width + 1))
        add("rows that are no numbers", torch.full((4, width), torch.nan))
        add("no rows", torch.ones(0, width))
        if modality not in processor.embeddable:
            add("rows, which it does not take", torch.ones(4, width))
    import numpy as np

    if "image" in places:
        here = places["image"]
        found["image, 20,000 x 20,000"] = _prompt([5, here, 7], {"image": _bomb()})
        found["image, cut off"] = _prompt([5, here, 7], {"image": _bomb(8, 8)})
    if "video" in places:
        here = places["video"]
        found["video, damaged"] = _prompt([5, here, 7], {"video": b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 8})
        found["video, no frames"] = _prompt([5, here, 7], {"video": np.zeros((0, 8, 8, 3), np.uint8)})
    if "audio" in places:
        found["audio, no samples"] = _prompt([5, places["audio"], 7], {"audio": np.zeros(0, np.float32)})
    for modality in MODALITIES:
        if modality not in places:
            found[f"{modality}, which it does not take"] = _prompt([5, 6], {modality: b"x"})
    return found


def _tiny(llm: LLM) -> dict[str, dict[str, Any]]:
    """Prompts with the smallest media, which a model takes or refuses."""
    import numpy as np

    dot, line = np.zeros((1, 1, 3), np.uint8), np.zeros((1, 300, 3), np.uint8)
    found = {
        "image, 1 x 1": ("image", dot),
        "image, 300 x 1": ("image", line),
        "image, 1 x 300": ("image", line.transpose(1, 0, 2).copy()),
        "video, one frame of 1 x 1": ("video", dot[None]),
        "audio, one sample": ("audio", np.zeros(1, np.float32)),
    }
    places = _places(llm)
    return {name: _prompt([5, places[m], 7], {m: given}) for name, (m, given) in found.items() if m in places}


def _bomb(width: int = 20_000, height: int = 20_000) -> bytes:
    """A PNG with nothing behind its header."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def _inputs(subject: Subject) -> type[InputProcessor]:
    needs(subject.architecture.inputs is not None, "the model takes text only")
    return subject.architecture.inputs


def _places(llm: LLM) -> dict[str, int]:
    processor = llm._front.media.processor
    return {modality: processor.placeholder_id(modality) for modality in processor.modalities}


def _prompt(ids: list[int], media: dict[str, Any]) -> dict[str, Any]:
    return {"prompt_token_ids": ids, "multi_modal_data": media}


@torch.inference_mode()
def _rows(llm: LLM, modality: str, given: Any) -> dict[str, Any]:
    """What a caller gives who has encoded an item."""
    media, engine = llm._front.media, llm._front.engine
    (item,) = media.read({modality: [given]})[modality]
    tensors = {name: tensor.to(engine.runner.device) for name, tensor in item.tensors.items()}
    (rows,) = engine.model.embed_media(modality, [tensors])
    return {f"{modality}_embeds": rows.cpu().clone(), **media.processor.beside_rows(item)}


def _alone(llm: LLM, prompt: dict[str, Any]) -> Continuation:
    """One prompt with the logits that its tokens were chosen from; those before them, which nobody asked for, are 0."""
    caught: list[Tensor] = []
    runner = llm._front.engine.runner
    runner.on_logits = lambda logits: caught.append(logits.float().cpu().clone())
    try:
        outputs = llm.generate([prompt], GREEDY, use_tqdm=False)
    finally:
        runner.on_logits = None
    (found,) = continuations([Prompt(tuple(outputs[0].prompt_token_ids))], outputs)
    steps = torch.cat(caught)
    return replace(found, logits=torch.cat([steps.new_zeros(len(found.prompt) - 1, steps.shape[1]), steps]))


@contextmanager
def _counted(llm: LLM) -> Iterator[tuple[LLM, list[int]]]:
    """An engine whose calls of `embed_media` leave how many items each had."""
    model, calls = llm._front.engine.model, []
    encode = model.embed_media

    def counted(modality: str, items: list[Any]) -> list[Tensor]:
        calls.extend([1] * len(items))
        return encode(modality, items)

    model.embed_media = counted
    try:
        yield llm, calls
    finally:
        del model.embed_media
