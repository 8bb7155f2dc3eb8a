"""GPT-2 as it is published: with and without a prefix, with stored masks, with a second copy of the tied head."""

import pytest
import torch


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("head", [False, True], ids=["tied", "copied"])
def test_published_layouts(checkpoint, prefix, head):
    made = checkpoint("GPT2LMHeadModel", scale_attn_by_inverse_layer_idx=False)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in made.tensors.items()}
    bare.pop("lm_head.weight", None)
    for layer in range(3):
        bare[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 512, 512).tril()
        bare[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    made.tensors = {prefix + name: tensor for name, tensor in bare.items()}
    if head:
        made.tensors["lm_head.weight"] = bare["wte.weight"].clone()
    for key in ("tie_word_embeddings", "n_inner", "scale_attn_weights", "reorder_and_upcast_attn"):
        made.config.pop(key, None)  # the first configurations lack them
    made.assert_agrees()
