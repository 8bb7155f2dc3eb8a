"""What the messages between an engine and the processes that run its steps say: records for JSON, and tensors.

Decisions: the engine tells what is new, tokens, blocks and who came and went; a worker keeps requests of its own up to
date with it and runs its runner over them, so a `Runner` does not know where its plan comes from. A step of 256 running
requests is a few kilobytes. Tensors of media travel beside the records (`channel.Frame`).
"""

import itertools
from collections import OrderedDict
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from modelport.engine.runner import StepResult
from modelport.engine.sampler import TokenLogprobs
from modelport.engine.scheduler import Plan
from modelport.inputs.processor import MediaItem, PlacedItem
from modelport.modeling.adapters import Adapter, Adapters
from modelport.request import Request
from modelport.sampling_params import SamplingParams

_EMBEDS = "rows that the caller gave"
_MOST_KEPT = 64  # adapters that a worker has ready, whose slot others may have taken


class PlanWriter:
    """The engine's side: plans as messages; it remembers how many blocks of each slot it has told."""

    def __init__(self) -> None:
        self._told: dict[int, list[int]] = {}

    def write(self, plan: Plan) -> tuple[dict[str, Any], dict[str, Tensor]]:
        for request in plan.joined:
            self._told[request.slot] = [0] * len(request.blocks)
        rows = []
        for request, count in zip(plan.requests, plan.counts, strict=True):
            told = self._told[request.slot]
            new = [blocks[known:] for blocks, known in zip(request.blocks, told, strict=True)]
            self._told[request.slot] = [len(blocks) for blocks in request.blocks]
            rows.append([
                request.slot, request.num_computed, count, len(request.token_ids), request.token_ids[-1],
                request.length_class, request.wants_prompt_logprobs, new if any(new) else 0,
            ])  # fmt: skip
        message = {"left": plan.left, "joined": [_request(r) for r in plan.joined], "rows": rows}
        tensors: dict[str, Tensor] = {}
        if plan.encode or plan.forget:
            message["encode"] = [_item(item) for item in plan.encode]
            message["forget"] = [digest.hex() for digest in plan.forget]
            for number, item in enumerate(plan.encode):
                parts = item.tensors if item.embeds is None else {_EMBEDS: item.embeds}
                tensors |= {f"{number}/{name}": tensor for name, tensor in parts.items()}
        return message, tensors


def _request(request: Request) -> dict[str, Any]:
    params = {field.name: getattr(request.params, field.name) for field in fields(SamplingParams)}
    assert not params.pop("logits_processors")
    return {
        "id": request.request_id,
        "slot": request.slot,
        "token_ids": request.token_ids,
        "num_prompt_tokens": request.num_prompt_tokens,
        "params": params | {"logit_bias": list((params["logit_bias"] or {}).items())},
        "seed": request.seed,
        "eos": request.eos_token_ids,
        "bad_words": request.bad_words_ids,
        "forced": list(request.forced_token_ids.items()),
        "encoder_token_ids": request.encoder_token_ids,
        "groups": len(request.blocks),
        "media": [[placed.start, _item(placed.item)] for placed in request.media],
        "spans": request.spans,
        "axes": None if request.axes is None else request.axes.tolist(),
        "adapter": None if request.adapter is None else [str(request.adapter.path), request.adapter.digest.hex()],
        "adapter_slot": request.adapter_slot,
    }


def _item(item: MediaItem) -> dict[str, Any]:
    """What a runner needs to know of an item: which of its tokens take rows, as runs."""
    places = item.row_places
    edges = np.flatnonzero(np.diff(places, prepend=-2, append=places[-1] + 2 if len(places) else 0) != 1)
    runs = [[int(places[a]), int(places[b - 1]) + 1] for a, b in itertools.pairwise(edges)]
    return {
        "modality": item.modality, "digest": item.digest.hex(), "length": len(item.token_ids), "runs": runs,
        "keys": item.num_keys,
    }  # fmt: skip


def _read_item(record: dict[str, Any], tensors: dict[str, Tensor]) -> MediaItem:
    is_row = np.zeros(record["length"], dtype=bool)
    for start, end in record["runs"]:
        is_row[start:end] = True
    embeds = tensors.pop(_EMBEDS, None)
    return MediaItem(
        record["modality"], range(record["length"]), tensors, is_row, embeds=embeds, num_keys=record["keys"],
        digest=bytes.fromhex(record["digest"]),
    )  # fmt: skip


