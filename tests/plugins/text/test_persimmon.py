"""Persimmon as published: stored frequencies, and what a configuration means that leaves rotary settings out."""

import torch


def test_published_layout(checkpoint):
    made = checkpoint("PersimmonForCausalLM", rope_theta=25000.0)
    for key in ("rope_parameters", "partial_rotary_factor", "rope_theta", "hidden_act", "qk_layernorm"):
        made.config.pop(key, None)
    for layer in range(3):
        made.tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    made.assert_agrees()
