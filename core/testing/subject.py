"""One checkpoint under test: its files, its engines, what its reference says, and how two runs are compared.

Decisions: one reference and one folder serve all checks, engines are cheap and made anew for each; every prompt's
continuation, with the logits at every position, is computed once, alone and uncut, and all other runs are held
against that.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelport.config import EngineConfig
from modelport.frontend import Frontend, engine_config
from modelport.llm import LLM
from modelport.loading.checkpoint import read_config, resolve
from modelport.loading.model import Description, build, build_empty, describe, text_config
from modelport.modeling.cache import CacheSpec
from modelport.plugin import Architecture, Plugins
from modelport.request import LoRARequest, RequestOutput
from modelport.sampling_params import SamplingParams
from modelport.testing.prompts import TOKENS, Prompt, make_prompts
from modelport.testing.reference import LOGITS_LIMIT, LOWEST, GoldenReference, ModuleReference
from modelport.testing.registry import Failure, Skip
from modelport.testing.report import NOT_APPLICABLE

ROOM = 512  # longest prompt and its continuation that a check runs
GREEDY = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=0)


@dataclass(frozen=True)
class Continuation:
    """A prompt and how it went on.

    :ivar token_ids: what was generated.
    :ivar logprobs: (generated,) float32, the log-probability of each generated token when it was chosen.
    :ivar logits: (prompt + generated - 1, vocab_size) float32 at every position; None when not caught.
    """

    prompt: Prompt
    token_ids: list[int]
    logprobs: Tensor
    logits: Tensor | None = None

    @property
    def steps(self) -> Tensor:
        """(generated, vocab_size): the logits that each generated token was chosen from."""
        assert self.logits is not None
        return self.logits[len(self.prompt) - 1 :]


class Subject:
    """An instance of an architecture as files.

    :param folder: `config.json` and weights; without weights when there is no reference: they are then made up.
    :param scratch: an empty folder for changed copies.
    :param plugins: loaded once for all engines, since there may be many of them.
    :param module: dotted name of the architecture's own plugin module.
    """

    def __init__(
        self,
        architecture: Architecture,
        plugins: Plugins,
        module: str,
        folder: Path,
        scratch: Path,
        reference: ModuleReference | GoldenReference | None,
        device: str,
    ):
        self.architecture, self.plugins, self.module = architecture, plugins, module
        self.folder, self.scratch, self.reference, self.device = folder, scratch, reference, device
        self._made: dict[str, Any] = {}
        self.raw_config: dict[str, Any] = read_config(resolve(str(folder), None, plugins), plugins)
        self.config = text_config(architecture, self.raw_config, plugins)

    # Files

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint's tensors by name.

        :raises Skip: there are no files, because there is no reference.
        """
        from safetensors.torch import load_file

        files = sorted(self.folder.glob("*.safetensors"))
        files = [file for file in files if not file.name.startswith("golden")]
        if not files:
            raise Skip(f"{NOT_APPLICABLE}without a reference the names of a checkpoint's tensors are not known")
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    def write(
        self, name: str, tensors: Mapping[str, Tensor] | None = None, config: Mapping[str, Any] | None = None
    ) -> Path:
        """A copy of the checkpoint with other tensors or another `config.json`."""
        from safetensors.torch import save_file

        folder = self.scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file in self.folder.glob("*.json"):  # how media are prepared, and the like
            if not file.name.endswith(".index.json"):
                shutil.copy(file, folder)
        (folder / "config.json").write_text(json.dumps(self.raw_config if config is None else dict(config)))
        chosen = self.tensors if tensors is None else tensors
        save_file({k: v.contiguous() for k, v in chosen.items()}, folder / "model.safetensors", {"format": "pt"})
        return folder

    # The model

    def build(self, folder: Path | None = None) -> nn.Module:
        """The loaded model, without an engine around it."""
        settings = EngineConfig(model=str(folder or self.folder), **self._settings)
        return build(self._about(settings), self.plugins, settings, self.max_model_len, progress=False)

    def _about(self, settings: EngineConfig) -> Description:
        checkpoint = resolve(settings.model, None, self.plugins)
        return describe(checkpoint, read_config(checkpoint, self.plugins), self.plugins, settings)

    @cached_property
    def about(self) -> Description:
        """What is known of the model before its weights are read."""
        return self._about(EngineConfig(model=str(self.folder), **self._settings))

    def build_empty(self) -> nn.Module:
        """The model on the meta device."""
        return build_empty(self.about, self.plugins, EngineConfig(model=str(self.folder), **self._settings))

    @cached_property
    def model(self) -> nn.Module:
        return self.build()

    @cached_property
    def cache_specs(self) -> list[Any]:
        """What the layers keep between steps."""
        specs = (getattr(module, "cache_spec", None) for module in self.model.modules())
        return [spec for spec in specs if spec is not None]

    @property
    def is_paged(self) -> bool:
        """Whether it keeps pages of keys and values, so that requests can run out of them."""
        return any(isinstance(spec, CacheSpec) for spec in self.cache_specs)

    @property
    def shares_prefixes(self) -> bool:
        """Whether such pages are all that it keeps, and depend on nothing but the tokens before."""
        return self.is_paged and all(isinstance(spec, CacheSpec) for spec in self.cache_specs) and not self.has_encoder

    @property
    def has_encoder(self) -> bool:
        """Whether a part of those pages holds an encoder's keys."""
        return hasattr(self.architecture.model_class(), "encode")

    @cached_property
    def windows(self) -> list[int]:
        """Sizes of the sliding windows that a prompt of a check can reach beyond."""
        sizes = {spec.window for spec in self.cache_specs if isinstance(spec, CacheSpec)}
        return sorted(size for size in sizes if 0 < size < self._longest)

    # Prompts and engines

    @property
    def max_model_len(self) -> int:
        return min(self.config.max_position_embeddings, ROOM)

    @property
    def _longest(self) -> int:
        return self.max_model_len - TOKENS - 1

    @cached_property
    def prompts(self) -> list[Prompt]:
        start = None
        if self.has_encoder:
            entries = self.config.model_dump()
            start = next(
                (entries[k] for k in ("decoder_start_token_id", "bos_token_id") if entries.get(k) is not None), None
            )
        media = self.llm()._front.media if self.architecture.inputs else None
        held = {media.processor.placeholder_id(modality) for modality in media.processor.modalities} if media else ()
        return make_prompts(self.config.vocab_size, self.windows, self._longest, self.has_encoder, start, held)

    @property
    def _settings(self) -> dict[str, Any]:
        made_up = not list(self.folder.glob("*.safetensors"))
        return {"dtype": "float32", "device": self.device} | ({"load_format": "dummy"} if made_up else {})

    def llm(self, folder: Path | None = None, **settings: Any) -> LLM:
        """An engine; without prefix caching and with room for whole prompts, unless `settings` say otherwise."""
        given = {
            "skip_tokenizer_init": True,
            "max_model_len": self.max_model_len,
            "max_num_batched_tokens": ROOM,
            "max_num_seqs": 16,
            "enable_prefix_caching": False,
            **self._settings,
            **settings,
        }
        return LLM.over(Frontend(engine_config(str(folder or self.folder), given), plugins=self.plugins))

    def together(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams = GREEDY,
        llm: LLM | None = None,
        adapters: Sequence[LoRARequest | None] | None = None,
        **settings: Any,
    ) -> list[RequestOutput]:
        """Run prompts in one batch.

        :param adapters: of each prompt.
        """
        llm = llm or self.llm(**settings)
        given = [prompt.for_engine() for prompt in prompts]
        return llm.generate(given, params, use_tqdm=False, lora_request=adapters)

    def alone(
        self,
        prompts: Sequence[Prompt],
        tokens: int = TOKENS,
        folder: Path | None = None,
        adapter: LoRARequest | None = None,
        **settings: Any,
    ) -> list[Continuation]:
        """Run prompts one after the other, and catch the logits at every position.

        :param adapter: of all of them.
        """
        llm = self.llm(folder, **settings)
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=0, prompt_logprobs=0)
        caught: list[Tensor] = []
        # a lone prompt that wants the log-probabilities of its tokens has every position's logits computed, in order
        runner = llm._front.engine.runner
        runner.on_logits = lambda logits: caught.append(logits.float().cpu().clone())
        made = []
        try:
            for prompt in prompts:
                caught.clear()
                (found,) = continuations([prompt], self.together([prompt], params, llm, [adapter]))
                logits = torch.cat(caught)
                assert len(logits) == len(prompt) + len(found.token_ids) - 1, (logits.shape, len(prompt))
                made.append(replace(found, logits=logits))
        finally:
            runner.on_logits = None
        return made

    @property
    def baseline(self) -> list[Continuation]:
        """Every prompt alone and uncut.

        :raises Skip: that has failed before; why, only the first check that asks is told.
        """
        return self.once("baseline", lambda: self.alone(self.prompts))

    @cached_property
    def golden_run(self) -> list[Continuation]:
        """The prompts that a golden folder records."""
        assert isinstance(self.reference, GoldenReference)
        return self.alone(self.reference.prompts)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What several checks share: made by the first that asks.

        :raises Skip: it could not be made, which the first that asked was told as an error.
        """
        if name not in self._made:
            self._made[name] = None
            self._made[name] = make()
        if self._made[name] is None:
            raise Skip("not run: what it compares with could not be made; an earlier check says why")
        return self._made[name]

    def hold(self, outputs: Sequence[RequestOutput], prompts: Sequence[Prompt] | None = None) -> float:
        """Compare a batch's outputs with the baseline; the worst difference.

        :raises Failure: a token differs that was not a tie.
        """
        known = {c.prompt: c for c in self.baseline}
        found = continuations(prompts or self.prompts, outputs)
        return max(difference(known[c.prompt], c) for c in found)


def engine_model(llm: LLM) -> nn.Module:
    """The model inside an engine, every step of which is run: recordings of steps would pass by its hooks."""
    engine = llm._front.engine
    engine.runner.recorder = engine.runner.prompts = None
    return engine.model


def continuations(prompts: Sequence[Prompt], outputs: Sequence[RequestOutput]) -> list[Continuation]:
    """:raises Failure: a request ended with an error."""
    made = []
    for prompt, output in zip(prompts, outputs, strict=True):
        completion = output.outputs[0]
        if completion.finish_reason != "length":
            raise Failure(
                f"the prompt of {len(prompt)} tokens ended after {len(completion.token_ids)} more, with "
                f"{completion.finish_reason!r}: {completion.stop_reason}"
            )
        ids = list(completion.token_ids)
        logprobs = [entry[token].logprob for entry, token in zip(completion.logprobs or [], ids, strict=True)]
        made.append(Continuation(prompt, ids, torch.tensor(logprobs)))
    return made


def difference(base: Continuation, other: Continuation) -> float:
    """The largest difference between two runs of one prompt, relative to the largest logit; of log-probabilities, what
    goes beyond their own rounding.

    Where both choose among tokens that rounding cannot tell apart they may part; what follows is not compared.

    :raises Failure: the tokens differ where it was no tie.
    """
    scale = magnitude(base.logits)
    until = len(base.token_ids)
    for step, (wanted, found) in enumerate(zip(base.token_ids, other.token_ids, strict=True)):
        if wanted != found:
            gap = float(base.steps[step, wanted] - base.steps[step, found]) / scale
            if gap > 2 * LOGITS_LIMIT:
                raise Failure(
                    f"after a prompt of {len(base.prompt)} tokens, token {step} is {found} instead of {wanted}, whose "
                    f"logit is larger by {gap:.1e} of the largest",
                    gap,
                    2 * LOGITS_LIMIT,
                )
            until = step
            break
    if other.logits is not None:
        rows = len(base.prompt) + until - 1
        return largest(other.logits[:rows] - base.logits[:rows]) / scale
    chosen = torch.tensor(base.token_ids[:until], dtype=torch.int64)
    wanted = base.steps[:until].log_softmax(-1).gather(1, chosen[:, None])[:, 0]
    # A log-probability near -6 has few digits left where the largest logit is a thousandth.
    rounding = torch.finfo(torch.float32).eps * wanted.abs()
    return largest(((other.logprobs[:until] - wanted).abs() - rounding).clamp_min(0.0)) / scale


def magnitude(logits: Tensor) -> float:
    """The largest logit; the lowest float32, which marks entries that are never chosen, says nothing of rounding."""
    return largest(logits[logits != LOWEST])


def largest(x: Tensor) -> float:
    """The largest magnitude, 0 for nothing, infinity when a value is not finite."""
    if x.numel() == 0:
        return 0.0
    found = float(x.abs().max())
    return found if found == found else float("inf")


def needs(condition: object, why: str) -> None:
    """:raises Skip: the check does not apply."""
    if not condition:
        raise Skip(NOT_APPLICABLE + why)
