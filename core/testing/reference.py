"""Tiny random checkpoints made by the transformers class that an architecture names as its reference.

Decisions: the checkpoint is written as files, in the reference's own tensor names, so that the real loader is tested;
norms and biases are random too, since ones and zeros would hide that they are never applied.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from modelport.plugin import Architecture


class TransformersReference:
    """A small random instance of the class behind `architecture.reference`.

    :param overrides: `config.json` entries besides `architecture.tiny`.
    :raises ValueError: the architecture names no transformers class.
    """

    def __init__(self, architecture: Architecture, seed: int = 0, overrides: dict[str, Any] | None = None):
        kind, _, name = (architecture.reference or "").partition(":")
        if kind != "transformers":
            raise ValueError(
                f"{architecture.name} names no transformers class as its reference: {architecture.reference!r}"
            )
        import transformers

        self.architecture = architecture
        model_class = getattr(transformers, name)
        # An end of text that a random model hits would cut the comparison short.
        entries = {**architecture.tiny, **(overrides or {}), "bos_token_id": 1, "eos_token_id": None}
        config = model_class.config_class(**entries)
        config._attn_implementation = "eager"  # the only one that knows every variant
        self.model = model_class(config).eval()
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            spread = 0.15 if parameter.dim() > 1 else 0.3
            parameter.data.normal_(0.0 if parameter.dim() > 1 else 0.5, spread, generator=generator)

    def save(self, folder: Path, **save_options: Any) -> Path:
        """Write `config.json` and `model.safetensors`, with the architecture's own name."""
        self.model.save_pretrained(folder, **save_options)
        path = folder / "config.json"
        entries = json.loads(path.read_text())
        path.write_text(json.dumps({**entries, "architectures": [self.architecture.name]}, indent=1))
        (folder / "generation_config.json").unlink(missing_ok=True)
        return folder

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """(tokens, vocab_size) float32 for one sequence, computed whole."""
        return self.model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]

    def greedy(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        """Greedy continuation; every step computes the whole sequence again, so that no cache can be wrong."""
        ids = list(token_ids)
        for _ in range(num_tokens):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[len(token_ids) :]
