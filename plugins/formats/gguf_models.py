"""What each GGUF architecture is called, configured and laid out as in its original checkpoint.

Decisions: a table per architecture; a model that the file describes in a way the original configuration cannot say
(other divisors of rotary frequencies, sizes that differ between layers) is refused, not approximated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelport.plugins.formats.gguf_header import Header
from modelport.plugins.formats.gguf_tensors import read_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Family:
    """How one GGUF architecture maps to the original.

    :ivar names: tensor names outside of layers, then those of layer `{}`.
    :ivar keys: configuration entries of its own.
    :ivar restore: undoes what llama.cpp did to a tensor, given its HF name and the header.
    """

    name: str
    model_type: str
    names: dict[str, str]
    keys: Callable[[Header], dict[str, Any]]
    restore: Callable[[str, Tensor, Header], Tensor]


_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}
_GEMMA2 = _LLAMA | {
    "post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    "post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}
_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "transformer.h.{}.ln_1",
    "attn_qkv": "transformer.h.{}.attn.c_attn",
    "attn_output": "transformer.h.{}.attn.c_proj",
    "ffn_norm": "transformer.h.{}.ln_2",
    "ffn_up": "transformer.h.{}.mlp.c_fc",
    "ffn_down": "transformer.h.{}.mlp.c_proj",
}


def _llama_keys(header: Header) -> dict[str, Any]:
    biased = header.tensor("blk.0.attn_q.bias") is not None
    return {"hidden_act": "silu", "attention_bias": biased, **_rotary_keys(header)}


def _qwen2_keys(header: Header) -> dict[str, Any]:
    return {"hidden_act": "silu", "use_sliding_window": False, **_rotary_keys(header)}


def _gemma2_keys(header: Header) -> dict[str, Any]:
    keys = _rotary_keys(header)
    # not in the file; the published sizes differ: the 27B scales by hidden / heads, the others by the head's size
    by_head = header.get("block_count") != 46
    return keys | {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": keys["head_dim"] if by_head else keys["hidden_size"] // keys["num_attention_heads"],
        "attn_logit_softcapping": header.get("attn_logit_softcapping"),
        "final_logit_softcapping": header.get("final_logit_softcapping"),
        "sliding_window": header.get("attention.sliding_window"),
    }


def _gpt2_keys(header: Header) -> dict[str, Any]:
    return {
        "n_embd": header.get("embedding_length"),
        "n_layer": header.get("block_count"),
        "n_head": header.get("attention.head_count"),
        "n_inner": header.get("feed_forward_length"),
        "n_positions": header.get("context_length"),
        "layer_norm_epsilon": header.get("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def _rotary_keys(header: Header) -> dict[str, Any]:
    heads, hidden = header.get("attention.head_count"), header.get("embedding_length")
    kv_heads = header.get("attention.head_count_kv")
    for name, value in (
        ("feed_forward_length", header.get("feed_forward_length")),
        ("attention.head_count_kv", kv_heads),
    ):
        if isinstance(value, list):
            raise ValueError(
                f"{header.path}: {name} differs between layers, which {header.architecture!r} models cannot"
            )
    return {
        "hidden_size": hidden,
        "intermediate_size": header.get("feed_forward_length"),
        "num_hidden_layers": header.get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "head_dim": header.get("attention.key_length") or hidden // heads,
        "max_position_embeddings": header.get("context_length"),
        "rms_norm_eps": header.get("attention.layer_norm_rms_epsilon"),
        "rope_theta": header.get("rope.freq_base") or 10000.0,
        **({"rope_scaling": scaling} if (scaling := _rope_scaling(header)) else {}),
    }


def _rope_scaling(header: Header) -> dict[str, Any] | None:
    kind, factor = header.get("rope.scaling.type"), header.get("rope.scaling.factor")
    if kind in (None, "none") or not factor:
        return _llama3_scaling(header)
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{header.path} scales rotary positions by {kind!r}; only linear and yarn are known")
    original = header.get("rope.scaling.original_context_length")
    return {"rope_type": kind, "factor": factor} | ({"original_max_position_embeddings": original} if original else {})


def _llama3_scaling(header: Header) -> dict[str, Any] | None:
    """Llama 3.1 and later: the file has one divisor per frequency, where config.json has the rule that gives them."""
    tensor = header.tensor("rope_freqs.weight")
    if tensor is None:
        return None
    divisors = read_tensor(header, tensor).flatten().tolist()
    low, high, original, factor = 1.0, 4.0, 8192, max(divisors)  # all published models have these; checked below
    base, size = header.get("rope.freq_base") or 10000.0, 2 * len(divisors)
    for i, divisor in enumerate(divisors):
        turns = original / (2 * math.pi * base ** (2 * i / size))  # of this frequency within the original context
        blend = min(max((turns - low) / (high - low), 0.0), 1.0)
        if not math.isclose(divisor, 1 / ((1 - blend) / factor + blend), rel_tol=1e-3):
            raise ValueError(
                f"{header.path}: rope_freqs.weight[{i}] = {divisor} breaks Llama 3's rule for factor {factor}; "
                "use the original safetensors checkpoint"
            )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _unchanged(name: str, tensor: Tensor, header: Header) -> Tensor:
    return tensor


def _unpermuted(name: str, tensor: Tensor, header: Header) -> Tensor:
    """llama.cpp interleaves the two halves that rotate together; put each head's first half first again."""
    if ".q_proj." in name:
        heads = header.get("attention.head_count")
    elif ".k_proj." in name:
        heads = header.get("attention.head_count_kv") or header.get("attention.head_count")
    else:
        return tensor
    import torch

    rows = tensor.shape[0]
    # in numpy: torch's copy of four dimensions takes fifty times as long
    halves = tensor.numpy().reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2)
    return torch.from_numpy(halves.reshape(tensor.shape))


