"""MiniCPM3: latent attention with long rotary factors, scaled embeddings, residuals and logits."""

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import CausalLM, GatedMLP, LatentAttention, RMSNorm, Rope
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class MiniCPM3Config(TextConfig):
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    q_lora_rank: int | None = 768
    kv_lora_rank: int = 256
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 32
    v_head_dim: int = 0  # hidden_size / num_attention_heads when absent
    scale_emb: float = 12.0
    scale_depth: float | None = 1.4
    dim_model_base: int | None = 256

    @property
    def residual_scale(self) -> float:
        return 1.0 if self.scale_depth is None else self.scale_depth / self.num_hidden_layers**0.5

    @property
    def logit_scale(self) -> float:
        return 1.0 if self.dim_model_base is None else self.dim_model_base / self.hidden_size


class Block(nn.Module):
    def __init__(self, cfg: MiniCPM3Config, layer: int):
        super().__init__()
        self.scale = cfg.residual_scale
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = LatentAttention(
            cfg.hidden_size,
            cfg.num_attention_heads,
            q_lora_rank=cfg.q_lora_rank,
            kv_lora_rank=cfg.kv_lora_rank,
            qk_nope_head_dim=cfg.qk_nope_head_dim,
            qk_rope_head_dim=cfg.qk_rope_head_dim,
            v_head_dim=cfg.v_head_dim or cfg.hidden_size // cfg.num_attention_heads,
            rope=Rope(cfg.qk_rope_head_dim, cfg.rope_parameters),
            bias=cfg.attention_bias,
        )
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = GatedMLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act, cfg.mlp_bias)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = x + self.scale * self.self_attn(self.input_layernorm(x), batch)
        return x + self.scale * self.mlp(self.post_attention_layernorm(x))


class MiniCPM3(CausalLM):
    def __init__(self, cfg: MiniCPM3Config):
        super().__init__(cfg, Block, RMSNorm(cfg.hidden_size, cfg.rms_norm_eps), embed_scale=cfg.scale_emb)
        self.logit_scale = cfg.logit_scale

    def finish(self, state: Tensor) -> Tensor:
        return super().finish(state) * self.logit_scale


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "scale_emb": 3,
        "dim_model_base": 32,
    }
    # longer than what is checked: a generation that changes its factors is not its own reference computed whole
    long = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256}
    variants = {
        "longrope": {
            "rope_parameters": {**long, "short_factor": [1.0, 1.1, 1.2, 1.4], "long_factor": [1.0, 2.0, 4.0, 9.0]}
        },
        "plain_queries": {"q_lora_rank": None, "attention_bias": True, "mlp_bias": True},
        "unscaled": {"scale_emb": 1, "scale_depth": None, "dim_model_base": None, "tie_word_embeddings": False},
    }
    name = "MiniCPM3ForCausalLM"
    reference = f"transformers:{name}"
    return [Architecture(name, MiniCPM3, MiniCPM3Config, reference=reference, tiny=tiny, variants=variants)]
