"""Rotary scaling that reaches beyond `max_position_embeddings`, through files, loader and engine."""

import math

import pytest
import torch
from torch import nn

from modelport import LLM, SamplingParams
from modelport.config import TextConfig

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
PROMPT = torch.randint(1, 320, (45,), generator=torch.Generator().manual_seed(3)).tolist()


def make(entries: dict) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**entries)
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("scaling", [DYNAMIC, LINEAR, YARN], ids=["dynamic", "linear", "yarn"])
def test_a_model_reaches_as_far_as_its_angles(checkpoint, scaling):
    """A prompt longer than the trained length, and one that becomes so; the second time out of the prefix cache."""
    made = checkpoint("LlamaForCausalLM", make, max_position_embeddings=32, rope_scaling=scaling)
    llm, model = made.engine(), made.reference.model
    params = SamplingParams(temperature=0, max_tokens=16, prompt_logprobs=0, ignore_eos=True)
    for prompt in (PROMPT, PROMPT[:20], PROMPT):
        (output,) = llm.generate([prompt], params)
        want = made.reference.logits(prompt).log_softmax(-1)
        for position, entry in enumerate(output.prompt_logprobs[1:]):
            token = prompt[position + 1]
            assert math.isclose(entry[token].logprob, float(want[position, token]), abs_tol=2e-5)
        # with cached keys: those of "dynamic" stay as they were turned
        made_by = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None)
        assert list(output.outputs[0].token_ids) == made_by[0, len(prompt) :].tolist()


def test_only_those_who_ask_go_beyond_the_published_length(checkpoint):
    made = checkpoint("LlamaForCausalLM", make, max_position_embeddings=32, rope_scaling=DYNAMIC)
    made.engine()  # writes the files
    settings = {"skip_tokenizer_init": True, "dtype": "float32"}
    assert LLM(str(made.folder), **settings).max_model_len == 32
    assert LLM(str(made.folder), max_model_len=128, **settings).max_model_len == 128
    with pytest.raises(ValueError, match="max_model_len=129 exceeds the 128 positions"):
        LLM(str(made.folder), max_model_len=129, **settings)


@pytest.mark.parametrize(
    ("length", "scaling", "expected"),
    [
        pytest.param(32768, {"type": "dynamic", "factor": 2.0}, 65536, id="internlm2-7b"),
        pytest.param(4096, {"type": "linear", "factor": 4.0}, 16384, id="vicuna-16k"),
        pytest.param(
            32768, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072, id="qwen2.5"
        ),
        pytest.param(
            163840, {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}, 163840, id="deepseek-v2"
        ),
        pytest.param(131072, {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                              "original_max_position_embeddings": 8192}, 131072, id="llama-3.1"),
        pytest.param(4096, None, 4096, id="llama-2"),
    ],
)  # fmt: skip
def test_how_far_published_models_reach(length, scaling, expected):
    shape = {"vocab_size": 8, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = TextConfig.model_validate({**shape, "max_position_embeddings": length, "rope_scaling": scaling})
    assert config.longest_context == expected
