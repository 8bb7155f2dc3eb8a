"""Baichuan: Llama's shape with one attention weight; the small models are rotary, the large ones have linear biases.

Which it is no published key says. The authors' configurations differ in one: rotary models have
`max_position_embeddings`, the others only `model_max_length`. Of the second generation the head's rows have length one
(NormHead), which only the vocabulary tells: the first generation's has 64000 entries.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import model_validator
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import Alibi, Attention, CausalLM, GatedMLP, QKVLinear, RMSNorm, Rope, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1

FIRST_VOCABULARY, SECOND_VOCABULARY = 64000, 125696


class BaichuanConfig(TextConfig):
    aliases = {"model_max_length": "max_position_embeddings"}
    max_position_embeddings: int = 4096
    alibi: bool = False

    @model_validator(mode="before")
    @classmethod
    def _positions(cls, data: Any) -> Any:
        return {"alibi": data.get("max_position_embeddings") is None, **data}

    @property
    def has_norm_head(self) -> bool:
        return self.vocab_size != FIRST_VOCABULARY


class BaiChuanConfig(TextConfig):
    """The spelling of the very first model, which is rotary whatever its configuration says."""

    max_position_embeddings: int = 4096

    @property
    def alibi(self) -> bool:
        return False

    @property
    def has_norm_head(self) -> bool:
        return self.vocab_size == SECOND_VOCABULARY


Config = BaichuanConfig | BaiChuanConfig


class SelfAttention(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        heads, size = cfg.num_attention_heads, cfg.head_dim
        self.W_pack = QKVLinear(cfg.hidden_size, heads, heads, size)
        positions = {"alibi": Alibi(heads)} if cfg.alibi else {"rope": Rope(size, cfg.rope_parameters)}
        self.attn = Attention(heads, heads, size, **positions)
        self.o_proj = RowLinear(heads * size, cfg.hidden_size)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.o_proj(self.attn(*self.W_pack(x), batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = SelfAttention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class Baichuan(CausalLM):
    def __init__(self, cfg: Config):
        super().__init__(cfg, Block, RMSNorm(cfg.hidden_size, cfg.rms_norm_eps))


def normalised_head(weights: Iterable[tuple[str, Tensor]], cfg: Config) -> Iterator[tuple[str, Tensor]]:
    """NormHead divides by the rows' lengths in every step; once is enough. Files hold the rows as they were trained."""
    for name, tensor in weights:
        if name == "lm_head.weight" and cfg.has_norm_head:
            tensor = nn.functional.normalize(tensor.float())
        yield name, tensor


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 80,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "model_max_length": 512,
    }
    return [
        Architecture(name, Baichuan, config, weights=normalised_head, ignore=("*.rotary_emb.inv_freq",), tiny=tiny)
        for name, config in (("BaiChuanForCausalLM", BaiChuanConfig), ("BaichuanForCausalLM", BaichuanConfig))
    ]
