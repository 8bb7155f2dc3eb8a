"""Gemma: Llama's shape with scaled embeddings, norm weights around zero, a gate of tanh GELU, a tied head."""

from typing import Any

from pydantic import model_validator
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import Attention, CausalLM, GatedMLP, QKVLinear, RMSNorm, Rope, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class GemmaConfig(TextConfig):
    head_dim: int = 256
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    attention_bias: bool = False

    @model_validator(mode="before")
    @classmethod
    def _activation(cls, data: Any) -> Any:
        """The first configs say "gelu" and mean its tanh form, with which all weights were trained.

        Later ones repeat that under `hidden_act` and put the right name beside it, under `hidden_activation`.
        """
        act = data.get("hidden_activation") or data.get("hidden_act")
        return {**data, "hidden_act": "gelu_pytorch_tanh" if act in (None, "gelu") else act}


def norm(cfg: GemmaConfig) -> RMSNorm:
    return RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, offset=1.0)


class SelfAttention(nn.Module):
    def __init__(self, cfg: GemmaConfig):
        super().__init__()
        heads, kv_heads, bias = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.attention_bias
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, cfg.head_dim, bias)
        self.attn = Attention(heads, kv_heads, cfg.head_dim, rope=Rope(cfg.head_dim, cfg.rope_parameters))
        self.o_proj = RowLinear(heads * cfg.head_dim, cfg.hidden_size, bias)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.o_proj(self.attn(*self.qkv_proj(x), batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: GemmaConfig, layer: int):
        super().__init__()
        self.input_layernorm = norm(cfg)
        self.self_attn = SelfAttention(cfg)
        self.post_attention_layernorm = norm(cfg)
        self.mlp = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class Gemma(CausalLM):
    def __init__(self, cfg: GemmaConfig):
        super().__init__(cfg, Block, norm(cfg), embed_scale=cfg.hidden_size**0.5)


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,  # as gemma-2b; gemma-7b has as many as heads
        "head_dim": 32,
        "max_position_embeddings": 512,
    }
    return [
        Architecture(
            "GemmaForCausalLM",
            Gemma,
            GemmaConfig,
            ignore=("*.rotary_emb.inv_freq",),
            reference="transformers:GemmaForCausalLM",
            tiny=tiny,
            model_type="gemma",
            defaults={
                "vocab_size": 256000,
                "hidden_size": 3072,
                "intermediate_size": 24576,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "max_position_embeddings": 8192,
                "eos_token_id": 1,
            },
        )
    ]
