"""Gemma: the spellings of its activation, and the shapes of both sizes."""

import pytest

from modelport import SamplingParams
from modelport.plugins.text.gemma import GemmaConfig


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"num_key_value_heads": 4}, id="gemma-7b"),
        pytest.param({"attention_bias": True}, id="biases"),
        pytest.param({"tie_word_embeddings": False}, id="own-head"),
    ],
)
def test_variants(checkpoint, flags):
    checkpoint("GemmaForCausalLM", **flags).assert_agrees()


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"hidden_act": "gelu"}, "gelu_pytorch_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": None}, "gelu_pytorch_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
        ({"hidden_act": "gelu", "hidden_activation": "relu"}, "relu"),
        ({"hidden_act": "silu"}, "silu"),
        ({}, "gelu_pytorch_tanh"),
    ],
)
def test_activation(written, meant):
    shape = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    assert GemmaConfig.model_validate({**shape, **written}).hidden_act == meant


def test_first_configs(checkpoint):
    """No `tie_word_embeddings`, "gelu", and a stored copy of the tied head, as fine-tunes have it."""
    made = checkpoint("GemmaForCausalLM")
    del made.config["tie_word_embeddings"]
    made.config |= {"hidden_act": "gelu", "hidden_activation": None}
    made.tensors["lm_head.weight"] = made.tensors["model.embed_tokens.weight"].clone()
    made.assert_agrees()


def test_gemma3_that_sees_both_ways_is_refused(checkpoint):
    made = checkpoint("Gemma3ForCausalLM")
    made.config["use_bidirectional_attention"] = True
    with pytest.raises(ValueError, match=r"use_bidirectional_attention=True.*take a checkpoint that generates"):
        made.engine()


def test_gemma3_caps_scores_as_gemma2_does(checkpoint):
    """transformers 5 reads `attn_logit_softcapping` and never uses it; no published checkpoint sets it."""
    made = checkpoint("Gemma3ForCausalLM")
    plain = made.engine().generate([[5, 6, 7, 8, 9]], SamplingParams(max_tokens=1, prompt_logprobs=0))[0]
    made.config["attn_logit_softcapping"] = 0.01
    capped = made.engine().generate([[5, 6, 7, 8, 9]], SamplingParams(max_tokens=1, prompt_logprobs=0))[0]
    assert plain.prompt_logprobs[2] != capped.prompt_logprobs[2]
