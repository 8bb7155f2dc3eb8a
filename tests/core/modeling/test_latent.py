"""Latent attention against the layer that expands every key and value."""

import itertools

import pytest
import torch

from modelport.batch import Batch, Pages
from modelport.config import RopeParameters
from modelport.modeling import LatentAttention, Rope

SIZES = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}


def reference(q_lora_rank: int | None) -> tuple[torch.nn.Module, torch.nn.Module]:
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as theirs

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    cfg = DeepseekV2Config(
        hidden_size=64, num_attention_heads=4, q_lora_rank=q_lora_rank, rope_parameters=rope, **SIZES
    )
    cfg._attn_implementation = "eager"
    layer = theirs.DeepseekV2Attention(cfg, 0).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0.3 if parameter.dim() == 1 else 0.0, 0.2)
    return layer, theirs.DeepseekV2RotaryEmbedding(cfg)


def ours(weights: dict, q_lora_rank: int | None) -> LatentAttention:
    rope = Rope(8, RopeParameters(), interleaved=True)
    layer = LatentAttention(64, 4, q_lora_rank=q_lora_rank, rope=rope, **SIZES)
    layer.load_state_dict(weights)
    for module in layer.modules():
        if hasattr(module, "pack"):
            module.pack()
    rope.build_tables(torch.device("cpu"), 64)
    spec = layer.cache_spec
    assert spec.dims == (40, 0)  # the latent and the rotated part, not heads
    layer.attach(torch.full((8, 1, 4, spec.head_dim), float("nan")), None, 0)  # memory holds anything at first
    return layer


@pytest.mark.parametrize("q_lora_rank", [24, None])
@pytest.mark.parametrize("cuts", [(0, 11), (0, 5, 6, 11)])
@torch.inference_mode()
def test_latents_attend_as_expanded_keys_do(q_lora_rank, cuts):
    torch.manual_seed(0)
    theirs, rotary = reference(q_lora_rank)
    layer = ours(theirs.state_dict(), q_lora_rank)
    x = torch.randn(11, 64)
    mask = torch.full((11, 11), float("-inf")).triu(1)[None, None]
    want = theirs(x[None], mask, None, rotary(x, torch.arange(11)[None]))[0][0]
    table = torch.randperm(8)[None].int()
    found = []
    for a, b in itertools.pairwise(cuts):
        positions = torch.arange(a, b)
        slots = table[0, positions // 4].long() * 4 + positions % 4
        starts, lens = torch.tensor([0, b - a]).int(), torch.tensor([b]).int()
        found.append(layer(x[a:b], Batch(positions, starts, lens, (Pages(table, slots),), lens * 0, b - a)))
    torch.testing.assert_close(torch.cat(found), want, rtol=1e-5, atol=1e-5)
