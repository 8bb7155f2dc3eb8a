"""MPT's flags as its authors' code reads them, against a reference mended to read them too; published configurations.

The mended attention follows `modeling_mpt.py` of mosaicml/mpt-7b (llm-foundry, 2023): clip, then norms over all heads
of q and of k, then groups of heads, then ALiBi with its largest exponent.
"""

import pytest
import torch
from torch import nn
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from modelport.testing.reference import fill


class AuthorsAttention(nn.Module):
    def __init__(self, size, heads, *, kv_heads, qk_ln, bias, bias_max, clip, alibi):
        super().__init__()
        self.heads, self.kv_heads, self.dim, self.clip = heads, kv_heads, size // heads, clip
        self.bias_max, self.alibi = bias_max, alibi
        self.Wqkv = nn.Linear(size, size + 2 * kv_heads * self.dim, bias=bias)
        self.out_proj = nn.Linear(size, size, bias=bias)
        self.q_ln = nn.LayerNorm(size, bias=bias) if qk_ln else nn.Identity()
        self.k_ln = nn.LayerNorm(kv_heads * self.dim, bias=bias) if qk_ln else nn.Identity()

    def forward(self, x, position_bias=None, **_):  # the names of masks and caches change with the release
        n, qkv = x.shape[1], self.Wqkv(x)
        if self.clip:
            qkv = qkv.clamp(-self.clip, self.clip)
        wide = self.kv_heads * self.dim
        q, k, v = qkv.split([self.heads * self.dim, wide, wide], dim=-1)
        q = self.q_ln(q).view(1, n, self.heads, self.dim).transpose(1, 2)
        k = self.k_ln(k).view(1, n, self.kv_heads, self.dim).transpose(1, 2)
        v = v.view(1, n, self.kv_heads, self.dim).transpose(1, 2)
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (k, v))
        scores = q @ k.transpose(-1, -2) * self.dim**-0.5
        if self.alibi:
            scores = scores + build_mpt_alibi_tensor(self.heads, n, self.bias_max)
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), None


class Positions(nn.Module):
    """The embedding, with the learned rows that transformers has no place for."""

    def __init__(self, wte, size, count):
        super().__init__()
        self.wte, self.wpe = wte, nn.Embedding(count, size)

    def forward(self, ids):
        return self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))


def mend(model, *, no_bias=True, logit_scale=1.0, ratio=4, **flags):
    """Let transformers' module do what the flags say."""
    size, heads, bias = model.config.d_model, model.config.n_heads, not no_bias
    for block in model.transformer.blocks:
        block.attn = AuthorsAttention(size, heads, bias=bias, **flags)
        block.ffn.up_proj = nn.Linear(size, ratio * size, bias=bias)
        block.ffn.down_proj = nn.Linear(ratio * size, size, bias=bias)
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        if bias:
            norm.bias = nn.Parameter(torch.empty_like(norm.weight))
    if not flags["alibi"]:
        model.transformer.wte = Positions(model.transformer.wte, size, model.config.max_seq_len)
    model.lm_head.register_forward_hook(lambda _, inputs, logits: logits * logit_scale)
    fill(model.eval(), 0)


PLAIN = {"kv_heads": 4, "qk_ln": False, "bias_max": 8, "clip": None, "alibi": True}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        pytest.param({"attn_config": {"alibi_bias_max": 16, "clip_qkv": 0.6}}, {"bias_max": 16, "clip": 0.6}, id="7b"),
        pytest.param({"attn_config": {"qk_ln": True, "alibi": True}}, {"qk_ln": True}, id="qk-ln"),
        pytest.param(
            {"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2, "qk_ln": True}},
            {"kv_heads": 2, "qk_ln": True},
            id="grouped",
        ),
        pytest.param({"attn_config": {"attn_type": "multiquery_attention"}}, {"kv_heads": 1}, id="multi-query"),
        pytest.param(
            {"no_bias": False, "expansion_ratio": 2, "attn_config": {"qk_ln": True}},
            {"no_bias": False, "ratio": 2, "qk_ln": True},
            id="biases",
        ),
        pytest.param({"logit_scale": "inv_sqrt_d_model"}, {"logit_scale": 1 / 8}, id="scaled-logits"),
        pytest.param({"logit_scale": 0.5}, {"logit_scale": 0.5}, id="scaled-by-half"),
        pytest.param({"attn_config": {"alibi": False}}, {"alibi": False}, id="learned-positions"),
    ],
)
def test_flags_that_transformers_does_not_read(checkpoint, written, meant):
    made = checkpoint("MPTForCausalLM")
    mend(made.reference.model, **PLAIN | meant)
    state = made.reference.model.state_dict()
    made.tensors = {n.replace("wte.wpe", "wpe").replace("wte.wte", "wte"): t.clone() for n, t in state.items()}
    made.config |= written
    made.assert_agrees()


def test_published_configuration(checkpoint):
    """As mosaicml/mpt-7b has it, nulls and all; the head is the embedding, and has no tensor."""
    made = checkpoint("MPTForCausalLM")
    made.tensors.pop("lm_head.weight", None)
    made.config = {
        "architectures": ["MPTForCausalLM"],
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": 8,
            "attn_impl": "torch",
            "attn_pdrop": 0,
            "attn_type": "multihead_attention",
            "attn_uses_sequence_id": False,
            "clip_qkv": None,
            "prefix_lm": False,
            "qk_ln": False,
            "softmax_scale": None,
        },
        "d_model": 64,
        "expansion_ratio": 4,
        "init_config": {"name": "kaiming_normal_"},
        "learned_pos_emb": True,
        "logit_scale": None,
        "max_seq_len": 512,
        "model_type": "mpt",
        "n_heads": 4,
        "n_layers": 3,
        "no_bias": True,
        "norm_type": "low_precision_layernorm",
        "torch_dtype": "bfloat16",
        "vocab_size": 320,
    }
    made.assert_agrees()


@pytest.mark.parametrize("flag", [{"rope": True}, {"prefix_lm": True}, {"qk_gn": True}, {"sliding_window_size": 64}])
def test_flags_that_are_not_read_are_refused(checkpoint, flag):
    made = checkpoint("MPTForCausalLM")
    made.config["attn_config"] = flag
    with pytest.raises(ValueError, match=f"attn_config.{next(iter(flag))}"):
        made.engine()


def test_only_layer_norms_are_known(checkpoint):
    made = checkpoint("MPTForCausalLM")
    made.config["norm_type"] = "rmsnorm"
    with pytest.raises(ValueError, match="norm_type"):
        made.engine()
