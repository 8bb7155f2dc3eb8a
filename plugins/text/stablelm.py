"""StableLM (3B, 2, Zephyr): LayerNorm around a gated MLP, a quarter of each head rotated; 12B in parallel with qk norm.

Every head has a norm of its own there, stored as one tensor per head.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import RopeParameters, TextConfig
from modelport.modeling import Attention, CausalLM, GatedMLP, LayerNorm, QKVLinear, Rope, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class StableLmConfig(TextConfig):
    aliases = {"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"}
    max_position_embeddings: int = 4096
    layer_norm_eps: float = 1e-5
    rope_parameters: RopeParameters = RopeParameters(partial_rotary_factor=0.25)
    use_qkv_bias: bool = False
    qk_layernorm: bool = False
    use_parallel_residual: bool = False


class SelfAttention(nn.Module):
    def __init__(self, cfg: StableLmConfig):
        super().__init__()
        heads, kv_heads, size = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim

        def norm(count: int) -> nn.Module:
            return LayerNorm((count, size), cfg.layer_norm_eps, bias=False) if cfg.qk_layernorm else nn.Identity()

        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, size, cfg.use_qkv_bias)
        self.q_layernorm, self.k_layernorm = norm(heads), norm(kv_heads)
        self.attn = Attention(heads, kv_heads, size, rope=Rope(size, cfg.rope_parameters))
        self.o_proj = RowLinear(cfg.hidden_size, cfg.hidden_size)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x)
        return self.o_proj(self.attn(self.q_layernorm(q), self.k_layernorm(k), v, batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: StableLmConfig, layer: int):
        super().__init__()
        self.input_layernorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.self_attn = SelfAttention(cfg)
        one = cfg.use_parallel_residual  # norm for both
        self.post_attention_layernorm = None if one else LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.mlp = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        normed = self.input_layernorm(x)
        after = self.self_attn(normed, batch, residual=x)
        second = self.post_attention_layernorm
        return self.mlp(normed if second is None else second(after), residual=after)


class StableLm(CausalLM):
    def __init__(self, cfg: StableLmConfig):
        super().__init__(cfg, Block, LayerNorm(cfg.hidden_size, cfg.layer_norm_eps))


def stack_norms(weights: Iterable[tuple[str, Tensor]], cfg: StableLmConfig) -> Iterator[tuple[str, Tensor]]:
    """`q_layernorm.norms.{head}.weight` (head_dim,) of all heads -> `q_layernorm.weight` (heads, head_dim)."""
    waiting: dict[str, dict[int, Tensor]] = {}
    for name, tensor in weights:
        stem, found, rest = name.partition("norms.")
        if not found:
            yield name, tensor
            continue
        heads = waiting.setdefault(stem, {})
        heads[int(rest.removesuffix(".weight"))] = tensor
        if len(heads) == (cfg.num_attention_heads if stem.endswith("q_layernorm.") else cfg.num_key_value_heads):
            yield f"{stem}weight", torch.stack([heads[i] for i in range(len(heads))])
            del waiting[stem]
    for stem, heads in waiting.items():  # too few: let the loader say what it does not know
        yield from ((f"{stem}norms.{i}.weight", tensor) for i, tensor in heads.items())


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 96,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "partial_rotary_factor": 0.25,
    }
    variants = {
        "1.6b": {"use_qkv_bias": True, "partial_rotary_factor": 0.5, "rope_theta": 500.0},
        "12b": {"use_parallel_residual": True, "qk_layernorm": True, "num_key_value_heads": 2},
        "qk-norm": {"qk_layernorm": True, "layer_norm_eps": 1e-3, "tie_word_embeddings": True},
    }
    names = "StableLmForCausalLM", "StableLMEpochForCausalLM"  # the second before transformers had the model
    return [
        Architecture(
            name,
            StableLm,
            StableLmConfig,
            weights=stack_norms,
            ignore=("*.rotary_emb.inv_freq",),
            reference="transformers:StableLmForCausalLM",
            tiny=tiny,
            variants=variants,
        )
        for name in names
    ]
