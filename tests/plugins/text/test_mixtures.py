"""Families with experts: flags that their tiny configurations leave out, and all experts in one tensor."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modelport import LLM, SamplingParams
from modelport.plugin import load_plugins
from modelport.testing.reference import ModuleReference

PROMPTS = [torch.randint(1, 320, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (3, 40)]


def check(name: str, folder: Path, overrides: dict | None = None, **save_options) -> None:
    reference = ModuleReference(load_plugins().find([name]), overrides=overrides)
    llm = LLM(str(reference.save(folder, **save_options)), skip_tokenizer_init=True, dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        assert list(output.outputs[0].token_ids) == reference.greedy(prompt, 12)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen2MoeForCausalLM"])
def test_experts_in_one_tensor(name, tmp_path):
    check(name, tmp_path, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("MixtralForCausalLM", {"sliding_window": None, "num_experts_per_tok": 1}),
        ("Qwen2MoeForCausalLM", {"norm_topk_prob": True, "decoder_sparse_step": 2, "mlp_only_layers": []}),
        ("Qwen2MoeForCausalLM", {"qkv_bias": False, "use_sliding_window": False, "num_experts_per_tok": 8}),
    ],
    ids=str,
)
def test_flags(name, overrides, tmp_path):
    check(name, tmp_path, overrides)