class PlanReader:
    """A worker's side: its requests by slot, and plans over them.

    :param adapters: of the worker's part of the model, if it takes any.
    """

    def __init__(self, adapters: Adapters | None = None) -> None:
        self._requests: dict[int, Request] = {}
        self._adapters = adapters
        self._kept: OrderedDict[str, Adapter] = OrderedDict()  # by digest, least recently used first

    def read(self, message: dict[str, Any], tensors: dict[str, Tensor]) -> Plan:
        joined = [self._made(record) for record in message["joined"]]
        plan = Plan(joined=joined, left=message["left"])
        parts: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            number, _, name = key.partition("/")
            parts.setdefault(int(number), {})[name] = tensor
        plan.encode = [_read_item(r, parts.get(i, {})) for i, r in enumerate(message.get("encode", ()))]
        plan.forget = [bytes.fromhex(digest) for digest in message.get("forget", ())]
        for slot, computed, count, length, token, length_class, scores, new in message["rows"]:
            request = self._requests[slot]
            if len(request.token_ids) < length:
                request.token_ids.append(token)
            assert len(request.token_ids) == length, (request.request_id, len(request.token_ids), length)
            request.num_computed, request.length_class = computed, length_class
            # what matters is only whether there are as many as prompt tokens (`Request.wants_prompt_logprobs`)
            request.prompt_logprobs = [] if scores else [None] * request.num_prompt_tokens
            for blocks, more in zip(request.blocks, new or (), strict=False):
                blocks.extend(more)
            plan.requests.append(request)
            plan.counts.append(count)
        return plan

    def _read(self, path: str, digest: str) -> Adapter:
        """:raises RuntimeError: the files are not those that the engine has read."""
        if digest in self._kept:
            self._kept.move_to_end(digest)
            return self._kept[digest]
        try:
            found = self._adapters.read(Path(path))
        except (OSError, ValueError) as error:
            raise RuntimeError(f"a worker cannot read an adapter that the engine has read: {error}") from None
        if found.digest.hex() != digest:
            raise RuntimeError(f"the adapter {path} is another one for a worker than for the engine; did it change?")
        self._kept[digest] = found
        if len(self._kept) > _MOST_KEPT:
            self._kept.popitem(last=False)
        return found

    def _made(self, record: dict[str, Any]) -> Request:
        params = record["params"]
        bias = dict(params.pop("logit_bias"))
        request = Request(
            record["id"],
            record["token_ids"],
            record["num_prompt_tokens"],
            SamplingParams(**params, logit_bias=bias or None),
            record["seed"],
            tuple(record["eos"]),
            len(record["token_ids"]),
            None,
            tuple(map(tuple, record["bad_words"])),
            forced_token_ids=dict(record["forced"]),
            encoder_token_ids=record["encoder_token_ids"],
            media=tuple(PlacedItem(start, _read_item(item, {})) for start, item in record["media"]),
            spans=tuple(map(tuple, record["spans"])),
            axes=None if record["axes"] is None else np.asarray(record["axes"], dtype=np.int32),
            blocks=[[] for _ in range(record["groups"])],
            slot=record["slot"],
            adapter=None if record["adapter"] is None else self._read(*record["adapter"]),
            adapter_slot=record["adapter_slot"],
        )
        self._requests[request.slot] = request
        return request


def write_result(result: StepResult) -> dict[str, Any]:
    """A step's result as a message."""
    return {
        "token_ids": result.token_ids,
        "logprobs": [[index, asdict(found)] for index, found in result.logprobs.items()],
        "prompt_logprobs": [[i, [asdict(found) for found in several]] for i, several in result.prompt_logprobs.items()],
        "errors": list(result.errors.items()),
    }


def read_result(message: dict[str, Any]) -> StepResult:
    """The reverse of `write_result`."""
    return StepResult(
        message["token_ids"],
        {index: TokenLogprobs(**found) for index, found in message["logprobs"]},
        {index: [TokenLogprobs(**found) for found in several] for index, several in message["prompt_logprobs"]},
        dict(message["errors"]),
    )
