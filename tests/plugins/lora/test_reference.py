"""Adapters that PEFT itself made and saved, against its own merged model."""

import pytest
import torch

from modelport import LLM, LoRARequest, SamplingParams
from modelport.plugin import load_plugins
from modelport.testing.reference import ModuleReference

IDS = list(range(5, 30))


def adapted(name: str, folder, **options):
    """The base model as files, an adapter of it as files, and PEFT's merged model."""
    peft = pytest.importorskip("peft")
    reference = ModuleReference(load_plugins().find([name]))
    reference.save(folder / "base")
    config = peft.LoraConfig(lora_alpha=24, init_lora_weights=False, **options)
    torch.manual_seed(4)
    model = peft.get_peft_model(reference.model, config)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder / "adapter")
    return model.merge_and_unload()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LlamaForCausalLM", {"r": 4, "target_modules": "all-linear"}),
        ("LlamaForCausalLM", {"r": 6, "target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_rslora": True}),
        (
            "Qwen2ForCausalLM",
            {
                "r": 8,
                "target_modules": r".*\.layers\.1\..*(v|down)_proj",
                "rank_pattern": {"v_proj": 3},
                "alpha_pattern": {"down_proj": 5},
            },
        ),
        ("GPT2LMHeadModel", {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
        ("GPTNeoXForCausalLM", {"r": 4, "target_modules": ["query_key_value", "dense_h_to_4h"]}),
        ("Phi3ForCausalLM", {"r": 4, "target_modules": ["qkv_proj", "gate_up_proj"]}),
        ("BloomForCausalLM", {"r": 4, "target_modules": ["query_key_value"]}),
        ("MambaForCausalLM", {"r": 4, "target_modules": ["in_proj", "x_proj", "dt_proj"]}),
    ],
)
def test_merged_by_peft(name, options, tmp_path):
    merged = adapted(name, tmp_path, **options)
    with torch.inference_mode():
        want = merged(input_ids=torch.tensor([IDS])).logits[0].float()
    llm = LLM(
        str(tmp_path / "base"), skip_tokenizer_init=True, enable_lora=True, dtype="float32", max_model_len=64,
        enable_prefix_caching=False,
    )  # fmt: skip
    caught: list[torch.Tensor] = []
    llm._front.engine.runner.on_logits = lambda logits: caught.append(logits.float().clone())
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    for adapter in (None, LoRARequest("peft", 1, str(tmp_path / "adapter"))):
        caught.clear()
        llm.generate([IDS], params, use_tqdm=False, lora_request=adapter)
        apart = (torch.cat(caught) - want).abs().max() / want.abs().max()
        assert apart < 1e-4 if adapter else apart > 1e-3