def _gemma_norms(name: str, tensor: Tensor, header: Header) -> Tensor:
    return tensor - 1 if name.endswith("norm.weight") else tensor  # llama.cpp folds Gemma's "1 + weight" in


def _transposed(name: str, tensor: Tensor, header: Header) -> Tensor:
    return tensor.t() if ".c_" in name and tensor.ndim == 2 else tensor  # Conv1D keeps (in, out)


_FAMILIES = {
    "llama": Family("LlamaForCausalLM", "llama", _LLAMA, _llama_keys, _unpermuted),
    "qwen2": Family("Qwen2ForCausalLM", "qwen2", _LLAMA, _qwen2_keys, _unchanged),
    "gemma2": Family("Gemma2ForCausalLM", "gemma2", _GEMMA2, _gemma2_keys, _gemma_norms),
    "gpt2": Family("GPT2LMHeadModel", "gpt2", _GPT2, _gpt2_keys, _transposed),
}


def family_of(header: Header) -> Family:
    """How the file's architecture maps to the original; ValueError when it is not known."""
    if header.architecture not in _FAMILIES:
        raise ValueError(
            f"{header.path} holds a model of GGUF architecture {header.architecture!r}; known are "
            f"{', '.join(_FAMILIES)}. Use the original safetensors checkpoint"
        )
    return _FAMILIES[header.architecture]


def config_of(header: Header) -> dict[str, Any]:
    """The configuration, as the original checkpoint's `config.json` would give it."""
    family, embedding = family_of(header), header.tensor("token_embd.weight")
    if embedding is None:
        raise ValueError(f"{header.path} has no tensor token_embd.weight; is it a whole model?")
    ids = {role: header.fields.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos", "eot", "padding")}
    ends = [i for i in dict.fromkeys((ids["eos"], ids["eot"])) if i is not None]
    config = {
        "architectures": [family.name],
        "model_type": family.model_type,
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": header.tensor("output.weight") is None,
        "bos_token_id": ids["bos"],
        "eos_token_id": ends if len(ends) > 1 else (ends or [None])[0],
        "pad_token_id": ids["padding"],
        **family.keys(header),
    }
    return {key: value for key, value in config.items() if value is not None}
