"""Bloom as first published: tensor names without a prefix, a configuration in older words."""


def test_first_release(checkpoint):
    made = checkpoint("BloomForCausalLM")
    made.tensors = {name.removeprefix("transformer."): tensor for name, tensor in made.tensors.items()}
    made.config = {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "vocab_size": 320,
        "n_embed": 64,
        "n_layer": 3,
        "num_attention_heads": 4,
        "seq_length": 2048,
        "layer_norm_epsilon": 1e-5,
        "offset_alibi": 100,
        "masked_softmax_fusion": True,
        "pretraining_tp": 4,
        "torch_dtype": "float16",
    }
    made.assert_agrees()
