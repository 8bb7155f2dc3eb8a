"""GPT-J as published: stored masks, a configuration of its time."""

import torch


def test_published_checkpoints_store_masks(checkpoint):
    made = checkpoint("GPTJForCausalLM")
    for layer in range(3):
        made.tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
        made.tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
    made.config = {
        "architectures": ["GPTJForCausalLM"],
        "model_type": "gptj",
        "vocab_size": 320,
        "n_embd": 96,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": None,
        "n_positions": 512,
        "rotary": True,
        "rotary_dim": 12,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    made.assert_agrees()
