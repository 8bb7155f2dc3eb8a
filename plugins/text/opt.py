"""OPT: learned positions that start at row 2, ReLU, biases; norms and projections that differ from size to size.

350M normalises after each layer instead of before it, has no last norm, and keeps narrower embeddings, which two
projections widen and narrow again.
"""

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import (
    Activation,
    Attention,
    ColumnLinear,
    Embedding,
    LayerNorm,
    LearnedPositions,
    Linear,
    LMHead,
    QKVLinear,
    RowLinear,
)
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class OPTConfig(TextConfig):
    aliases = {
        "ffn_dim": "intermediate_size",
        "activation_function": "hidden_act",
        "_remove_final_layer_norm": "remove_final_layer_norm",
    }
    hidden_act: str = "relu"
    tie_word_embeddings: bool = True
    word_embed_proj_dim: int = 0  # hidden_size when absent
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = False
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True


def norm(cfg: OPTConfig) -> LayerNorm:
    affine = cfg.layer_norm_elementwise_affine
    return LayerNorm(cfg.hidden_size, weight=affine, bias=affine)


class SelfAttention(nn.Module):
    def __init__(self, cfg: OPTConfig):
        super().__init__()
        heads = cfg.num_attention_heads
        self.qkv_proj = QKVLinear(cfg.hidden_size, heads, heads, cfg.head_dim, cfg.enable_bias)
        self.attn = Attention(heads, heads, cfg.head_dim)
        self.out_proj = RowLinear(cfg.hidden_size, cfg.hidden_size, cfg.enable_bias)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        return self.out_proj(self.attn(*self.qkv_proj(x), batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: OPTConfig):
        super().__init__()
        self.norm_first = cfg.do_layer_norm_before
        self.self_attn = SelfAttention(cfg)
        self.self_attn_layer_norm = norm(cfg)
        self.fc1 = ColumnLinear(cfg.hidden_size, cfg.intermediate_size, cfg.enable_bias)
        self.act = Activation(cfg.hidden_act)
        self.fc2 = RowLinear(cfg.intermediate_size, cfg.hidden_size, cfg.enable_bias)
        self.final_layer_norm = norm(cfg)

    def feed_forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)), residual)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        if self.norm_first:
            x = self.self_attn(self.self_attn_layer_norm(x), batch, residual=x)
            return self.feed_forward(self.final_layer_norm(x), residual=x)
        x = self.self_attn_layer_norm(self.self_attn(x, batch, residual=x))
        return self.final_layer_norm(self.feed_forward(x, residual=x))


class OPT(nn.Module):
    def __init__(self, cfg: OPTConfig):
        super().__init__()
        size, narrow = cfg.hidden_size, cfg.word_embed_proj_dim or cfg.hidden_size
        self.embed_tokens = Embedding(cfg.vocab_size, narrow)
        self.project_in = Linear(narrow, size) if narrow != size else nn.Identity()
        self.embed_positions = LearnedPositions(cfg.max_position_embeddings, size, offset=2)
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.num_hidden_layers))
        last = cfg.do_layer_norm_before and not cfg.remove_final_layer_norm
        self.final_layer_norm = norm(cfg) if last else nn.Identity()
        self.project_out = Linear(size, narrow) if narrow != size else nn.Identity()
        self.lm_head = LMHead(narrow, cfg.vocab_size, tied=self.embed_tokens if cfg.tie_word_embeddings else None)

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.project_in(self.embed_tokens(token_ids))

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.embed_positions, *self.layers]

    def finish(self, state: Tensor) -> Tensor:
        return self.project_out(self.final_layer_norm(state))


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "ffn_dim": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    }
    variants = {
        "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
        "no-last-norm": {"_remove_final_layer_norm": True},
        "galactica": {"enable_bias": False, "activation_function": "gelu", "layer_norm_elementwise_affine": False},
        "own-head": {"tie_word_embeddings": False, "word_embed_proj_dim": 96},
    }
    return [
        Architecture(
            "OPTForCausalLM",
            OPT,
            OPTConfig,
            rename={"model.decoder.": "", "decoder.": ""},  # the large ones have no `model.`
            reference="transformers:OPTForCausalLM",
            tiny=tiny,
            variants=variants,
            model_type="opt",
            defaults={
                "vocab_size": 50272,
                "hidden_size": 768,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "ffn_dim": 3072,
                "eos_token_id": 2,
            },
        )
    ]
