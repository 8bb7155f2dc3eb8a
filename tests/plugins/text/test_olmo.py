"""OLMo: every flag, and AI2's own layout."""

import pytest
import torch


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"clip_qkv": None, "tie_word_embeddings": True}, id="olmo-1b"),
        pytest.param({"num_key_value_heads": 2, "attention_bias": True}, id="grouped-biases"),
    ],
)
def test_variants(checkpoint, flags):
    checkpoint("OlmoForCausalLM", **flags).assert_agrees()


@pytest.mark.parametrize("tied", [True, False])
def test_own_layout(checkpoint, tied):
    made = checkpoint("OLMoForCausalLM", intermediate_size=128, tie_word_embeddings=tied)
    new, old = made.tensors, {}
    old["wte"] = new["model.embed_tokens.weight"]
    if not tied:
        old["ff_out"] = new["lm_head.weight"]
    for layer in range(3):
        of, to = f"model.layers.{layer}.", f"blocks.{layer}."
        old[to + "att_proj"] = torch.cat([new[f"{of}self_attn.{p}_proj.weight"] for p in "qkv"])
        old[to + "attn_out"] = new[of + "self_attn.o_proj.weight"]
        old[to + "ff_proj"] = torch.cat([new[f"{of}mlp.{p}_proj.weight"] for p in ("up", "gate")])
        old[to + "ff_out"] = new[of + "mlp.down_proj.weight"]
    made.tensors = {f"model.transformer.{name}.weight": tensor for name, tensor in old.items()}
    made.config = {
        "architectures": ["OLMoForCausalLM"],
        "model_type": "olmo",
        "vocab_size": 301,
        "embedding_size": 320,
        "d_model": 64,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": None,
        # the tied sizes were published with a ratio, the others with a number
        "mlp_ratio": 4,
        "mlp_hidden_size": None if tied else 256,
        "max_sequence_length": 512,
        "clip_qkv": 0.7,
        "weight_tying": tied,
    }
    made.assert_agrees()
