"""Qwen (the first): every flag of its configuration, against its equations written out for one whole sequence."""

import math

import pytest
import torch
from torch import Tensor, nn

ROOMY = {"seq_length": 512}


class Layer(nn.Module):
    def __init__(self, e: dict):
        super().__init__()
        size, wide, inner = e["hidden_size"], e["intermediate_size"] // 2, e["num_attention_heads"] * e["kv_channels"]
        bias = not e.get("no_bias", True)
        self.ln_1, self.ln_2 = nn.RMSNorm(size, e["layer_norm_epsilon"]), nn.RMSNorm(size, e["layer_norm_epsilon"])
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn, self.attn.c_proj = nn.Linear(size, 3 * inner), nn.Linear(inner, size, bias=bias)
        self.mlp.w1, self.mlp.w2 = nn.Linear(size, wide, bias=bias), nn.Linear(size, wide, bias=bias)
        self.mlp.c_proj = nn.Linear(wide, size, bias=bias)
        self.entries = e

    def forward(self, x: Tensor) -> Tensor:  # (tokens, hidden_size)
        e, n = self.entries, len(x)
        dim, trained = e["kv_channels"], e["seq_length"]
        q, k, v = self.attn.c_attn(self.ln_1(x)).view(n, 3, -1, dim).unbind(1)
        base = 10000.0
        if e.get("use_dynamic_ntk", True):
            base *= max(2 ** math.ceil(math.log2(n / trained) + 1) - 1, 1) ** (dim / (dim - 2))
        angles = torch.outer(torch.arange(n).float(), base ** -(torch.arange(0, dim, 2).float() / dim))
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]

        def rotated(y: Tensor) -> Tensor:
            a, b = y.chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        q, k = rotated(q), rotated(k)
        if e.get("use_logn_attn", True):
            q = q * torch.tensor([max(math.log(i, trained), 1.0) for i in range(1, n + 1)])[:, None, None].to(q.dtype)
        scale = dim**-0.5 if e.get("scale_attn_weights", True) else 1.0
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale + torch.full((n, n), float("-inf")).triu(1)
        x = x + self.attn.c_proj(torch.einsum("hqk,khd->qhd", scores.softmax(-1).to(v.dtype), v).flatten(1))
        y = self.ln_2(x)
        return x + self.mlp.c_proj(self.mlp.w1(y) * nn.functional.silu(self.mlp.w2(y)))


class Qwen(nn.Module):
    def __init__(self, entries: dict):
        super().__init__()
        e = {"layer_norm_epsilon": 1e-6, **entries}
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(e["vocab_size"], e["hidden_size"])
        self.transformer.h = nn.ModuleList(Layer(e) for _ in range(e["num_hidden_layers"]))
        self.transformer.ln_f = nn.RMSNorm(e["hidden_size"], e["layer_norm_epsilon"])
        self.lm_head = nn.Linear(e["hidden_size"], e["vocab_size"], bias=False)
        if e.get("tie_word_embeddings"):
            self.lm_head.weight = self.transformer.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer.wte(ids[0])
        for layer in self.transformer.h:
            x = layer(x)
        return self.lm_head(self.transformer.ln_f(x))[None]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({}, id="qwen-7b-beyond-its-length"),
        pytest.param({"use_dynamic_ntk": False}, id="logn-alone"),
        pytest.param({"use_logn_attn": False}, id="ntk-alone"),
        pytest.param({"use_dynamic_ntk": False, "use_logn_attn": False}, id="qwen-72b"),
        pytest.param({**ROOMY, "use_dynamic_ntk": False, "use_logn_attn": False, "no_bias": False}, id="biases"),
        pytest.param({**ROOMY, "kv_channels": 8}, id="narrow-heads"),
        pytest.param({**ROOMY, "scale_attn_weights": False, "kv_channels": 4}, id="unscaled"),
        pytest.param({**ROOMY, "tie_word_embeddings": True}, id="tied"),
    ],
)
def test_flags(checkpoint, flags):
    checkpoint("QWenLMHeadModel", make=Qwen, **flags).assert_agrees()


def test_stored_buffers_are_not_needed(checkpoint):
    made = checkpoint("QWenLMHeadModel", make=Qwen)
    made.tensors["transformer.rotary_emb.inv_freq"] = torch.zeros(8)
    made.tensors["transformer.h.0.attn.masked_bias"] = torch.zeros(())
    made.assert_agrees()
