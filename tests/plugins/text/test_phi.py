"""Phi: every flag, and the layout of the first release."""

import pytest
import torch


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"qk_layernorm": True}, id="qk-norm"),
        pytest.param({"num_key_value_heads": 2, "hidden_act": "relu"}, id="grouped"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
    ],
)
def test_variants(checkpoint, flags):
    checkpoint("PhiForCausalLM", **flags).assert_agrees()


def test_half_of_a_head_is_rotated_when_nothing_is_said(checkpoint):
    made = checkpoint("PhiForCausalLM", partial_rotary_factor=0.5)
    del made.config["rope_parameters"]
    made.config["rope_theta"] = 10000.0
    made.config.pop("partial_rotary_factor", None)
    made.assert_agrees()


NEW_TO_OLD = {
    "model.embed_tokens.": "transformer.embd.wte.",
    "model.layers.": "transformer.h.",
    "model.final_layernorm.": "lm_head.ln.",
    "lm_head.": "lm_head.linear.",
}


def test_layout_of_the_first_release(checkpoint):
    made = checkpoint("PhiForCausalLM", intermediate_size=320)
    old = {}
    for name, tensor in made.tensors.items():
        prefix = next(p for p in NEW_TO_OLD if name.startswith(p))
        name = NEW_TO_OLD[prefix] + name.removeprefix(prefix)
        old[name.replace("input_layernorm", "ln").replace("self_attn.dense", "mixer.out_proj")] = tensor
    for layer in range(3):
        for kind in ("weight", "bias"):
            parts = [old.pop(f"transformer.h.{layer}.self_attn.{p}_proj.{kind}") for p in "qkv"]
            old[f"transformer.h.{layer}.mixer.Wqkv.{kind}"] = torch.cat(parts)
        old[f"transformer.h.{layer}.mixer.rotary_emb.inv_freq"] = torch.ones(4)
    made.tensors = old
    made.config = {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi-msft",
        "vocab_size": 320,
        "n_embd": 80,
        "n_layer": 3,
        "n_head": 4,
        "n_head_kv": None,
        "n_inner": None,
        "n_positions": 512,
        "rotary_dim": 8,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    made.assert_agrees()
