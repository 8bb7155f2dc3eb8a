"""DeciLM and Nemotron-NAS: what a configuration says of each layer."""

import pytest

from modelport.plugins.text.decilm import DeciLMConfig

SHAPE = {"vocab_size": 8, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}


def config(**entries) -> DeciLMConfig:
    return DeciLMConfig.model_validate({**SHAPE, **entries})


def test_key_value_heads_of_each_layer():
    assert [config(num_key_value_heads_per_layer=[4, 1]).kv_heads(i) for i in range(2)] == [4, 1]
    assert [config(num_key_value_heads=2).kv_heads(i) for i in range(2)] == [2, 2]
    blocks = [{"attention": {"n_heads_in_group": 4}, "ffn": {}}, {"attention": {}, "ffn": {}}]
    assert [config(block_configs=blocks, num_key_value_heads=None).kv_heads(i) for i in range(2)] == [2, 8]


def test_widths_are_rounded_up():
    """Two thirds of the multiple of the hidden size, to the next 256; Nemotron-51B's are among them."""
    blocks = [{"ffn": {"ffn_mult": 1.3125}}, {"ffn": {"ffn_mult": 5.25}}]
    assert [config(block_configs=blocks, intermediate_size=None).width(i) for i in range(2)] == [256, 512]
    assert [config(block_configs=blocks, hidden_size=8192).width(i) for i in range(2)] == [7168, 28672]
    assert config(block_configs=[{}, {"ffn": {"intermediate_size": 96}}], intermediate_size=64).width(1) == 96
    assert config(intermediate_size=64).width(0) == 64


@pytest.mark.parametrize("key", ["num_key_value_heads_per_layer", "block_configs"])
def test_one_entry_for_each_layer(key):
    entry = 2 if key.startswith("num") else {}
    with pytest.raises(ValueError, match=f"{key} has 3 entries for num_hidden_layers=2"):
        config(**{key: [entry] * 3})


def test_sinks_are_refused():
    with pytest.raises(ValueError, match="window_length=8192"):
        config(block_configs=[{"attention": {"window_length": 8192, "num_sink_tokens": 4}}] * 2)
