"""Mamba: no attention, every block a norm and a mixer; and Falcon Mamba, which norms dt, B and C before the scan."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling import Embedding, LMHead, MambaMixer, RMSNorm
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class MambaConfig(TextConfig):
    aliases = {"layer_norm_epsilon": "rms_norm_eps"}
    num_attention_heads: int = 0
    max_position_embeddings: int = 1 << 17  # a state does not grow; this only bounds what a request may ask for
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    hidden_act: Literal["silu", "swish"] = "silu"
    state_size: int = 16
    conv_kernel: int = 4
    expand: float = 2
    time_step_rank: int | Literal["auto"] = "auto"
    use_bias: bool = False
    use_conv_bias: bool = True
    residual_in_fp32: bool = True

    @property
    def dt_rank(self) -> int:
        return math.ceil(self.hidden_size / 16) if self.time_step_rank == "auto" else self.time_step_rank


class FalconMambaConfig(MambaConfig):
    mixer_rms_eps: float = 1e-6


class PlainRMSNorm(nn.Module):
    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def mixer(cfg: MambaConfig) -> MambaMixer:
    # The 7B Falcon Mamba says expand=16 and means its intermediate_size.
    inner = cfg.intermediate_size or int(cfg.expand * cfg.hidden_size)
    is_falcon = isinstance(cfg, FalconMambaConfig)
    return MambaMixer(
        cfg.hidden_size,
        inner,
        cfg.state_size,
        cfg.conv_kernel,
        cfg.dt_rank,
        bias=cfg.use_bias,
        conv_bias=cfg.use_conv_bias,
        norm=(lambda size: PlainRMSNorm(cfg.mixer_rms_eps)) if is_falcon else None,
    )


class Block(nn.Module):
    def __init__(self, cfg: MambaConfig, mixer: nn.Module):
        super().__init__()
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mixer = mixer

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size), in float32 or the model's dtype
        normed = self.norm(x).to(self.norm.weight.dtype)
        if normed.dtype == x.dtype:
            return self.mixer(normed, batch, residual=x)
        return x + self.mixer(normed, batch)


class Mamba(nn.Module):
    def __init__(self, cfg: MambaConfig, mixer: Callable[[MambaConfig], nn.Module] = mixer):
        super().__init__()
        self.residual_in_fp32 = cfg.residual_in_fp32
        self.backbone = nn.Module()
        self.backbone.embeddings = Embedding(cfg.vocab_size, cfg.hidden_size)
        self.backbone.layers = nn.ModuleList(Block(cfg, mixer(cfg)) for _ in range(cfg.num_hidden_layers))
        self.backbone.norm_f = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        tied = self.backbone.embeddings if cfg.tie_word_embeddings else None
        self.lm_head = LMHead(cfg.hidden_size, cfg.vocab_size, tied=tied)

    def embed(self, token_ids: Tensor) -> Tensor:
        x = self.backbone.embeddings(token_ids)
        return x.to(torch.float32) if self.residual_in_fp32 else x

    @property
    def blocks(self) -> nn.ModuleList:
        return self.backbone.layers

    def finish(self, state: Tensor) -> Tensor:
        return self.backbone.norm_f(state).to(self.backbone.norm_f.weight.dtype)


FIRST_NAMES = {"backbone.embedding.": "backbone.embeddings."}  # in the authors' checkpoints


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 3, "state_size": 8}
    return [
        Architecture(name, Mamba, config, rename=FIRST_NAMES, reference=f"transformers:{name}", tiny=tiny)
        for name, config in (("MambaForCausalLM", MambaConfig), ("FalconMambaForCausalLM", FalconMambaConfig))
    ]
