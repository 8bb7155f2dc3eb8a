"""Granite: every flag, and configurations as transformers 4 wrote them."""

import pytest


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"tie_word_embeddings": False}, id="own-head"),
        pytest.param({"attention_bias": True, "mlp_bias": True}, id="biases"),
        pytest.param({"num_key_value_heads": 4, "logits_scaling": 1.0}, id="powerlm-heads"),
    ],
)
def test_variants(checkpoint, flags):
    checkpoint("GraniteForCausalLM", **flags).assert_agrees()


def test_old_rope_theta(checkpoint):
    made = checkpoint("GraniteForCausalLM", rope_parameters={"rope_type": "default", "rope_theta": 200.0})
    del made.config["rope_parameters"]
    made.config |= {"rope_theta": 200.0, "rope_scaling": None}
    made.assert_agrees()
