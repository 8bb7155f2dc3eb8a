"""GPTBigCode: both layouts of the fused projection, every flag, and the names of older checkpoints."""

import pytest
import torch


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"multi_query": False}, id="multi-head"),
        pytest.param({"activation_function": "gelu", "n_inner": None}, id="starcoder"),
        pytest.param({"activation_function": "gelu_fast"}, id="santacoder"),
        pytest.param({"scale_attn_weights": False, "tie_word_embeddings": False}, id="own-head-unscaled"),
    ],
)
def test_variants(checkpoint, flags):
    checkpoint("GPTBigCodeForCausalLM", **flags).assert_agrees()


def test_older_checkpoints(checkpoint):
    """The first class name, no prefix, stored masks, a copy of the tied head, a config without today's keys."""
    made = checkpoint("GPTBigCodeLMHeadModel")
    assert made.config["architectures"] == ["GPTBigCodeLMHeadModel"]
    made.config = {k: v for k, v in made.config.items() if k not in ("tie_word_embeddings", "num_key_value_heads")}
    made.tensors = {name.removeprefix("transformer."): tensor for name, tensor in made.tensors.items()}
    made.tensors["lm_head.weight"] = made.tensors["wte.weight"].clone()
    made.tensors["bias"] = torch.ones(512, 512, dtype=torch.bool).tril()
    for layer in range(3):
        made.tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 512, 512, dtype=torch.uint8)
        made.tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    made.assert_agrees()
