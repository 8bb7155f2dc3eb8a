"""Mixtral: Mistral's shape with eight experts for a feed-forward layer, two of which serve a token."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import RopeParameters, TextConfig
from modelport.modeling import Attention, CausalLM, Experts, QKVLinear, RMSNorm, Rope, Router, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class MixtralConfig(TextConfig):
    max_position_embeddings: int = 131072
    rope_parameters: RopeParameters = RopeParameters(rope_theta=1e6)
    rms_norm_eps: float = 1e-5
    rope_parameters: RopeParameters = RopeParameters(rope_theta=1e6)
    sliding_window: int | None = None
    num_experts_per_tok: int = 2
    num_local_experts: int = 8


class SelfAttention(nn.Module):
    def __init__(self, cfg: MixtralConfig):
        super().__init__()
        heads, kv_heads = cfg.num_attention_heads, cfg.num_key_value_heads
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, cfg.head_dim)
        rope = Rope(cfg.head_dim, cfg.rope_parameters)
        self.attn = Attention(heads, kv_heads, cfg.head_dim, rope=rope, window=cfg.sliding_window or 0)
        self.o_proj = RowLinear(heads * cfg.head_dim, cfg.hidden_size)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.o_proj(self.attn(*self.qkv_proj(x), batch), residual)


class SparseMoe(nn.Module):
    def __init__(self, cfg: MixtralConfig):
        super().__init__()
        count, names = cfg.num_local_experts, ("w1", "w3", "w2")
        self.gate = Router(cfg.hidden_size, count, cfg.num_experts_per_tok, normalize=1)
        self.experts = Experts(count, cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act, names=names)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.experts(x, *self.gate(x), residual)


class Block(nn.Module):
    def __init__(self, cfg: MixtralConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = SelfAttention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.block_sparse_moe = SparseMoe(cfg)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.block_sparse_moe(self.post_attention_layernorm(x), residual=x)


class Mixtral(CausalLM):
    def __init__(self, cfg: MixtralConfig):
        super().__init__(cfg, Block, RMSNorm(cfg.hidden_size, cfg.rms_norm_eps))


def published_names(weights: Iterable[tuple[str, Tensor]], cfg: MixtralConfig) -> Iterator[tuple[str, Tensor]]:
    """transformers 5 can write the layer under its own name, `mlp`, with all experts in one tensor."""
    for name, tensor in weights:
        yield name.replace(".mlp.", ".block_sparse_moe."), tensor


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 6,
        "max_position_embeddings": 512,
        "sliding_window": 24,
    }
    return [
        Architecture(
            "MixtralForCausalLM",
            Mixtral,
            MixtralConfig,
            weights=published_names,
            reference="transformers:MixtralForCausalLM",
            tiny=tiny,
            variants={"whole": {"sliding_window": None}, "one_expert": {"num_experts_per_tok": 1}},
        )
    ]
