"""Bloom: ALiBi, a LayerNorm behind the embedding, biases everywhere, fused projections stored head by head."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import MLP, Alibi, Attention, CausalLM, LayerNorm, QKVLinear, RowLinear, ungroup_qkv
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class BloomConfig(TextConfig):
    aliases = {
        "n_embed": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "seq_length": "max_position_embeddings",
    }
    tie_word_embeddings: bool = True
    layer_norm_epsilon: float = 1e-5
    apply_residual_connection_post_layernorm: bool = False


class SelfAttention(nn.Module):
    def __init__(self, cfg: BloomConfig):
        super().__init__()
        heads = cfg.num_attention_heads
        self.query_key_value = QKVLinear(cfg.hidden_size, heads, heads, cfg.head_dim, bias=True)
        self.attn = Attention(heads, heads, cfg.head_dim, alibi=Alibi(heads))
        self.dense = RowLinear(cfg.hidden_size, cfg.hidden_size, bias=True)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.dense(self.attn(*self.query_key_value(x), batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: BloomConfig, layer: int):
        super().__init__()
        size = cfg.hidden_size
        self.residual_is_normed = cfg.apply_residual_connection_post_layernorm
        self.input_layernorm = LayerNorm(size, cfg.layer_norm_epsilon)
        self.self_attention = SelfAttention(cfg)
        self.post_attention_layernorm = LayerNorm(size, cfg.layer_norm_epsilon)
        self.mlp = MLP(size, 4 * size, "gelu_tanh", bias=True, names=("dense_h_to_4h", "dense_4h_to_h"))

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        normed = self.input_layernorm(x)
        x = self.self_attention(normed, batch, residual=normed if self.residual_is_normed else x)
        normed = self.post_attention_layernorm(x)
        return self.mlp(normed, residual=normed if self.residual_is_normed else x)


class Bloom(CausalLM):
    def __init__(self, cfg: BloomConfig):
        super().__init__(cfg, Block, LayerNorm(cfg.hidden_size, cfg.layer_norm_epsilon))
        self.model.word_embeddings_layernorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_epsilon)

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.model.word_embeddings_layernorm(super().embed(token_ids))


NAMES = {
    "word_embeddings.": "model.embed_tokens.",
    "word_embeddings_layernorm.": "model.word_embeddings_layernorm.",
    "h.": "model.layers.",
    "ln_f.": "model.norm.",
}


def ungroup(weights: Iterable[tuple[str, Tensor]], cfg: BloomConfig) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        fused = ".query_key_value." in name
        yield name, ungroup_qkv(tensor, cfg.num_attention_heads, cfg.head_dim) if fused else tensor


@hookimpl
def register_architectures() -> list[Architecture]:
    return [
        Architecture(
            "BloomForCausalLM",
            Bloom,
            BloomConfig,
            rename=NAMES | {f"transformer.{old}": new for old, new in NAMES.items()},  # published with and without it
            weights=ungroup,
            reference="transformers:BloomForCausalLM",
            tiny={"vocab_size": 320, "hidden_size": 64, "n_layer": 3, "n_head": 4},
            variants={
                "heads-6": {"hidden_size": 72, "n_head": 6},  # ALiBi differs where heads are no power of two
                "residual-normed": {"apply_residual_connection_post_layernorm": True},
            },
        )
    ]
