"""Families whose code has died: flags that no recorded output has, against a living model of the same mathematics."""

import re

import pytest
import torch
from torch import nn


def llama(entries: dict, **more) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**entries, **more})
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


def shaken(model: nn.Module) -> nn.Module:
    """With biases and norms that are not what they begin as."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name or "ln_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def grouped(tensors: dict, kv_heads: int, size: int) -> dict:
    """Llama's tensors as InternLM2 names and groups them."""
    names = {
        "self_attn.o_proj": "attention.wo",
        "input_layernorm": "attention_norm",
        "mlp.gate_proj": "feed_forward.w1",
    }
    names |= {
        "post_attention_layernorm": "ffn_norm",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
    names |= {"model.embed_tokens": "model.tok_embeddings", "lm_head": "output"}
    held = {}
    for name, tensor in tensors.items():
        if "q_proj" in name:
            parts = [tensors[name.replace("q_proj", part)].unflatten(0, (kv_heads, -1, size)) for part in QKV]
            held[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(parts, dim=1).flatten(0, 2)
        elif "k_proj" not in name and "v_proj" not in name:
            held[re.sub("|".join(map(re.escape, names)), lambda found: names[found[0]], name)] = tensor
    return held


QKV = ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"bias": True}, id="biases"),
        pytest.param({"num_key_value_heads": 1}, id="one-kv-head"),
        pytest.param({"num_key_value_heads": 4}, id="own-kv-heads"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
    ],
)
def test_internlm2(checkpoint, flags):
    def make(entries: dict) -> nn.Module:
        return shaken(llama(entries, attention_bias=entries["bias"]))

    made = checkpoint("InternLM2ForCausalLM", make, **flags)
    made.tensors = grouped(made.tensors, made.config["num_key_value_heads"], 16)
    made.assert_agrees()


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({}, id="grouped-heads"),
        pytest.param({"attention_bias": True}, id="biases"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
    ],
)
def test_orion(checkpoint, flags):
    def make(entries: dict) -> nn.Module:
        model = llama(entries)
        for owner in (model.model, *model.model.layers):
            for name in ("norm", "input_layernorm", "post_attention_layernorm"):
                if hasattr(owner, name):
                    setattr(owner, name, nn.LayerNorm(entries["hidden_size"], eps=1e-5))
        return shaken(model)

    checkpoint("OrionForCausalLM", make, **flags).assert_agrees()


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"tie_word_embeddings": False}, id="untied"),
        pytest.param({"attention_bias": True}, id="biases"),
        pytest.param({"num_key_value_heads": 4}, id="own-kv-heads"),
        pytest.param({"hidden_act": "fatrelu", "hidden_act_param": 0.05}, id="MiniCPM-S"),
    ],
)
def test_minicpm(checkpoint, flags):
    """Granite has the same factors under names of its own."""

    def make(entries: dict) -> nn.Module:
        from transformers import GraniteConfig, GraniteForCausalLM

        known = {key: value for key, value in entries.items() if key != "hidden_act"}
        config = GraniteConfig(
            **{"tie_word_embeddings": True, **known},
            embedding_multiplier=entries["scale_emb"],
            residual_multiplier=entries["scale_depth"] / entries["num_hidden_layers"] ** 0.5,
            logits_scaling=entries["hidden_size"] / entries["dim_model_base"],
            attention_multiplier=(entries["hidden_size"] / entries["num_attention_heads"]) ** -0.5,
        )
        config._attn_implementation = "eager"
        model = GraniteForCausalLM(config)
        if "hidden_act" in entries:
            for layer in model.model.layers:
                layer.mlp.act_fn = nn.Threshold(entries["hidden_act_param"], 0.0)
        return shaken(model)

    checkpoint("MiniCPMForCausalLM", make, **flags).assert_agrees()


@pytest.mark.parametrize("flags", [{}, {"scale_attn_by_inverse_layer_idx": True}], ids=["learned", "by-layer"])
def test_jais_with_positions_of_gpt2(checkpoint, flags):
    def make(entries: dict) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(**entries)
        config._attn_implementation = "eager"
        return shaken(GPT2LMHeadModel(config))

    plain = {
        "mup_embeddings_scale": 1.0,
        "mup_output_alpha": 1.0,
        "mup_width_scale": 1.0,
        "mup_scale_qk_dot_by_d": False,
    }
    plain |= {"activation_function": "gelu_new", "position_embedding_type": "learned"}
    checkpoint("JAISLMHeadModel", make, **plain, **flags).assert_agrees()


@pytest.mark.parametrize("bias", [False, True])
def test_deepseek_without_experts(checkpoint, bias):
    def make(entries: dict) -> nn.Module:
        return shaken(llama(entries))

    checkpoint("DeepseekForCausalLM", make, n_routed_experts=None, attention_bias=bias).assert_agrees()
