"""Families with experts: published layouts, and flags that transformers does not read as the authors meant them."""

import pytest
import torch
from torch import Tensor, nn


@pytest.mark.parametrize(
    "name",
    [
        "MixtralForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen3MoeForCausalLM",
        "OlmoeForCausalLM",
        "GraniteMoeForCausalLM",
        "PhimoeForCausalLM",
    ],
)
def test_names_of_transformers_5(checkpoint, name):
    made = checkpoint(name)
    made.save(save_original_format=False)
    assert any(key.endswith("experts.gate_up_proj") for key in made.tensors)
    made.assert_agrees()


@pytest.mark.parametrize("beside", [None, {"rope_type": "default", "rope_theta": 10000.0}])
def test_dbrx_reads_the_base_where_its_authors_put_it(checkpoint, beside):
    """transformers 5 reads it from `rope_parameters` only, and writes its own default there; nor can it but clip."""
    attention = {"kv_n_heads": 2, "clip_qkv": 1e6, "rope_theta": 50.0}
    made = checkpoint("DbrxForCausalLM", attn_config=attention, rope_parameters={**(beside or {}), "rope_theta": 50.0})
    made.config["attn_config"]["clip_qkv"] = None
    made.config["rope_parameters"] = beside
    made.assert_agrees()


def test_deepseek_v2_normalises_or_scales(checkpoint, monkeypatch):
    """transformers leaves `norm_topk_prob` out; with it, the authors' code does not scale."""
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

    plain = DeepseekV2TopkRouter.forward

    def normalised(self: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        logits, shares, ids = plain(self, x)
        return logits, shares / shares.sum(-1, keepdim=True), ids

    monkeypatch.setattr(DeepseekV2TopkRouter, "forward", normalised)
    checkpoint("DeepseekV2ForCausalLM", norm_topk_prob=True).assert_agrees()


@pytest.mark.parametrize("name", ["DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"])
def test_deepseek_without_shared_experts_and_with_a_layer_too_many(checkpoint, name):
    made = checkpoint(name)
    for key, parameter in made.reference.model.named_parameters():
        if "shared_experts.down_proj" in key:
            parameter.data.zero_()
    made.config["n_shared_experts"] = None
    made.tensors = {key: tensor for key, tensor in made.tensors.items() if "shared_experts" not in key}
    made.tensors["model.layers.3.eh_proj.weight"] = torch.ones(2, 2)  # predicts further tokens
    made.assert_agrees()


@pytest.mark.parametrize("normalised", [False, True])
def test_deepseek_normalises_when_asked(checkpoint, monkeypatch, normalised):
    """Against Llama with the mixture of DeepSeek-V2, whose router leaves `norm_topk_prob` out."""
    from transformers import DeepseekV2Config, LlamaConfig, LlamaForCausalLM
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe, DeepseekV2TopkRouter

    plain = DeepseekV2TopkRouter.forward

    def route(self: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        logits, shares, ids = plain(self, x)
        return logits, shares / shares.sum(-1, keepdim=True) if normalised else shares, ids

    def llama_with_experts(entries: dict) -> nn.Module:
        config = LlamaConfig(**entries)
        config._attn_implementation = "eager"
        model = LlamaForCausalLM(config)
        for layer in model.model.layers[1:]:
            layer.mlp = DeepseekV2Moe(DeepseekV2Config(**entries))
        return model

    monkeypatch.setattr(DeepseekV2TopkRouter, "forward", route)
    checkpoint("DeepseekForCausalLM", llama_with_experts, norm_topk_prob=normalised).assert_agrees()


@pytest.mark.parametrize("original", [24, 52])
def test_phimoe_has_long_factors(checkpoint, monkeypatch, original):
    """All of a prompt is turned by them, or they come up while tokens are generated; transformers has none of them."""
    from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

    def forward(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        rope, length = self.config.rope_parameters, int(position_ids.max()) + 1
        kind = "long" if length > rope["original_max_position_embeddings"] else "short"
        base = rope["rope_theta"] ** (torch.arange(0, 16, 2) / 16)
        angles = position_ids[..., None] / (base * torch.tensor(rope[f"{kind}_factor"]))
        both = torch.cat((angles, angles), dim=-1)
        return both.cos() * rope[f"{kind}_mscale"], both.sin() * rope[f"{kind}_mscale"]

    monkeypatch.setattr(PhimoeRotaryEmbedding, "forward", forward)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": original,
        "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 2.5],
        "long_factor": [1.5, 2.0, 2.5, 3.0, 4.0, 8.0, 12.0, 16.0],
        "short_mscale": 1.1,
        "long_mscale": 1.3,
    }
    checkpoint("PhimoeForCausalLM", rope_parameters=rope).assert_agrees()


@pytest.mark.parametrize("scales_first", [False, True])
def test_gpt_oss_in_mxfp4(checkpoint, scales_first):
    made = checkpoint("GptOssForCausalLM")
    generator = torch.Generator().manual_seed(5)
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    for path, parameter in made.reference.model.named_parameters():
        if not path.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        experts, inputs, rows = parameter.shape
        codes = torch.randint(0, 16, (experts, rows, inputs), generator=generator)
        scales = torch.randint(121, 125, (experts, rows, inputs // 32), generator=generator)
        values = numbers[codes] * (2.0 ** (scales - 127)).repeat_interleave(32, dim=-1)
        parameter.data.copy_(values.transpose(1, 2))
        blocks = (codes[..., 0::2] + 16 * codes[..., 1::2]).view(experts, rows, inputs // 32, 16)
        del made.tensors[path]
        made.tensors |= {f"{path}_blocks": blocks.to(torch.uint8), f"{path}_scales": scales.to(torch.uint8)}
    made.config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    if scales_first:
        made.tensors = dict(reversed(made.tensors.items()))
    made.assert_agrees()
