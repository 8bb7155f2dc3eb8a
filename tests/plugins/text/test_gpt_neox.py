"""GPT-NeoX as published: stored masks and frequencies, a configuration of its time, the head's names."""

import pytest
import torch

KEYS = "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"


@pytest.mark.parametrize("head", ["embed_out.weight", "lm_head.weight"])
@pytest.mark.parametrize("written", [{}, {"rotary_pct": 1.0, "rotary_emb_base": 500, "use_parallel_residual": False}])
def test_published_layout(checkpoint, written, head):
    made = checkpoint("GPTNeoXForCausalLM", **written)
    made.tensors = {"lm_head.weight" if n == "embed_out.weight" else n: t for n, t in made.tensors.items()}
    made.tensors[head] = made.tensors.pop("lm_head.weight")
    for layer in range(3):
        stem = f"gpt_neox.layers.{layer}.attention."
        made.tensors[stem + "bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
        made.tensors[stem + "masked_bias"] = torch.tensor(-1e9)
        made.tensors[stem + "rotary_emb.inv_freq"] = torch.ones(4)
    made.config = {key: made.config[key] for key in KEYS} | {"architectures": ["GPTNeoXForCausalLM"], **written}
    made.assert_agrees()
