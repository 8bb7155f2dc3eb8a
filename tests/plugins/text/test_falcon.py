"""Falcon: every generation of its block, and the configurations of the first release."""

import pytest

RW = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
GROUPED = {"new_decoder_architecture": True, "num_attention_heads": 8, "num_kv_heads": 2}


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"num_attention_heads": 4}, id="7b"),
        pytest.param(GROUPED, id="40b"),
        pytest.param({**GROUPED, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 112}, id="falcon-2"),
        pytest.param(RW, id="rw"),
        pytest.param({"multi_query": False, "bias": True}, id="parallel-multi-head"),
        pytest.param({"parallel_attn": False, "tie_word_embeddings": False}, id="sequential-multi-query"),
        pytest.param({"rope_theta": 500042.0, "activation": "relu"}, id="other-base"),
    ],
)
def test_variants(checkpoint, flags):
    checkpoint("FalconForCausalLM", **flags).assert_agrees()


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
    made = checkpoint("RWForCausalLM", **flags)
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
