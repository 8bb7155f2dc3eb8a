"""Qwen3: every flag."""

import pytest


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}, id="sliding"),
        pytest.param({"attention_bias": True, "tie_word_embeddings": True}, id="biases-tied"),
        pytest.param({"head_dim": 16, "num_key_value_heads": 4}, id="multi-head"),
    ],
)
def test_variants(checkpoint, flags):
    checkpoint("Qwen3ForCausalLM", **flags).assert_agrees()


def test_window_without_layer_types(checkpoint):
    """As published; transformers 5 writes the types out."""
    made = checkpoint("Qwen3ForCausalLM", use_sliding_window=True, sliding_window=20, max_window_layers=1)
    del made.config["layer_types"]
    made.assert_agrees()
