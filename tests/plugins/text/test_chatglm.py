"""ChatGLM: flags that no recorded output has, against transformers' GLM, which is GLM-4 under Llama's names."""

import pytest
import torch
from torch import nn

from modelport.plugins.text.chatglm import ChatGLMConfig

NAMES = {
    "model.embed_tokens.": "transformer.embedding.word_embeddings.",
    "model.layers.": "transformer.encoder.layers.",
    "model.norm.": "transformer.encoder.final_layernorm.",
    "lm_head.": "transformer.output_layer.",
    "self_attn.o_proj": "self_attention.dense",
    "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}


def make(entries: dict) -> nn.Module:
    from transformers import GlmConfig, GlmForCausalLM

    e = {"add_bias_linear": False, "rmsnorm": True, "post_layer_norm": True, **entries}
    heads, ratio = e["num_attention_heads"], e.get("rope_ratio", 1.0)
    rope = {"rope_type": "default", "rope_theta": 10000.0 * ratio}
    if "chatglm2" in e.get("_name_or_path", ""):
        rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": ratio}
    config = GlmConfig(
        vocab_size=e["padded_vocab_size"],
        hidden_size=e["hidden_size"],
        intermediate_size=e["ffn_hidden_size"],
        num_hidden_layers=e["num_layers"],
        num_attention_heads=heads,
        num_key_value_heads=e["multi_query_group_num"] if e["multi_query_attention"] else heads,
        head_dim=e["kv_channels"],
        max_position_embeddings=e["seq_length"],
        rms_norm_eps=e.get("layernorm_epsilon", 1e-5),
        attention_bias=e["add_qkv_bias"] or e["add_bias_linear"],
        tie_word_embeddings=e.get("tie_word_embeddings", False),
        rope_parameters={"partial_rotary_factor": 0.5, **rope},
        pad_token_id=None,
    )
    config._attn_implementation = "eager"
    model = GlmForCausalLM(config)
    for layer in model.model.layers:
        if e["add_bias_linear"]:
            for owner, name in ((layer.self_attn, "o_proj"), (layer.mlp, "gate_up_proj"), (layer.mlp, "down_proj")):
                old = getattr(owner, name)
                setattr(owner, name, nn.Linear(old.in_features, old.out_features))
        if e.get("apply_residual_connection_post_layernorm"):
            layer.forward = normed_residual.__get__(layer)
    if not e["rmsnorm"]:
        for owner in (model.model, *model.model.layers):
            for name in ("norm", "input_layernorm", "post_attention_layernorm"):
                if hasattr(owner, name):
                    setattr(owner, name, nn.LayerNorm(e["hidden_size"], eps=e.get("layernorm_epsilon", 1e-5)))
    if not e["post_layer_norm"]:
        model.model.norm = nn.Identity()
    return model


def normed_residual(self: nn.Module, hidden_states: torch.Tensor, **step) -> torch.Tensor:
    """A layer's forward where what is added to is normalised too."""
    normed = self.input_layernorm(hidden_states)
    normed = self.post_attention_layernorm(normed + self.self_attn(hidden_states=normed, **step)[0])
    return normed + self.mlp(normed)


def renamed(tensors: dict, entries: dict) -> dict:
    """With the names, and the fused projection, of published checkpoints."""
    size, held = entries["kv_channels"], {}
    pairs = torch.arange(size)
    if not entries.get("original_rope", True):  # halves are turned, not neighbours
        turned = torch.arange(size // 2)
        pairs = torch.cat((turned[0::2], turned[1::2], torch.arange(size // 2, size)))
    for name, tensor in tensors.items():
        if "q_proj" in name:
            q, k, v = (tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj"))
            q, k = (part.unflatten(0, (-1, size))[:, pairs].flatten(0, 1) for part in (q, k))
            held[name.replace("self_attn.q_proj", "self_attention.query_key_value")] = torch.cat((q, k, v))
        elif "k_proj" not in name and "v_proj" not in name:
            held[name] = tensor
    for ours, theirs in NAMES.items():
        held = {name.replace(ours, theirs): tensor for name, tensor in held.items()}
    return held


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({}, id="plain"),
        pytest.param({"multi_query_attention": False}, id="own-kv-heads"),
        pytest.param({"multi_query_group_num": 1}, id="one-kv-head"),
        pytest.param({"add_qkv_bias": False}, id="no-bias"),
        pytest.param({"add_bias_linear": True}, id="all-biases"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
        pytest.param({"rope_ratio": 50}, id="chatglm3-6b-32k"),
        pytest.param({"rope_ratio": 2, "_name_or_path": "THUDM/chatglm2-6b-32k"}, id="chatglm2-6b-32k"),
        pytest.param({"original_rope": False}, id="halves"),
        pytest.param({"rmsnorm": False, "layernorm_epsilon": 1e-3}, id="layernorm"),
        pytest.param({"post_layer_norm": False}, id="no-last-norm"),
        pytest.param({"apply_residual_connection_post_layernorm": True}, id="normed-residual"),
    ],
)
def test_flags(checkpoint, flags):
    made = checkpoint("ChatGLMModel", make, **flags)
    made.tensors = renamed(made.tensors, made.config)
    made.tensors["transformer.rotary_pos_emb.inv_freq"] = torch.zeros(4)  # stored, and computed by us
    made.assert_agrees()


def test_nulls_are_defaults():
    """Published configurations write `rope_ratio` as null, or not at all, or as a whole number."""
    shape = {"padded_vocab_size": 8, "hidden_size": 64, "num_layers": 1, "num_attention_heads": 4, "kv_channels": 16}
    bases = [
        ChatGLMConfig.model_validate({**shape, **more}).rope_parameters.rope_theta
        for more in ({}, {"rope_ratio": None}, {"rope_ratio": 500})
    ]
    assert bases == [1e4, 1e4, 5e6]
