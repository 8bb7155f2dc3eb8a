"""Mamba 2: Mamba's blocks, with a mixer of heads that decay as one and share B and C in groups."""

from typing import Any

from pydantic import field_validator

from modelport.modeling import Mamba2Mixer
from modelport.plugin import Architecture, hookimpl
from modelport.plugins.text.mamba import FIRST_NAMES, Mamba, MambaConfig

modelport_api = 1


class Mamba2Config(MambaConfig):
    tie_word_embeddings: bool = False
    state_size: int = 128
    num_heads: int = 128
    head_dim: int = 64
    n_groups: int = 8
    time_step_limit: tuple[float, float] = (0.0, float("inf"))

    @field_validator("time_step_limit", mode="before")
    @classmethod
    def _infinity(cls, limits: Any) -> Any:
        """transformers 5 writes infinity as `{"__float__": "Infinity"}`, 4 as the bare word."""
        return [limit["__float__"] if isinstance(limit, dict) else limit for limit in limits]


def mixer(cfg: Mamba2Config) -> Mamba2Mixer:
    return Mamba2Mixer(
        cfg.hidden_size,
        cfg.num_heads,
        cfg.head_dim,
        cfg.state_size,
        cfg.conv_kernel,
        groups=cfg.n_groups,
        eps=cfg.rms_norm_eps,
        dt_limits=cfg.time_step_limit,
        bias=cfg.use_bias,
        conv_bias=cfg.use_conv_bias,
    )


class Mamba2(Mamba):
    def __init__(self, cfg: Mamba2Config):
        super().__init__(cfg, mixer)


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_heads": 8,
        "head_dim": 16,
        "n_groups": 2,
        "state_size": 12,
        "chunk_size": 8,
    }
    return [
        Architecture(
            "Mamba2ForCausalLM",
            Mamba2,
            Mamba2Config,
            rename=FIRST_NAMES,
            reference="transformers:Mamba2ForCausalLM",
            tiny=tiny,
        )
    ]
