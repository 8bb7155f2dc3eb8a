"""Phi-3-small: every flag of its configuration, against its equations written out for one whole sequence."""

import math

import pytest
import torch
from torch import Tensor, nn

from modelport.plugins.text.phi3small import Phi3SmallConfig

LONG = {
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 40,
    "rope_scaling": {
        "type": "su",
        "short_factor": [1.0] * 8,
        "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
        "short_mscale": 1.0,
        "long_mscale": 1.25,
        "original_max_position_embeddings": 40,
    },
}


class Layer(nn.Module):
    def __init__(self, e: dict, index: int):
        super().__init__()
        size, heads, kv_heads = e["hidden_size"], e["num_attention_heads"], e["num_key_value_heads"]
        self.dim, self.entries = size // heads, e
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        self.self_attn.query_key_value = nn.Linear(size, (heads + 2 * kv_heads) * self.dim)
        self.self_attn.dense = nn.Linear(size, size)
        self.mlp.up_proj, self.mlp.down_proj = nn.Linear(size, 2 * e["width"]), nn.Linear(e["width"], size)
        every = e.get("dense_attention_every_n_layers", 2)
        self.is_dense = every is not None and (index + 1) % every == 0

    def mask(self, n: int) -> Tensor:
        """(heads, n, n), True where a query sees a key."""
        e, heads = self.entries, self.entries["num_attention_heads"]
        block, key = torch.arange(n) // e["blocksparse_block_size"], torch.arange(n)
        causal = (key[:, None] >= key).expand(heads, n, n)
        if self.is_dense:
            return causal
        stride = e["blocksparse_vert_stride"]
        step = 0 if e.get("blocksparse_homo_head_pattern") else max(1, stride // heads)
        far = (block + 1 + step * torch.arange(heads)[:, None]) % stride == 0  # (heads, n)
        return causal & ((block[:, None] - block < e["blocksparse_num_local_blocks"]) | far[:, None])

    def forward(self, x: Tensor) -> Tensor:  # (tokens, hidden_size)
        e, n, dim, heads = self.entries, len(x), self.dim, self.entries["num_attention_heads"]
        shared = heads // e["num_key_value_heads"]
        rows = self.self_attn.query_key_value(self.input_layernorm(x)).view(n, -1, shared + 2, dim)
        q = rows[:, :, :shared].flatten(1, 2)
        k, v = (rows[:, :, i].repeat_interleave(shared, dim=1) for i in (-2, -1))
        scaling, magnitude = e.get("rope_scaling"), 1.0
        divisor = torch.full((dim // 2,), e.get("rope_position_scale", 1.0))
        if scaling:
            kind = "long" if n > scaling["original_max_position_embeddings"] else "short"
            divisor, magnitude = torch.tensor(scaling[f"{kind}_factor"]), scaling[f"{kind}_mscale"]
        angles = torch.outer(torch.arange(n).float(), 1e6 ** -(torch.arange(0, dim, 2).float() / dim) / divisor)
        cos, sin = magnitude * angles.cos()[:, None], magnitude * angles.sin()[:, None]

        def rotated(y: Tensor) -> Tensor:
            a, b = y.chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(y.dtype)

        scale = e.get("mup_attn_multiplier", 1.0) / dim if e.get("mup_use_scaling", True) else dim**-0.5
        scores = torch.einsum("qhd,khd->hqk", rotated(q), rotated(k)) * scale
        weights = scores.masked_fill(~self.mask(n), float("-inf")).softmax(-1)
        x = x + self.self_attn.dense(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        up = self.mlp.up_proj(self.post_attention_layernorm(x))
        limit = e.get("gegelu_limit", 20.0) or math.inf
        gate, linear = up[:, ::2].clamp(max=limit), up[:, 1::2].clamp(-limit, limit)
        return x + self.mlp.down_proj(gate * torch.sigmoid(1.702 * gate) * (linear + 1))


class Phi3Small(nn.Module):
    def __init__(self, entries: dict):
        super().__init__()
        e = {**entries, "width": Phi3SmallConfig.model_validate(entries).width}
        self.entries, self.model = e, nn.Module()
        self.model.embed_tokens = nn.Embedding(e["vocab_size"], e["hidden_size"])
        self.model.layers = nn.ModuleList(Layer(e, i) for i in range(e["num_hidden_layers"]))
        self.model.final_layernorm = nn.LayerNorm(e["hidden_size"])
        self.lm_head = nn.Linear(e["hidden_size"], e["vocab_size"], bias=False)
        if e.get("tie_word_embeddings", True):
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.model.embed_tokens(ids[0]) * (self.entries.get("mup_embedding_multiplier", 10.0) or 1.0)
        for layer in self.model.layers:
            x = layer(x)
        logits = self.lm_head(self.model.final_layernorm(x)) / (self.entries.get("mup_width_multiplier", 8.0) or 1.0)
        logits[:, self.entries["dummy_token_indices"]] = torch.finfo(torch.float32).min
        return logits[None]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({}, id="8k"),
        pytest.param(LONG, id="128k"),
        pytest.param({"blocksparse_homo_head_pattern": True}, id="heads-alike"),
        pytest.param({"dense_attention_every_n_layers": None}, id="sparse"),
        pytest.param({"dense_attention_every_n_layers": 1}, id="dense"),
        pytest.param({"blocksparse_block_size": 8, "blocksparse_vert_stride": 9}, id="wide-shift"),
        pytest.param({"num_key_value_heads": 4}, id="own-kv-heads"),
        pytest.param({"mup_use_scaling": False, "mup_width_multiplier": None}, id="no-mup"),
        pytest.param({"mup_attn_multiplier": 2.0, "mup_embedding_multiplier": 1.5}, id="mup"),
        pytest.param({"gegelu_limit": None, "rope_position_scale": 2.0}, id="no-limit-squeezed"),
        pytest.param({"tie_word_embeddings": False}, id="own-head"),
    ],
)
def test_flags(checkpoint, flags):
    checkpoint("Phi3SmallForCausalLM", make=Phi3Small, **flags).assert_agrees()


def test_width_from_a_multiplier():
    shape = {"vocab_size": 8, "hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 1}
    widths = [
        Phi3SmallConfig.model_validate({**shape, "ff_dim_multiplier": 2.5, "gegelu_pad_to_256": padded}).width
        for padded in (True, False)
    ]
    assert widths == [256, 160]
    with pytest.raises(ValueError, match="ff_intermediate_size nor ff_dim_multiplier"):
        _ = Phi3SmallConfig.model_validate(shape).width


def test_early_configurations_leave_the_unused_tokens_to_the_tokenizer():
    shape = {"hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 1}
    never = Phi3SmallConfig.model_validate({**shape, "vocab_size": 100352}).dummies
    assert {100256, 100260, 100265, 100276, 100351} <= set(never)
    assert not {100255, 100257, 100261, 100262, 100263, 100266, 100352} & set(never)  # end of text and the chat's marks
    assert Phi3SmallConfig.model_validate({**shape, "vocab_size": 320}).dummies == []
