"""Families whose code has died: flags that no recorded output has, against a living model of the same mathematics."""

import re

import pytest
import torch
from torch import nn

from modelport.plugins.text.baichuan import BaichuanConfig
from modelport.plugins.text.jais import JaisConfig


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


class Mixture(nn.Module):
    """DeepSeek's feed-forward layer with experts, one row and one expert at a time."""

    def __init__(self, entries: dict):
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaMLP

        def mlp(width: int) -> nn.Module:
            return LlamaMLP(LlamaConfig(hidden_size=entries["hidden_size"], intermediate_size=width))

        self.chosen, self.normalizes = entries["num_experts_per_tok"], entries.get("norm_topk_prob", False)
        count, width, shared = (
            entries[f"{key}"] for key in ("n_routed_experts", "moe_intermediate_size", "n_shared_experts")
        )
        self.gate = nn.Linear(entries["hidden_size"], count, bias=False)
        self.experts = nn.ModuleList(mlp(width) for _ in range(count))
        self.shared_experts = mlp(width * shared) if shared else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (1, tokens, hidden_size)
        shares, ids = self.gate(x[0].float()).softmax(-1).topk(self.chosen)
        if self.normalizes and self.chosen > 1:
            shares = shares / shares.sum(-1, keepdim=True)
        rows = [
            sum(share * self.experts[expert](row) for share, expert in zip(mine, of_row.tolist(), strict=True))
            for row, mine, of_row in zip(x[0], shares, ids, strict=True)
        ]
        out = torch.stack(rows)[None].to(x.dtype)
        return out if self.shared_experts is None else out + self.shared_experts(x)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({}, id="16b"),
        pytest.param({"norm_topk_prob": True}, id="normalised"),
        pytest.param({"norm_topk_prob": True, "num_experts_per_tok": 1}, id="one-expert"),
        pytest.param({"moe_layer_freq": 2, "first_k_dense_replace": 0}, id="every-other-layer"),
        pytest.param({"n_shared_experts": None}, id="none-shared"),
        pytest.param({"attention_bias": True, "tie_word_embeddings": True}, id="biases-tied"),
    ],
)
def test_deepseek_with_experts(checkpoint, flags):
    def make(entries: dict) -> nn.Module:
        model, every = llama(entries), entries.get("moe_layer_freq", 1)
        for index, layer in enumerate(model.model.layers):
            if index >= entries["first_k_dense_replace"] and index % every == 0:
                layer.mlp = Mixture(entries)
        return shaken(model)

    checkpoint("DeepseekForCausalLM", make, **flags).assert_agrees()


EXAONE = {
    "model.embed_tokens.": "transformer.wte.",
    "model.layers.": "transformer.h.",
    "model.norm.": "transformer.ln_f.",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.attention.out_proj",
    "self_attn.": "attn.attention.",
    "gate_proj": "c_fc_0",
    "up_proj": "c_fc_1",
    "down_proj": "c_proj",
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({}, id="3.0"),
        pytest.param({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}}, id="3.5"),
        pytest.param({"tie_word_embeddings": False}, id="untied"),
        pytest.param({"num_key_value_heads": 4, "layer_norm_epsilon": 1e-3}, id="own-kv-heads"),
        pytest.param({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 500.0}, id="squeezed"),
        pytest.param({"activation_function": "gelu", "head_dim": 32}, id="wide-heads"),
    ],
)
def test_exaone(checkpoint, flags):
    def make(entries: dict) -> nn.Module:
        same = {"tie_word_embeddings": True, "rms_norm_eps": entries.get("layer_norm_epsilon", 1e-5)}
        same |= {"num_hidden_layers": entries["num_layers"], "hidden_act": entries.get("activation_function", "silu")}
        return shaken(llama({**same, **entries}))

    made = checkpoint("ExaoneForCausalLM", make, **flags)
    for theirs, ours in EXAONE.items():
        made.tensors = {name.replace(theirs, ours): tensor for name, tensor in made.tensors.items()}
    made.tensors["transformer.h.0.attn.attention.rotary.inv_freq"] = torch.zeros(8)  # stored in early files
    made.assert_agrees()


@pytest.mark.parametrize("name", ["BaiChuanForCausalLM", "BaichuanForCausalLM"])
def test_baichuan_with_rotary_positions(checkpoint, name):
    """The spelling decides about the head: of the second, every vocabulary but the first model's is normalised."""

    class NormHead(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, nn.functional.normalize(self.weight.float()).to(x.dtype))

    def make(entries: dict) -> nn.Module:
        model = llama(entries)
        if name == "BaichuanForCausalLM":
            model.lm_head = NormHead(entries["hidden_size"], entries["vocab_size"], bias=False)
        return shaken(model)

    made = checkpoint(name, make, max_position_embeddings=512)
    held = {}
    for key, tensor in made.tensors.items():
        if "q_proj" in key:
            held[key.replace("q_proj", "W_pack")] = torch.cat(
                [made.tensors[key.replace("q_proj", part)] for part in QKV]
            )
        elif "k_proj" not in key and "v_proj" not in key:
            held[key] = tensor
    made.tensors = held | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    made.assert_agrees()


