"""Arctic: in every other layer, experts that read the layer's input stand beside a small dense feed-forward layer."""

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import RopeParameters, TextConfig
from modelport.modeling import Attention, CausalLM, Experts, GatedMLP, QKVLinear, RMSNorm, Rope, Router, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1

NAMES = ("w1", "w3", "w2")


class ArcticConfig(TextConfig):
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096
    rope_parameters: RopeParameters = RopeParameters(rope_theta=1e6)
    sliding_window: int | None = None
    num_local_experts: int = 8
    num_experts_per_tok: int = 1
    moe_layer_frequency: int = 2
    parallel_attn_mlp_res: bool = False

    def is_sparse(self, layer: int) -> bool:
        return (layer + 1) % self.moe_layer_frequency == 0


class SelfAttention(nn.Module):
    def __init__(self, cfg: ArcticConfig):
        super().__init__()
        heads, kv_heads = cfg.num_attention_heads, cfg.num_key_value_heads
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, kv_heads, cfg.head_dim)
        rope = Rope(cfg.head_dim, cfg.rope_parameters)
        self.attn = Attention(heads, kv_heads, cfg.head_dim, rope=rope, window=cfg.sliding_window or 0)
        self.o_proj = RowLinear(heads * cfg.head_dim, cfg.hidden_size)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.o_proj(self.attn(*self.qkv_proj(x), batch), residual)


class SparseMoe(nn.Module):
    def __init__(self, cfg: ArcticConfig):
        super().__init__()
        count, chosen = cfg.num_local_experts, cfg.num_experts_per_tok
        self.gate = Router(cfg.hidden_size, count, chosen, normalize=1 if chosen > 1 else None)
        self.experts = Experts(count, cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act, names=NAMES)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.experts(x, *self.gate(x), residual)


class Dense(nn.Module):
    """The feed-forward layer of a layer without experts; only its names are those of one with."""

    def __init__(self, cfg: ArcticConfig):
        super().__init__()
        self.mlp = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act, names=NAMES)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.mlp(x, residual)


class Block(nn.Module):
    def __init__(self, cfg: ArcticConfig, layer: int):
        super().__init__()
        size, sparse = cfg.hidden_size, cfg.is_sparse(layer)
        self.input_layernorm = RMSNorm(size, cfg.rms_norm_eps)
        self.self_attn = SelfAttention(cfg)
        self.post_attention_layernorm = RMSNorm(size, cfg.rms_norm_eps)
        self.block_sparse_moe = SparseMoe(cfg) if sparse else Dense(cfg)
        self.residual_mlp = None
        if sparse and cfg.parallel_attn_mlp_res:
            self.residual_layernorm = RMSNorm(size, cfg.rms_norm_eps)
            self.residual_mlp = GatedMLP(size, size, cfg.hidden_act, names=NAMES)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        attended = self.self_attn(self.input_layernorm(x), batch, residual=x)
        if self.residual_mlp is None:
            return self.block_sparse_moe(self.post_attention_layernorm(attended), residual=attended)
        dense = self.residual_mlp(self.residual_layernorm(attended), residual=attended)
        return self.block_sparse_moe(self.post_attention_layernorm(x), residual=dense)


class Arctic(CausalLM):
    def __init__(self, cfg: ArcticConfig):
        super().__init__(cfg, Block, RMSNorm(cfg.hidden_size, cfg.rms_norm_eps))


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "num_experts_per_tok": 2,
        "moe_layer_frequency": 1,
    }
    return [
        Architecture(
            "ArcticForCausalLM",
            Arctic,
            ArcticConfig,
            ignore=("*.rotary_emb.inv_freq",),
            # With experts in every layer and nothing beside them it is Mixtral; recorded outputs show the rest.
            reference="transformers:MixtralForCausalLM",
            tiny=tiny,
            variants={
                "tied": {"tie_word_embeddings": True},
                "own_kv_heads": {"num_key_value_heads": 4},
                "windowed": {"sliding_window": 24},
            },
        )
    ]
