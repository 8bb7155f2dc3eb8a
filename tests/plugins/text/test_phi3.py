"""Phi-3: sequences that outgrow their original context, and configurations of the first release."""

import pytest
import torch

from modelport import LLM, SamplingParams
from modelport.plugin import load_plugins

LIMIT = 40
VARIANTS = {
    name: {**variant, "original_max_position_embeddings": LIMIT}
    for name, variant in load_plugins().find(["Phi3ForCausalLM"]).variants.items()
}


def prompts():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 320, (n,), generator=generator).tolist() for n in (4, 20, LIMIT - 1, LIMIT, 55)]


def generated(made, prompt, count):
    """What transformers' own `generate` gives; it drops its cache where the angles change."""
    model, ids = made.reference.model, torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("variant", ["mini-128k", "phi-4-mini"])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="together"),
        pytest.param({"max_num_batched_tokens": 16, "max_num_seqs": 8}, id="chunks-of-16"),
        pytest.param({"num_kv_blocks": 11, "max_num_seqs": 8}, id="preempted"),
    ],
)
def test_a_generation_across_the_original_context_is_generates(checkpoint, variant, settings):
    made = checkpoint("Phi3ForCausalLM", **VARIANTS[variant])
    llm = LLM(str(made.folder), skip_tokenizer_init=True, dtype="float32", max_model_len=128, **settings)
    outputs = llm.generate(prompts(), SamplingParams(temperature=0, max_tokens=48, ignore_eos=True))
    assert [list(o.outputs[0].token_ids) for o in outputs] == [generated(made, p, 48) for p in prompts()]
    if "num_kv_blocks" in settings:
        assert sum(o.metrics.num_preemptions for o in outputs) > 0


@pytest.mark.parametrize("kind", ["su", "longrope"])
def test_configurations_of_transformers_4(checkpoint, kind):
    made = checkpoint("Phi3ForCausalLM", **VARIANTS["phi-4-mini"])
    scaling = {**VARIANTS["phi-4-mini"]["rope_scaling"], "type": kind}
    del made.config["rope_parameters"]
    written = {"rope_theta": 10000.0, "partial_rotary_factor": 0.75, "original_max_position_embeddings": LIMIT}
    made.config |= {**written, "rope_scaling": scaling, "auto_map": {}, "embd_pdrop": 0.0}
    for layer in range(3):
        made.tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    made.assert_agrees()


def test_parts_of_fused_projections_may_be_apart(checkpoint):
    made = checkpoint("Phi3ForCausalLM")
    for layer in range(3):
        stem = f"model.layers.{layer}."
        fused = made.tensors.pop(stem + "self_attn.qkv_proj.weight")
        for name, part in zip("qkv", fused.split((64, 32, 32)), strict=True):
            made.tensors[f"{stem}self_attn.{name}_proj.weight"] = part
        fused = made.tensors.pop(stem + "mlp.gate_up_proj.weight")
        for name, part in zip(("gate", "up"), fused.chunk(2), strict=True):
            made.tensors[f"{stem}mlp.{name}_proj.weight"] = part
    made.assert_agrees()
