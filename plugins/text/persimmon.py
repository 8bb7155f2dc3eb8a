"""Persimmon: squared ReLU, norms on queries and keys, half of each head rotated, fused projections head by head."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import RopeParameters, TextConfig
from modelport.modeling import MLP, Attention, CausalLM, LayerNorm, QKVLinear, Rope, RowLinear, ungroup_qkv
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class PersimmonConfig(TextConfig):
    hidden_act: str = "relu2"
    max_position_embeddings: int = 16384
    layer_norm_eps: float = 1e-5
    rope_parameters: RopeParameters = RopeParameters(rope_theta=25000.0, partial_rotary_factor=0.5)
    qk_layernorm: bool = True


class SelfAttention(nn.Module):
    def __init__(self, cfg: PersimmonConfig):
        super().__init__()
        heads, size = cfg.num_attention_heads, cfg.head_dim
        self.query_key_value = QKVLinear(cfg.hidden_size, heads, heads, size, bias=True)
        self.q_layernorm = LayerNorm(size, cfg.layer_norm_eps) if cfg.qk_layernorm else nn.Identity()
        self.k_layernorm = LayerNorm(size, cfg.layer_norm_eps) if cfg.qk_layernorm else nn.Identity()
        self.attn = Attention(heads, heads, size, rope=Rope(size, cfg.rope_parameters))
        self.dense = RowLinear(cfg.hidden_size, cfg.hidden_size, bias=True)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        q, k, v = self.query_key_value(x)
        return self.dense(self.attn(self.q_layernorm(q), self.k_layernorm(k), v, batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: PersimmonConfig, layer: int):
        super().__init__()
        size, wide = cfg.hidden_size, cfg.intermediate_size
        self.input_layernorm = LayerNorm(size, cfg.layer_norm_eps)
        self.self_attn = SelfAttention(cfg)
        self.post_attention_layernorm = LayerNorm(size, cfg.layer_norm_eps)
        self.mlp = MLP(size, wide, cfg.hidden_act, bias=True, names=("dense_h_to_4h", "dense_4h_to_h"))

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.self_attn(self.input_layernorm(x), batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x), residual=x)


class Persimmon(CausalLM):
    def __init__(self, cfg: PersimmonConfig):
        super().__init__(cfg, Block, LayerNorm(cfg.hidden_size, cfg.layer_norm_eps))


def ungroup(weights: Iterable[tuple[str, Tensor]], cfg: PersimmonConfig) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        fused = ".query_key_value." in name
        yield name, ungroup_qkv(tensor, cfg.num_attention_heads, cfg.head_dim) if fused else tensor


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        # The released class had this base; transformers 5 lost it. Published configurations name theirs.
        "rope_theta": 25000.0,
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }
    variants = {
        "no-qk-norm": {"qk_layernorm": False, "hidden_act": "gelu"},
        "rotary": {"partial_rotary_factor": 0.25, "rope_theta": 500.0, "layer_norm_eps": 1e-3},
        "tied": {"tie_word_embeddings": True},
    }
    return [
        Architecture(
            "PersimmonForCausalLM",
            Persimmon,
            PersimmonConfig,
            rename={"model.final_layernorm.": "model.norm."},
            weights=ungroup,
            ignore=("*.rotary_emb.inv_freq",),
            reference="transformers:PersimmonForCausalLM",
            tiny=tiny,
            variants=variants,
            model_type="persimmon",
            defaults={
                "vocab_size": 262144,
                "hidden_size": 4096,
                "intermediate_size": 16384,
                "num_hidden_layers": 36,
                "num_attention_heads": 64,
                "max_position_embeddings": 16384,
                "eos_token_id": 2,
            },
        )
    ]
