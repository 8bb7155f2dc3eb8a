"""OLMo 2: every flag."""

import pytest


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"num_key_value_heads": 4, "rms_norm_eps": 1e-6}, id="olmo2-7b"),
        pytest.param({"attention_bias": True, "tie_word_embeddings": True}, id="biases-tied"),
    ],
)
def test_variants(checkpoint, flags):
    checkpoint("Olmo2ForCausalLM", **flags).assert_agrees()
