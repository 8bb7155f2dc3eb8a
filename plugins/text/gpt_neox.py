"""GPT-NeoX (Pythia, Dolly, StableLM-alpha): a part of each head rotated, attention and MLP side by side or in turn."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import RopeParameters, TextConfig
from modelport.modeling import MLP, Attention, CausalLM, LayerNorm, QKVLinear, Rope, RowLinear, ungroup_qkv
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class GPTNeoXConfig(TextConfig):
    aliases = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    rope_parameters: RopeParameters = RopeParameters(partial_rotary_factor=0.25)
    use_parallel_residual: bool = True
    attention_bias: bool = True


class SelfAttention(nn.Module):
    def __init__(self, cfg: GPTNeoXConfig):
        super().__init__()
        heads, size, bias = cfg.num_attention_heads, cfg.head_dim, cfg.attention_bias
        self.query_key_value = QKVLinear(cfg.hidden_size, heads, heads, size, bias)
        self.attn = Attention(heads, heads, size, rope=Rope(size, cfg.rope_parameters))
        self.dense = RowLinear(cfg.hidden_size, cfg.hidden_size, bias)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.dense(self.attn(*self.query_key_value(x), batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: GPTNeoXConfig, layer: int):
        super().__init__()
        size, wide = cfg.hidden_size, cfg.intermediate_size
        self.parallel = cfg.use_parallel_residual
        self.input_layernorm = LayerNorm(size, cfg.layer_norm_eps)
        self.post_attention_layernorm = LayerNorm(size, cfg.layer_norm_eps)
        self.attention = SelfAttention(cfg)
        self.mlp = MLP(size, wide, cfg.hidden_act, bias=True, names=("dense_h_to_4h", "dense_4h_to_h"))

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        after = self.attention(self.input_layernorm(x), batch, residual=x)
        return self.mlp(self.post_attention_layernorm(x if self.parallel else after), residual=after)


class GPTNeoX(CausalLM):
    def __init__(self, cfg: GPTNeoXConfig):
        super().__init__(cfg, Block, LayerNorm(cfg.hidden_size, cfg.layer_norm_eps))


def ungroup(weights: Iterable[tuple[str, Tensor]], cfg: GPTNeoXConfig) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        fused = ".query_key_value." in name
        yield name, ungroup_qkv(tensor, cfg.num_attention_heads, cfg.head_dim) if fused else tensor


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 96,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "max_position_embeddings": 512,
    }
    variants = {
        "in-turn": {"use_parallel_residual": False, "rotary_pct": 1.0},  # RedPajama-INCITE
        "base": {"rotary_emb_base": 1000, "rotary_pct": 0.5, "hidden_act": "gelu_fast"},
        "no-bias": {"attention_bias": False, "tie_word_embeddings": True, "layer_norm_eps": 1e-3},
    }
    return [
        Architecture(
            "GPTNeoXForCausalLM",
            GPTNeoX,
            GPTNeoXConfig,
            rename={
                "gpt_neox.embed_in.": "model.embed_tokens.",
                "gpt_neox.layers.": "model.layers.",
                "gpt_neox.final_layer_norm.": "model.norm.",
                "embed_out.": "lm_head.",
            },
            weights=ungroup,
            # stored masks and frequencies
            ignore=("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq"),
            reference="transformers:GPTNeoXForCausalLM",
            tiny=tiny,
            variants=variants,
        )
    ]