def test_baichuan_which_positions_and_which_head():
    """As the four published models of each generation write it."""
    shape = {"hidden_size": 80, "num_hidden_layers": 1, "num_attention_heads": 5}
    rotary, linear = {"max_position_embeddings": 4096, "model_max_length": 4096}, {"model_max_length": 4096}
    for vocab, positions, alibi, norm_head in (
        (64000, rotary, False, False),
        (64000, linear, True, False),
        (125696, rotary, False, True),
        (125696, linear, True, True),
    ):
        config = BaichuanConfig.model_validate({**shape, "vocab_size": vocab, **positions})
        assert (config.alibi, config.has_norm_head) == (alibi, norm_head)
        assert config.max_position_embeddings == 4096


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"attention_bias": True, "mlp_bias": True}, id="biases"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
        pytest.param({"num_key_value_heads": 4, "sliding_window": None}, id="own-kv-heads"),
        pytest.param({"sliding_window": 7}, id="windowed"),
    ],
)
def test_solar_without_its_connections(checkpoint, flags):
    def make(entries: dict) -> nn.Module:
        from transformers import MistralConfig, MistralForCausalLM

        if entries.get("mlp_bias"):
            return shaken(llama({**entries, "sliding_window": None}))
        config = MistralConfig(**entries)
        config._attn_implementation = "eager"
        return shaken(MistralForCausalLM(config))

    alone = {f"bskcn_{i}": [] for i in range(1, 5)}
    window = {"sliding_window": None} if "mlp_bias" in flags else {}
    checkpoint("SolarForCausalLM", make, **alone, **window, **flags).assert_agrees()


SLOPES = {
    5: [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1],
    20: [2.0 ** (-i / 2) for i in range(1, 17)] + [2.0 ** (-i / 4) for i in (1, 3, 5, 7)],
}
UNSCALED = {"mup_embeddings_scale": 1.0, "mup_output_alpha": 1.0, "mup_width_scale": 1.0}
SCALED = {"mup_embeddings_scale": 9.0, "mup_output_alpha": 3.0, "mup_width_scale": 0.5}


def jais(entries: dict) -> nn.Module:
    """GPT-2 without positions and with a mask of one's own, and the factors put where they belong."""
    from transformers import GPT2Config, GPT2LMHeadModel

    class Model(GPT2LMHeadModel):
        def forward(self, ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
            position = torch.arange(ids.shape[1])
            distance = position - position[:, None]
            stretch = (entries.get("alibi_scaling") or {}).get("factor", 1.0)
            slopes = torch.tensor(SLOPES[entries["n_head"]])[:, None, None] / stretch
            mask = (slopes * distance).masked_fill(distance > 0, torch.finfo(torch.float32).min)[None]
            rows = self.transformer.wte(ids) * entries["mup_embeddings_scale"]
            x = self.transformer(inputs_embeds=rows, attention_mask=mask.to(rows.dtype)).last_hidden_state
            return self.lm_head(x) * entries["mup_output_alpha"] * entries["mup_width_scale"]

    config = GPT2Config(**entries)
    config._attn_implementation = "eager"
    model = shaken(Model(config))
    model.transformer.wpe.weight = None
    model.transformer.wpe.forward = lambda positions: torch.zeros(*positions.shape, entries["n_embd"])
    if entries["mup_scale_qk_dot_by_d"]:
        for block in model.transformer.h:
            block.attn.scaling = (entries["n_embd"] / entries["n_head"]) ** -1.0
    return model


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(UNSCALED, id="plain"),
        pytest.param(UNSCALED | {"alibi_scaling": {"type": "linear", "factor": 2.0}}, id="stretched"),
        pytest.param(UNSCALED | {"scale_attn_weights": False, "n_head": 20}, id="unscaled"),
        pytest.param(SCALED | {"mup_scale_qk_dot_by_d": True, "tie_word_embeddings": False}, id="by-width-untied"),
    ],
)
def test_jais_with_linear_biases(checkpoint, flags):
    ungated = {"mup_scale_qk_dot_by_d": False, "activation_function": "gelu_new"}
    checkpoint("JAISLMHeadModel", jais, **(ungated | flags)).assert_agrees()


def test_jais_whose_biases_change_with_the_length():
    shape = {"vocab_size": 8, "n_embd": 80, "n_layer": 1, "n_head": 5, "position_embedding_type": "alibi"}
    scaling = {"type": "linear", "factor": None, "train_seq_len": 2048}
    config = JaisConfig.model_validate({**shape, "n_positions": 2048, "alibi_scaling": scaling})
    assert config.alibi().scale == 1.0  # within the trained length they do not
    with pytest.raises(ValueError, match="n_positions=2049 no more than its 'train_seq_len'"):
        JaisConfig.model_validate({**shape, "n_positions": 2049, "alibi_scaling": scaling})


def test_jais_as_the_13b_models_spell_it(checkpoint):
    made = checkpoint("JAISLMHeadModel", jais, **SCALED, mup_scale_qk_dot_by_d=True, activation_function="gelu_new")
    alpha, width, embeddings, by_width = (
        made.config.pop(f"mup_{key}")
        for key in ("output_alpha", "width_scale", "embeddings_scale", "scale_qk_dot_by_d")
    )
    made.config |= {"width_scale": alpha * width, "embeddings_scale": embeddings, "scale_qk_dot_by_d": by_width}
    made.assert_agrees()


def test_yi_as_first_published(checkpoint):
    made = checkpoint("YiForCausalLM", lambda entries: shaken(llama(entries)))
    short = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
    made.tensors = {
        re.sub("|".join(short), lambda found: short[found[0]], name): tensor for name, tensor in made.tensors.items()
    }
    assert "model.layers.0.ln2.weight" in made.tensors
    made.assert_agrees()
