"""Adapter folders: what is read, and what is refused by name while the engine goes on."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from modelport import LLM, LoRARequest, SamplingParams
from modelport.plugins.lora.peft import AdapterConfig, read_peft

FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
SETTINGS = {"skip_tokenizer_init": True, "max_model_len": 64, "enable_lora": True, "max_lora_rank": 8}


@pytest.fixture(scope="module")
def llm(base) -> LLM:
    return LLM(str(base.folder), **SETTINGS)


def change(**entries):
    return lambda config, tensors: config.update(entries)


def put(name: str, value: torch.Tensor):
    return lambda config, tensors: tensors.update({name: value})


def drop(name: str):
    return lambda config, tensors: tensors.pop(name)


def nan(config, tensors):
    tensors[f"{FIRST}.lora_A.weight"][0, 0] = float("nan")


def elsewhere(config, tensors):
    for which in "AB":
        tensors[f"base_model.model.model.layers.9.self_attn.q_proj.lora_{which}.weight"] = tensors[
            f"{FIRST}.lora_{which}.weight"
        ].clone()


def on_a_norm(config, tensors):
    tensors["base_model.model.model.norm.lora_A.weight"] = torch.zeros(4, 64)
    tensors["base_model.model.model.norm.lora_B.weight"] = torch.zeros(64, 4)


def twice(config, tensors):
    tensors["base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight"] = torch.zeros(4, 64)
    tensors["base_model.model.model.layers.0.self_attn.qkv_proj.lora_B.weight"] = torch.zeros(128, 4)


def as_table(config, tensors):
    for which in "AB":
        tensors[f"{FIRST}.lora_embedding_{which}"] = tensors.pop(f"{FIRST}.lora_{which}.weight")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (change(peft_type="LOHA"), "peft_type 'LOHA'"),
        (change(r=0), "r: "),
        (change(r="many"), "r: "),
        (change(use_dora=True), "use_dora"),
        (change(bias="all"), "bias='all'"),
        (change(lora_bias=True), "lora_bias"),
        (change(modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\]"),
        (change(target_parameters=["experts.gate_up_proj"]), "target_parameters"),
        (change(init_lora_weights="pissa_niter_4"), "pissa"),
        (change(rank_pattern={}, r=3), r"factors .* rank 3"),
        (put(f"{FIRST}.lora_magnitude_vector", torch.ones(4)), "lora_magnitude_vector"),
        (put("base_model.model.lm_head.weight", torch.ones(4, 4)), "lm_head.weight"),
        (put(f"{FIRST}.lora_A.weight", torch.ones(4)), r"shape \(4,\)"),
        (put(f"{FIRST}.lora_A.weight", torch.ones(4, 64, dtype=torch.int64)), "int64"),
        (put(f"{FIRST}.lora_A.weight", torch.ones(4, 65)), r"x 65, the model's is \d+ x 64"),
        (put(f"{FIRST}.lora_B.weight", torch.ones(63, 4)), "self_attn.q_proj"),
        (drop(f"{FIRST}.lora_B.weight"), "only lora_A"),
        (nan, "NaN"),
        (elsewhere, "no layer 'model.layers.9.self_attn.q_proj'"),
        (on_a_norm, "no layer 'model.norm'"),
        (twice, "another module of the adapter changes too"),
        (as_table, "linear layer's name"),
        (lambda config, tensors: tensors.clear(), "holds no tensors"),
    ],
)
def test_what_cannot_be_served_is_refused(llm, broken, how, message):
    request = LoRARequest("bad", 7, str(broken(how)))
    params = SamplingParams(max_tokens=4, temperature=0)
    before = llm.generate([[5, 6, 7]], params, use_tqdm=False)[0].outputs[0].token_ids
    with pytest.raises(ValueError, match=f"adapter 'bad': .*{message}"):
        llm.generate([[5, 6, 7]], params, use_tqdm=False, lora_request=request)
    assert llm.generate([[5, 6, 7]], params, use_tqdm=False)[0].outputs[0].token_ids == before
    assert llm.list_loras() == set()


def test_a_rank_above_the_limit(llm, base):
    with pytest.raises(ValueError, match="rank 9, more than max_lora_rank=8"):
        llm.add_lora(LoRARequest("big", 1, base.adapter("big", seed=1, rank=9)))


def test_missing_and_damaged_files(base, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        read_peft(tmp_path, 8)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors; is it complete"):
        read_peft(tmp_path, 8)
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(FileNotFoundError, match="safe_serialization=True"):
        read_peft(tmp_path, 8)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="damaged"):
        read_peft(tmp_path, 8)
    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="no configuration"):
        read_peft(tmp_path, 8)


def test_patterns_and_scales():
    config = AdapterConfig(
        peft_type="LORA", r=8, lora_alpha=16, rank_pattern={"layers.1.self_attn.q_proj": 2, r".*\.down_proj": 4},
        alpha_pattern={"down_proj": 32},
    )  # fmt: skip
    assert config.rank("model.layers.1.self_attn.q_proj") == 2
    assert config.rank("model.layers.11.self_attn.q_proj") == 8
    assert config.scale("model.layers.1.self_attn.q_proj") == 8.0
    assert config.scale("model.layers.0.mlp.down_proj") == 8.0
    assert config.scale("model.layers.0.mlp.up_proj") == 2.0
    assert config.model_copy(update={"use_rslora": True}).scale("up_proj") == 16 / 8**0.5


def test_the_digest_is_of_all_that_counts(base, tmp_path):
    path = base.adapter("digest", seed=1)
    first = read_peft(tmp_path.__class__(path), 8).digest
    file = tmp_path.__class__(path) / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"alpha_pattern": {}, "lora_alpha": 3}))
    assert read_peft(tmp_path.__class__(path), 8).digest != first


def test_names_of_an_adapter_that_was_not_saved_by_itself(llm, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    a, b = torch.zeros(4, 64), torch.zeros(64, 4)
    save_file({f"{FIRST}.lora_A.default.weight": a, f"{FIRST}.lora_B.default.weight": b},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    llm.add_lora(LoRARequest("named", 3, str(tmp_path)))
    assert llm.remove_lora(3)
