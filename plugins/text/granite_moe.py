"""GraniteMoe: Granite and its four factors, with experts for a feed-forward layer."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import Attention, CausalLM, Experts, QKVLinear, RMSNorm, Rope, Router, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class GraniteMoeConfig(TextConfig):
    attention_bias: bool = False
    embedding_multiplier: float = 1.0
    attention_multiplier: float = 1.0  # in place of 1 / sqrt(head_dim)
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    num_local_experts: int = 8
    num_experts_per_tok: int = 2


class SelfAttention(nn.Module):
    def __init__(self, cfg: GraniteMoeConfig):
        super().__init__()
        heads, kv_heads, bias = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.attention_bias
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, cfg.head_dim, bias)
        rope = Rope(cfg.head_dim, cfg.rope_parameters)
        self.attn = Attention(heads, kv_heads, cfg.head_dim, rope=rope, scale=cfg.attention_multiplier)
        self.o_proj = RowLinear(heads * cfg.head_dim, cfg.hidden_size, bias)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        return self.o_proj(self.attn(*self.qkv_proj(x), batch))


class SparseMoe(nn.Module):
    def __init__(self, cfg: GraniteMoeConfig):
        super().__init__()
        self.router = Router(cfg.hidden_size, cfg.num_local_experts, cfg.num_experts_per_tok, normalize=1)
        self.experts = Experts(cfg.num_local_experts, cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, *self.router(x))


class Block(nn.Module):
    def __init__(self, cfg: GraniteMoeConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = SelfAttention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.block_sparse_moe = SparseMoe(cfg)
        self.multiplier = cfg.residual_multiplier

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = x.add(self.self_attn(self.input_layernorm(x), batch), alpha=self.multiplier)
        return x.add(self.block_sparse_moe(self.post_attention_layernorm(x)), alpha=self.multiplier)


class GraniteMoe(CausalLM):
    def __init__(self, cfg: GraniteMoeConfig):
        norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        scales = {"embed_scale": cfg.embedding_multiplier, "logit_scale": 1 / cfg.logits_scaling}
        super().__init__(cfg, Block, norm, **scales)


PUBLISHED = {
    "router.layer.weight": "router.weight",
    "input_linear.weight": "experts.gate_up_proj",
    "output_linear.weight": "experts.down_proj",
}


def published_names(weights: Iterable[tuple[str, Tensor]], cfg: GraniteMoeConfig) -> Iterator[tuple[str, Tensor]]:
    """All experts lie in one tensor, gate before up; transformers 5 can write it under names of its own."""
    for name, tensor in weights:
        path, found, last = name.partition(".block_sparse_moe.")
        yield path + found + PUBLISHED.get(last, last), tensor


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.7,
        "logits_scaling": 6.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 5,
    }
    variants = {
        "own_head": {"tie_word_embeddings": False, "attention_bias": True, "num_key_value_heads": 4},
        "powermoe": {"logits_scaling": 1.0, "embedding_multiplier": 1.0, "num_experts_per_tok": 8},
    }
    return [
        Architecture(
            "GraniteMoeForCausalLM",
            GraniteMoe,
            GraniteMoeConfig,
            weights=published_names,
            reference="transformers:GraniteMoeForCausalLM",
            tiny=tiny,
            variants=variants,
        )
    ]
