"""InternLM2: Llama's shape under names of its own, with one attention weight in which key-value heads come in turn."""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import Attention, CausalLM, GatedMLP, QKVLinear, RMSNorm, Rope, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class InternLM2Config(TextConfig):
    bias: bool = True


class SelfAttention(nn.Module):
    def __init__(self, cfg: InternLM2Config):
        super().__init__()
        heads, kv_heads = cfg.num_attention_heads, cfg.num_key_value_heads
        self.wqkv = QKVLinear(cfg.hidden_size, heads, kv_heads, cfg.head_dim, cfg.bias)
        self.attn = Attention(heads, kv_heads, cfg.head_dim, rope=Rope(cfg.head_dim, cfg.rope_parameters))
        self.wo = RowLinear(heads * cfg.head_dim, cfg.hidden_size, cfg.bias)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.wo(self.attn(*self.wqkv(x), batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: InternLM2Config, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.attention = SelfAttention(cfg)
        self.ffn_norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.feed_forward = GatedMLP(
            cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act, names=("w1", "w3", "w2")
        )  # fmt: skip

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.attention(self.attention_norm(x), batch, residual=x)
        return self.feed_forward(self.ffn_norm(x), residual=x)


class InternLM2(CausalLM):
    def __init__(self, cfg: InternLM2Config):
        super().__init__(cfg, Block, RMSNorm(cfg.hidden_size, cfg.rms_norm_eps))


def ungroup(weights: Iterable[tuple[str, Tensor]], cfg: InternLM2Config) -> Iterator[tuple[str, Tensor]]:
    """`wqkv` holds, for each key-value head, its queries, its key and its value; ours all of each kind."""
    kv_heads, size = cfg.num_key_value_heads, cfg.head_dim
    for name, tensor in weights:
        if ".wqkv." in name:
            rows = tensor.unflatten(0, (kv_heads, -1, size))  # (kv_heads, queries + 2, head_dim, ...)
            parts = rows.split((rows.shape[1] - 2, 1, 1), dim=1)
            for part, held in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                yield name.replace("wqkv", part), held.flatten(0, 2)
        else:
            yield name, tensor


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bias": False,
    }
    return [
        Architecture(
            "InternLM2ForCausalLM",
            InternLM2,
            InternLM2Config,
            rename={"model.tok_embeddings.": "model.embed_tokens.", "output.": "lm_head."},
            weights=ungroup,
            ignore=("*.rotary_emb.inv_freq",),
            tiny=tiny,
        )
    ]
