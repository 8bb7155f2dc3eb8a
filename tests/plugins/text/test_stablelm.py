"""StableLM in its first release's words, and norms of heads that are not all there."""

import pytest
import torch


@pytest.mark.parametrize("rotated", [0.25, 0.5])
def test_first_release(checkpoint, rotated):
    made = checkpoint("StableLMEpochForCausalLM", partial_rotary_factor=rotated, layer_norm_eps=1e-3)
    for layer in range(3):
        made.tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    keys = "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
    made.config = {key: made.config[key] for key in keys} | {
        "architectures": ["StableLMEpochForCausalLM"],
        "model_type": "stablelm_epoch",
        "num_key_value_heads": 4,
        "norm_eps": 1e-3,
        "rope_theta": 10000,
        "rotary_scaling_factor": 1.0,
        "torch_dtype": "bfloat16",
    }
    if rotated != 0.25:
        made.config["rope_pct"] = rotated
    made.assert_agrees()


def test_a_missing_norm_of_a_head_is_named(checkpoint):
    made = checkpoint("StableLmForCausalLM", qk_layernorm=True)
    del made.tensors["model.layers.1.self_attn.k_layernorm.norms.2.weight"]
    with pytest.raises(ValueError, match=r"k_layernorm\.weight"):
        made.engine()
