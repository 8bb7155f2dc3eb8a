"""A family's variants and published layouts against the reference, through files, loader and engine."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelport import LLM, SamplingParams
from modelport.plugin import load_plugins
from modelport.testing.reference import ModuleReference

Tensors = dict[str, torch.Tensor]
TOKENS = 16


class Checkpoint:
    """A tiny random checkpoint in a folder, with the reference that wrote it; `config` and `tensors` may be edited.

    :param make: makes the reference, in place of what the architecture names; its entries are then the configuration.
    """

    def __init__(self, folder: Path, name: str, overrides: dict[str, Any], make: Callable | None = None):
        self.folder = folder
        architecture = load_plugins().find([name])
        self.reference = ModuleReference(
            replace(architecture, reference=make) if make else architecture, overrides=overrides
        )
        self.save()
        if make:
            self.config = {**self.reference.entries, "architectures": [name]}

    def save(self, **options: Any) -> None:
        self.reference.save(self.folder, **options)
        self.config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        self.tensors: Tensors = load_file(self.folder / "model.safetensors")

    def engine(self) -> LLM:
        (self.folder / "config.json").write_text(json.dumps(self.config))
        save_file({name: t.contiguous() for name, t in self.tensors.items()}, self.folder / "model.safetensors")
        settings = {"dtype": "float32", "max_model_len": 128, "max_num_batched_tokens": 24}
        return LLM(str(self.folder), skip_tokenizer_init=True, **settings)

    def assert_agrees(self) -> None:
        """Log-probabilities of a prompt that is computed in chunks, and the tokens after it, are the reference's."""
        prompt = torch.randint(1, 320, (45,), generator=torch.Generator().manual_seed(3)).tolist()
        params = SamplingParams(temperature=0, max_tokens=TOKENS, prompt_logprobs=0, ignore_eos=True)
        (output,) = self.engine().generate([prompt], params)
        want = self.reference.logits(prompt).log_softmax(-1)
        for position, entry in enumerate(output.prompt_logprobs[1:]):
            token = prompt[position + 1]
            assert math.isclose(entry[token].logprob, float(want[position, token]), abs_tol=2e-5)
        assert list(output.outputs[0].token_ids) == self.greedy(prompt)

    def greedy(self, prompt: list[int]) -> list[int]:
        """The reference's continuation; every step computes the whole sequence again, so that no cache can be wrong."""
        ids = list(prompt)
        for _ in range(TOKENS):
            ids.append(int(self.reference.logits(ids)[-1].argmax()))
        return ids[len(prompt) :]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Checkpoint]:
    """`checkpoint("GemmaForCausalLM", num_key_value_heads=4)`: a checkpoint with other settings than `tiny`."""
    return lambda name, make=None, **overrides: Checkpoint(tmp_path, name, overrides, make)
