"""OPT as published: names without `model.`, a second copy of the head, a configuration of its time."""

import pytest


@pytest.mark.parametrize("flags", [{}, {"word_embed_proj_dim": 32, "do_layer_norm_before": False}], ids=["66b", "350m"])
def test_names_without_prefix(checkpoint, flags):
    made = checkpoint("OPTForCausalLM", **flags)
    made.tensors = {name.removeprefix("model."): tensor for name, tensor in made.tensors.items()}
    made.tensors["lm_head.weight"] = made.tensors["decoder.embed_tokens.weight"].clone()
    made.config = {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "activation_function": "relu",
        "vocab_size": 320,
        "hidden_size": 64,
        "ffn_dim": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "do_layer_norm_before": True,
        "word_embed_proj_dim": 64,
        "torch_dtype": "float16",
        **flags,
    }
    made.assert_agrees()
