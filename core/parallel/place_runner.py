"""One place of a divided model: its part with weights and memory, and its part of every step.

Decisions: every place keeps the tables of all requests, so a step sends tensors between places only where the model
needs it; the place that has logits and is first of its stage samples, the others learn the token with the next plan.
Steps are recorded only where there is one place: a recording would pass by the links.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from modelport.config import EngineConfig
from modelport.engine.memory import Limits, Memory, attach_memory, cache_kinds
from modelport.engine.runner import Runner, StepResult
from modelport.engine.scheduler import Plan
from modelport.loading.model import Description, build
from modelport.modeling.rope import Rope, find_by_length
from modelport.parallel.groups import Place
from modelport.parallel.pipeline import keep_stage, run_stage
from modelport.parallel.tensor import Note, divide_layers
from modelport.parallel.vocabulary import divide_vocabulary, is_head_divided
from modelport.plugin import Plugins


class PlaceRunner(Runner):
    """A runner whose model is one place's part.

    :param blocks: numbers of the place's blocks; the other parameters are those of `Runner`.
    """

    def __init__(
        self, model: nn.Module, about: Description, memory: Memory, block_size: int, place: Place, blocks: range,
        by_length: bool,
    ):  # fmt: skip
        super().__init__(
            model, about.text.vocab_size, memory.num_rows, memory.max_model_len, block_size, memory.groups,
            memory.states, about.device, by_length=by_length,
        )  # fmt: skip
        self.place = place
        if place.tp_size * place.pp_size > 1:
            self.recorder = self.prompts = None
        # what takes tokens' places goes into the first stage, what cross attention reads into every one
        self._encodes = self._encodes and (place.is_first or self._crosses)
        self._forward = functools.partial(run_stage, model, blocks, place)
        self._has_logits = place.is_last and is_head_divided(model)

    def step(self, plan: Plan) -> StepResult:
        """As `Runner.step`; the result is empty where this is not the place that samples."""
        return super().step(plan) if self.place.samples else self._follow(plan)

    @torch.inference_mode()
    def _follow(self, plan: Plan) -> StepResult:
        for request in plan.joined:
            self._seat(request)
        self._place_adapters(plan)
        if self._encodes:
            self._encode_media(plan)
        slots, computed, lengths, counts = self._rows(plan)
        self._token_ids[slots, lengths - 1] = [request.token_ids[-1] for request in plan.requests]
        token_ids, batch = self._batch(plan, slots, computed, counts)
        state = self._forward(token_ids, batch)
        if self._has_logits:  # of the rows of which `step` computes them, in the same order
            ends = np.cumsum(counts)
            for index, request in enumerate(plan.requests):
                if request.wants_prompt_logprobs:
                    self._score(request, state, batch, ends[index] - counts[index], counts[index])
            done = np.flatnonzero(computed + counts == lengths)
            if len(done):
                self._logits(state, batch, self._tensor(ends[done] - 1))
        return StepResult([-1] * len(slots))


@dataclass
class Loaded:
    """What a place holds.

    :ivar rope: the one that sorts sequences by length, if there is one.
    :ivar notes: what became of the layers.
    """

    model: nn.Module
    memory: Memory
    runner: PlaceRunner
    rope: Rope | None
    notes: list[Note]


def load_place(
    about: Description, plugins: Plugins, settings: EngineConfig, place: Place, limits: Limits, progress: bool
) -> Loaded:
    """Build this place's part of the model, with its weights and its memory.

    :raises ValueError: the model cannot be divided so; else as `build` and `attach_memory`.
    """
    notes: list[Note] = []
    blocks = range(0)
    kinds: list[tuple[int, bool]] = []

    def divide(model: nn.Module) -> None:
        nonlocal blocks, kinds
        kinds = cache_kinds(model)
        blocks = keep_stage(model, place, about.text.vocab_size, settings.pipeline_blocks)
        notes.extend(divide_layers(model, place, settings.enable_expert_parallel))
        notes.extend(divide_vocabulary(model, place, about.text.vocab_size))

    model = build(about, plugins, settings, limits.max_model_len, progress, divide)
    memory = attach_memory(model, settings, about.dtype, about.device, limits, kinds, place)
    rope = find_by_length(model)
    by_length = not place.least(int(rope is None))
    runner = PlaceRunner(model, about, memory, settings.block_size, place, blocks, by_length)
    return Loaded(model, memory, runner, rope, notes)
