"""Qwen (the first): Llama's shape with biased queries, keys and values, and two ways to reach beyond its training.

Beyond `seq_length`, a query is scaled by the logarithm of its position to the base `seq_length` (logn), and the rotary
base grows in steps with the length of the prompt (dynamic NTK). The authors choose the step when they read the prompt
and keep it for what is generated, so it is a prompt's length class and nothing is ever computed again.
"""

import math

import torch
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import RopeParameters, TextConfig
from modelport.modeling import Attention, CausalLM, GatedMLP, QKVLinear, RMSNorm, Rope, RowLinear
from modelport.plugin import Architecture, hookimpl

modelport_api = 1


class QWenConfig(TextConfig):
    aliases = {
        "kv_channels": "head_dim",
        "layer_norm_epsilon": "rms_norm_eps",
        "rotary_emb_base": "rope_theta",
        "rotary_pct": "partial_rotary_factor",
    }
    max_position_embeddings: int = 8192
    seq_length: int = 8192
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    scale_attn_weights: bool = True
    no_bias: bool = True


class SteppedRope(Rope):
    """Rotary positions whose base grows with every doubling of the prompt beyond the trained length.

    With n tokens of prompt and s trained ones the base is multiplied by `alpha ** (d / (d - 2))`, d rotated dimensions,
    `alpha = 2 ** (ceil(log2(n / s)) + 1) - 1`, at least 1. A class is that `ceil`, 0 up to the trained length.
    """

    def __init__(self, head_dim: int, parameters: RopeParameters, trained: int):
        super().__init__(head_dim, parameters)
        self.trained, self.max_len = trained, 0
        self._last: tuple[Batch, Tensor] | None = None

    def build_tables(self, device: torch.device, max_len: int) -> None:
        """As `Rope.build_tables`; the `max_len` rows of each further class follow."""
        self.max_len = max_len
        dim, tables = self.rotary_dim, []
        exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        for step in range(self._step(max_len) + 1):
            base = self.parameters.rope_theta * (2 ** (step + 1) - 1) ** (dim / (dim - 2))
            angles = torch.outer(torch.arange(max_len, dtype=torch.float32), 1.0 / base**exponents)
            tables.append(torch.cat((angles.cos(), angles.sin()), -1))
        self.cos_sin = torch.cat(tables).to(device)

    @property
    def by_length(self) -> bool:
        return self._step(self.max_len) > 0

    def length_class(self, num_prompt_tokens: int, num_tokens: int) -> int:
        return self._step(num_prompt_tokens)

    def angles(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if not self.by_length:
            return self.cos_sin, batch.positions
        if self._last is None or self._last[0] is not batch:  # for the first of the layers that ask
            self._last = batch, self._rows(batch)
        return self.cos_sin, self._last[1]

    def _rows(self, batch: Batch) -> Tensor:
        row = torch.arange(len(batch.positions), dtype=torch.int32, device=batch.positions.device)
        sequence = torch.bucketize(row, batch.query_starts[1:], right=True).clamp_(max=len(batch.length_classes) - 1)
        return batch.positions + batch.length_classes[sequence].long() * self.max_len

    def _step(self, tokens: int) -> int:
        return max(math.ceil(math.log2(max(tokens, 1) / self.trained)), 0)


class LogN(nn.Module):
    """`q * log(position + 1) / log(trained)` beyond the trained length; q: (tokens, heads, head_dim)."""

    def __init__(self, trained: int):
        super().__init__()
        self.trained, self.factors = trained, None

    def build_tables(self, device: torch.device, max_len: int) -> None:
        lengths = torch.arange(1, max_len + 1, dtype=torch.float64, device=device)
        factors = (lengths.log() / math.log(self.trained)).clamp(min=1.0).float()
        self.factors = factors if max_len > self.trained else None

    def forward(self, q: Tensor, batch: Batch) -> Tensor:
        return q if self.factors is None else q * self.factors[batch.positions, None, None].to(q.dtype)


class SelfAttention(nn.Module):
    def __init__(self, cfg: QWenConfig, rope: Rope, logn: LogN):
        super().__init__()
        heads, size = cfg.num_attention_heads, cfg.head_dim
        self.c_attn = QKVLinear(cfg.hidden_size, heads, heads, size, bias=True)
        self.logn = logn if cfg.use_logn_attn else None
        self.attn = Attention(heads, heads, size, rope=rope, scale=None if cfg.scale_attn_weights else 1.0)
        self.c_proj = RowLinear(heads * size, cfg.hidden_size, bias=not cfg.no_bias)

    def forward(self, x: Tensor, batch: Batch, residual: Tensor) -> Tensor:
        q, k, v = self.c_attn(x)
        q = q if self.logn is None else self.logn(q, batch)
        return self.c_proj(self.attn(q, k, v, batch), residual)


class Block(nn.Module):
    def __init__(self, cfg: QWenConfig, rope: Rope, logn: LogN):
        super().__init__()
        self.ln_1 = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.attn = SelfAttention(cfg, rope, logn)
        self.ln_2 = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        # `intermediate_size` counts both halves, and the second one is the gate
        wide, names = cfg.intermediate_size // 2, ("w2", "w1", "c_proj")
        self.mlp = GatedMLP(cfg.hidden_size, wide, "silu", bias=not cfg.no_bias, names=names)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:  # x: (tokens, hidden_size)
        x = self.attn(self.ln_1(x), batch, residual=x)
        return self.mlp(self.ln_2(x), residual=x)


class QWen(CausalLM):
    def __init__(self, cfg: QWenConfig):
        rope: Rope = Rope(cfg.head_dim, cfg.rope_parameters)
        if cfg.use_dynamic_ntk:  # one for all layers: its tables are large
            rope = SteppedRope(cfg.head_dim, cfg.rope_parameters, cfg.seq_length)
        logn = LogN(cfg.seq_length)
        norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        super().__init__(cfg, lambda cfg, layer: Block(cfg, rope, logn), norm)


@hookimpl
def register_architectures() -> list[Architecture]:
    tiny = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "kv_channels": 16,
        "max_position_embeddings": 512,
        "seq_length": 32,
    }
    rename = {
        "transformer.wte.": "model.embed_tokens.",
        "transformer.h.": "model.layers.",
        "transformer.ln_f.": "model.norm.",
    }
    ignore = ("transformer.rotary_emb.inv_freq", "*.attn.masked_bias", "*.attn.bias", "*.attn.rotary_emb.inv_freq")
    return [Architecture("QWenLMHeadModel", QWen, QWenConfig, rename=rename, ignore=ignore, tiny=tiny)]
