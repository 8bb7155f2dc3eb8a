"""Whole models: the Triton kernels, steps from graphs and launched ahead give the torch references' tokens, in float32.

On a GPU graphs are real; with the interpreter a graph is the step itself, run again over inputs that stay in place.
"""

import os

import pytest
import torch

from modelport import LLM, SamplingParams
from modelport.engine.graphs import GraphRecorder
from modelport.kernels import cpu, gpu
from modelport.modeling.cache import StateSpec
from modelport.plugin import load_plugins
from modelport.testing.reference import ModuleReference

KINDS = ["MixtralForCausalLM", "DeepseekV2ForCausalLM", "Mamba2ForCausalLM", "GptOssForCausalLM"]
ON_CPU = os.environ.get("MODELPORT_TEST_DEVICE", "cpu") == "cpu"
if not ON_CPU:  # the interpreter takes half a minute for each
    KINDS += [
        "Gemma2ForCausalLM", "BloomForCausalLM", "BartForConditionalGeneration", "JambaForCausalLM", "Phi3ForCausalLM",
        "Qwen2MoeForCausalLM", "GPT2LMHeadModel", "MambaForCausalLM", "Llama4ForCausalLM",
    ]  # fmt: skip
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True),
    SamplingParams(temperature=1.0, top_k=7, top_p=0.9, seed=3, max_tokens=3, ignore_eos=True),
]


def tokens(name: str, folder, device: str, monkeypatch: pytest.MonkeyPatch, **settings) -> list[list[int]]:
    monkeypatch.setattr(cpu, "lib", None)
    with torch.device("cpu"):
        llm = LLM(
            str(folder), skip_tokenizer_init=True, max_model_len=64, max_num_seqs=3, max_num_batched_tokens=16,
            dtype="float32", device=device, kv_cache_memory_bytes=1 << 20, **settings,
        )  # fmt: skip
        prompts = [torch.randint(5, 300, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 19)]
        if name == "LlamaForCausalLM" and ON_CPU:  # the interpreter takes long for a draw
            prompts = prompts[1:]
        runner = llm._front.engine.runner
        if gpu.interpreted:
            layers = [m for m in llm._front.engine.model.modules() if hasattr(m, "cache_spec")]
            states = [s for m in layers if isinstance(m.cache_spec, StateSpec) for s in (m.conv_state, m.state)]
            runner.recorder = GraphRecorder(runner._decode, states, capture=lambda function: function)
            llm._front.engine.look_ahead()
        found = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, PARAMS[: len(prompts)], use_tqdm=False)]
        if runner.recorder is not None:
            assert runner.recorder.given_up is None
        if gpu.interpreted or device == "cuda":
            assert llm._front.engine.lookahead.num_ahead > 0
        return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LlamaForCausalLM", *KINDS])
def test_tokens(name: str, device: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("cpu"):
        ModuleReference(load_plugins().find([name])).save(tmp_path)
    got = tokens(name, tmp_path, device, monkeypatch)
    monkeypatch.setattr(gpu, "interpreted", False)
    assert got == tokens(name, tmp_path, "cpu", monkeypatch)
    if name == "MixtralForCausalLM":
        monkeypatch.setattr(gpu, "interpreted", device == "cpu")
        got = tokens(name, tmp_path, device, monkeypatch, quantization="int8")
        monkeypatch.setattr(gpu, "interpreted", False)
        assert got == tokens(name, tmp_path, "cpu", monkeypatch, quantization="int8")
