"""Falcon: the RW models, and the configurations of the first release."""

import pytest

RW = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
GROUPED = {"new_decoder_architecture": True, "num_attention_heads": 8, "num_kv_heads": 2}


def mended(made):
    """transformers' eager attention adds ALiBi a second time, after the mask that has it already; its default not."""
    made.reference.model.config._attn_implementation = "sdpa"
    return made


@pytest.mark.parametrize("heads", [4, 8])  # powers of two, as published: others' slopes the reference rounds
def test_alibi(checkpoint, heads):
    mended(checkpoint("FalconForCausalLM", **RW, num_attention_heads=heads)).assert_agrees()


@pytest.mark.parametrize(
    ("flags", "written"),
    [
        pytest.param(
            {}, {"model_type": "RefinedWebModel", "multi_query": True, "parallel_attn": True, "alibi": False}, id="7b"
        ),
        pytest.param(GROUPED, {"model_type": "RefinedWeb", "n_head_kv": 2, "parallel_attn": True}, id="40b"),
        pytest.param(RW, {"model_type": "RefinedWebModel", **RW}, id="rw"),
    ],
)
def test_first_release(checkpoint, flags, written):
    made = mended(checkpoint("RWForCausalLM", **flags))
    made.tensors["lm_head.weight"] = made.tensors["transformer.word_embeddings.weight"].clone()
    made.config = {
        "architectures": ["RWForCausalLM"],
        "vocab_size": 320,
        "hidden_size": 64,
        "n_layer": 3,
        "n_head": made.config["num_attention_heads"],
        "bias": False,
        "apply_residual_connection_post_layernorm": False,
        "layer_norm_epsilon": 1e-5,
        "torch_dtype": "bfloat16",
        **written,
    }
    made.assert_agrees()
