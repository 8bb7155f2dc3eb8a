"""GPTBigCode (SantaCoder, StarCoder): GPT-2's shape, all heads sharing one key and value head, weights not transposed.

The fused `c_attn` has two layouts: with `multi_query` all queries, then the key, then the value; without it, head by
head a query, a key and a value.
"""

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import MLP, Attention, Embedding, LayerNorm, LearnedPositions, LMHead, QKVLinear, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class GPTBigCodeConfig(TextConfig):
    aliases = {
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "n_inner": "intermediate_size",
        "activation_function": "hidden_act",
    }
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 1024
    tie_word_embeddings: bool = True
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    multi_query: bool = True


class SelfAttention(nn.Module):
    def __init__(self, cfg: GPTBigCodeConfig):
        super().__init__()
        heads, size = cfg.num_attention_heads, cfg.head_dim
        kv_heads = 1 if cfg.multi_query else heads
        self.c_attn = QKVLinear(cfg.hidden_size, heads, kv_heads, size, bias=True)
        self.attn = Attention(heads, kv_heads, size, scale=None if cfg.scale_attn_weights else 1.0)
        self.c_proj = RowLinear(cfg.hidden_size, cfg.hidden_size, bias=True)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.c_proj(self.attn(*self.c_attn(x), batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: GPTBigCodeConfig):
        super().__init__()
        size, wide = cfg.hidden_size, cfg.intermediate_size or 4 * cfg.hidden_size
        self.ln_1 = LayerNorm(size, cfg.layer_norm_epsilon)
        self.attn = SelfAttention(cfg)
        self.ln_2 = LayerNorm(size, cfg.layer_norm_epsilon)
        self.mlp = MLP(size, wide, cfg.hidden_act, bias=True, names=("c_fc", "c_proj"))

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.attn(self.ln_1(x), batch, residual=x)
        return self.mlp(self.ln_2(x), residual=x)


class GPTBigCode(nn.Module):
    def __init__(self, cfg: GPTBigCodeConfig):
        super().__init__()
        self.wte = Embedding(cfg.vocab_size, cfg.hidden_size)
        self.wpe = LearnedPositions(cfg.max_position_embeddings, cfg.hidden_size)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        self.ln_f = LayerNorm(cfg.hidden_size, cfg.layer_norm_epsilon)
        self.lm_head = LMHead(cfg.hidden_size, cfg.vocab_size, tied=self.wte if cfg.tie_word_embeddings else None)

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.wte(token_ids)

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.wpe, *self.h]

    def finish(self, state: Tensor) -> Tensor:
        return self.ln_f(state)


def group_heads(weights: Iterable[tuple[str, Tensor]], cfg: GPTBigCodeConfig) -> Iterator[tuple[str, Tensor]]:
    """Rows of `c_attn` as (q of all heads, k of all heads, v of all heads)."""
    for name, tensor in weights:
        if ".c_attn." in name and not cfg.multi_query:  # (heads, 3, head_dim, ...) -> (3, heads, head_dim, ...)
            by_head = tensor.unflatten(0, (cfg.num_attention_heads, 3, cfg.head_dim))
            tensor = by_head.transpose(0, 1).flatten(0, 2)
        yield name, tensor


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {"vocab_size": 320, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 112, "n_positions": 512}
    return [
        Architecture(
            name,
            GPTBigCode,
            GPTBigCodeConfig,
            rename={"transformer.": ""},
            weights=group_heads,
            ignore=("bias", "h.*.attn.bias", "h.*.attn.masked_bias"),  # stored causal masks
            reference="transformers:GPTBigCodeForCausalLM",
            tiny=tiny,
        )
        for name in ("GPTBigCodeForCausalLM", "GPTBigCodeLMHeadModel")  # the second before the class got its name
    ]
