"""Architectures that are wrong in one way each: what the conformance kit must find."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.modeling import Attention, Embedding, LearnedPositions
from modelport.plugin import Architecture, load_plugins
from modelport.plugins.text.gpt2 import GPT2
from modelport.plugins.text.llama import TINY, Block, Llama, LlamaConfig, MistralConfig


def altered(name: str = "LlamaForCausalLM", **changes: object) -> Architecture:
    """The record of a sound family with other fields."""
    return replace(load_plugins().find([name]), **changes)


class Skipping(Block):
    """The second norm is loaded and never applied."""

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.mlp(x, residual=x)


class Crosstalk(Block):
    """Rows of one sequence leak into the others of the batch."""

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        x = super().forward(x, batch)
        return x + 0.05 * x.mean(0) if len(batch.seq_lens) > 1 else x


class Coarse(Block):
    """In bfloat16, activations lose four more bits."""

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        x = super().forward(x, batch)
        return x.to(torch.float8_e4m3fn).to(x.dtype) if x.dtype == torch.bfloat16 else x


class Misplaced(Attention):
    """The keys of a prompt's later chunks land one place further."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        is_later_chunk = batch.max_query_len > 1 and int(batch.positions.min()) > 0
        return super().forward(q, k.roll(1, 0) if is_later_chunk else k, v, batch)


class MisplacedBlock(Block):
    def __init__(self, cfg: LlamaConfig, index: int):
        super().__init__(cfg, index)
        self.self_attn.attn.__class__ = Misplaced


def llama_of(block: type[Block]) -> type[nn.Module]:
    """A Llama with another block."""

    class Model(Llama):
        def __init__(self, cfg: LlamaConfig):
            super().__init__(cfg)
            self.model.layers = nn.ModuleList(block(cfg, i) for i in range(cfg.num_hidden_layers))

    return Model


class LatePositions(LearnedPositions):
    """Each token gets the position of the next one."""

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        return x + nn.functional.embedding(batch.positions + 1, self.weight)


class OffByOne(GPT2):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.wpe.__class__ = LatePositions


class WideWindow(MistralConfig):
    @property
    def window(self) -> int:
        return (self.sliding_window or 0) + 1


class TransposedHead(nn.Module):
    """Multiplies by the embedding's weight from the wrong side; square, so that no shape complains."""

    def __init__(self, embedding: Embedding):
        super().__init__()
        self.tied = (embedding,)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.tied[0].weight


class TransposedTie(Llama):
    def __init__(self, cfg: LlamaConfig):
        super().__init__(cfg)
        self.model.embed_tokens.is_shared = False
        self.lm_head = TransposedHead(self.model.embed_tokens)


class Unbiased(LlamaConfig):
    """Believes that no projection has a bias."""

    aliases = {"attention_bias": "not_read"}


class OtherDefault(LlamaConfig):
    rms_norm_eps: float = 0.1


class OwnRope(LlamaConfig):
    """Reads the base of the rotary embedding past the common form."""

    rope_theta: float = 1.0


class Strict(LlamaConfig):
    model_config = {"extra": "forbid"}


def without_biases(weights: Iterable[tuple[str, Tensor]], cfg: object) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in weights if not name.endswith(".bias"))


SQUARE = {**TINY, "vocab_size": TINY["hidden_size"], "tie_word_embeddings": True}


class Constant(nn.Module):
    """A reference that does not look at its input."""

    def __init__(self, entries: dict):
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(entries["vocab_size"]))

    def forward(self, ids: Tensor) -> Tensor:
        return self.logit.expand(*ids.shape, -1)


class Plain(nn.Module):
    """A reference that is no transformers model: it gives a tensor, and has a `state_dict` of its own."""

    def __init__(self, entries: dict):
        super().__init__()
        from transformers import LlamaConfig as Config
        from transformers import LlamaForCausalLM

        self.inner = LlamaForCausalLM(Config(**entries))

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        return self.inner.state_dict(*args, **kwargs)

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids, use_cache=False).logits
