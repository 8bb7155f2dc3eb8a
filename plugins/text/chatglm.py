"""ChatGLM (2, 3) and the first GLM-4: half of each head rotated in neighbouring pairs, fused weights, few key heads.

The long ChatGLM2 gives `rope_ratio` another meaning than its successors: it squeezes positions instead of raising the
base. Nothing but its name in the configuration tells it apart.
"""

from typing import Any

from pydantic import model_validator
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import Attention, CausalLM, Gated, LayerNorm, MergedLinear, QKVLinear, RMSNorm, Rope, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class ChatGLMConfig(TextConfig):
    aliases = {
        "num_layers": "num_hidden_layers",
        "padded_vocab_size": "vocab_size",
        "ffn_hidden_size": "intermediate_size",
        "kv_channels": "head_dim",
        "layernorm_epsilon": "rms_norm_eps",
        "seq_length": "max_position_embeddings",
    }
    rms_norm_eps: float = 1e-5
    rmsnorm: bool = True
    original_rope: bool = True
    multi_query_attention: bool = False
    multi_query_group_num: int = 1
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    apply_residual_connection_post_layernorm: bool = False
    post_layer_norm: bool = True

    @model_validator(mode="before")
    @classmethod
    def _rotary(cls, data: Any) -> Any:
        ratio = float(data.get("rope_ratio") or 1.0)
        rope: dict[str, Any] = {"rope_theta": 10000.0 * ratio}
        if ratio != 1.0 and "chatglm2" in (data.get("_name_or_path") or "").lower():
            rope = {"rope_type": "linear", "factor": ratio}
        return {"rope_parameters": {"partial_rotary_factor": 0.5, **rope}, **data}

    @property
    def kv_heads(self) -> int:
        return self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads


def norm(cfg: ChatGLMConfig) -> nn.Module:
    return (RMSNorm if cfg.rmsnorm else LayerNorm)(cfg.hidden_size, cfg.rms_norm_eps)


class SelfAttention(nn.Module):
    def __init__(self, cfg: ChatGLMConfig):
        super().__init__()
        heads, kv_heads, size, bias = cfg.num_attention_heads, cfg.kv_heads, cfg.head_dim, cfg.add_bias_linear
        self.query_key_value = QKVLinear(cfg.hidden_size, heads, kv_heads, size, cfg.add_qkv_bias or bias)
        rope = Rope(size, cfg.rope_parameters, interleaved=cfg.original_rope)
        self.attn = Attention(heads, kv_heads, size, rope=rope)
        self.dense = RowLinear(heads * size, cfg.hidden_size, bias)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.dense(self.attn(*self.query_key_value(x), batch), residual)


class MLP(nn.Module):
    def __init__(self, cfg: ChatGLMConfig):
        super().__init__()
        size, wide, bias = cfg.hidden_size, cfg.intermediate_size, cfg.add_bias_linear
        self.dense_h_to_4h = MergedLinear(size, (wide, wide), ("gate_proj", "up_proj"), bias)  # stored as one
        self.act = Gated("silu")
        self.dense_4h_to_h = RowLinear(wide, size, bias)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.dense_4h_to_h(self.act(self.dense_h_to_4h(x)), residual)


class Block(nn.Module):
    def __init__(self, cfg: ChatGLMConfig, layer: int):
        super().__init__()
        self.residual_is_normed = cfg.apply_residual_connection_post_layernorm
        self.input_layernorm = norm(cfg)
        self.self_attention = SelfAttention(cfg)
        self.post_attention_layernorm = norm(cfg)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        normed = self.input_layernorm(x)
        x = self.self_attention(normed, batch, residual=normed if self.residual_is_normed else x)
        normed = self.post_attention_layernorm(x)
        return self.mlp(normed, residual=normed if self.residual_is_normed else x)


class ChatGLM(CausalLM):
    def __init__(self, cfg: ChatGLMConfig):
        super().__init__(cfg, Block, norm(cfg) if cfg.post_layer_norm else nn.Identity())


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "padded_vocab_size": 320,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_layers": 3,
        "num_attention_heads": 4,
        "kv_channels": 16,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "add_qkv_bias": True,
        "seq_length": 512,
    }
    rename = {
        "transformer.embedding.word_embeddings.": "model.embed_tokens.",
        "transformer.encoder.layers.": "model.layers.",
        "transformer.encoder.final_layernorm.": "model.norm.",
        "transformer.output_layer.": "lm_head.",
    }
    return [
        Architecture(
            name, ChatGLM, ChatGLMConfig, rename=rename, ignore=("transformer.rotary_pos_emb.inv_freq",), tiny=tiny
        )
        for name in ("ChatGLMModel", "ChatGLMForConditionalGeneration")
    ]
