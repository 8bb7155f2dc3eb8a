"""Every built-in text family against its reference, through files, loader and engine.

Greedy tokens and prompt log-probabilities must be the reference's, and must not depend on how the work was cut.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from modelport import LLM, SamplingParams
from modelport.plugin import load_plugins
from modelport.testing.reference import TransformersReference

NAMES = [
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "AquilaForCausalLM",
    "XverseForCausalLM",
    "InternLMForCausalLM",
    "Qwen2ForCausalLM",
    "GPT2LMHeadModel",
    "Gemma2ForCausalLM",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "GemmaForCausalLM",
    "GPTBigCodeForCausalLM",
    "GraniteForCausalLM",
    "NemotronForCausalLM",
    "OlmoForCausalLM",
    "Olmo2ForCausalLM",
    "PhiForCausalLM",
    "Qwen3ForCausalLM",
    "Starcoder2ForCausalLM",
]
GOLDENS = Path(__file__).parents[2] / "goldens"
TOKENS = 32


def prompts() -> list[list[int]]:
    """Lengths around block and chunk edges; two with a beginning in common."""
    generator = torch.Generator().manual_seed(7)
    lengths = (1, 15, 16, 17, 61)
    made = [torch.randint(1, 320, (n,), generator=generator).tolist() for n in lengths]
    return [*made, made[-1][:40] + made[1]]


class Case:
    """A checkpoint on disk with what the reference says about it."""

    def __init__(self, name: str, folder: Path):
        reference = TransformersReference(load_plugins().find([name]))
        self.folder = str(reference.save(folder))
        self.prompts = prompts()
        self.greedy = [reference.greedy(p, TOKENS) for p in self.prompts]
        self.logits = [reference.logits(p) for p in self.prompts]


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def engine(folder: str, **settings) -> LLM:
    return LLM(folder, skip_tokenizer_init=True, dtype="float32", max_model_len=128, **settings)


def greedy(llm: LLM, token_ids: list) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    return [list(o.outputs[0].token_ids) for o in llm.generate(token_ids, params)]


def test_prompt_log_probabilities_are_the_references(case):
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    for output, logits in zip(engine(case.folder).generate(case.prompts, params), case.logits, strict=True):
        want = logits.log_softmax(-1)
        assert output.prompt_logprobs[0] is None
        for position, entry in enumerate(output.prompt_logprobs[1:]):
            token = output.prompt_token_ids[position + 1]
            assert math.isclose(entry[token].logprob, float(want[position, token]), abs_tol=2e-5)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="together"),
        pytest.param({"max_num_batched_tokens": 16}, id="chunks-of-16"),
        pytest.param({"num_kv_blocks": 9, "max_num_seqs": 8}, id="preempted"),
        pytest.param({"block_size": 4, "enable_prefix_caching": False}, id="small-blocks-no-prefix-cache"),
    ],
)
def test_greedy_tokens_are_the_references(case, settings):
    llm = engine(case.folder, **settings)
    assert greedy(llm, case.prompts) == case.greedy
    assert greedy(llm, case.prompts) == case.greedy  # now from a warm cache


def test_alone_as_together(case):
    llm = engine(case.folder)
    assert [greedy(llm, [p])[0] for p in case.prompts] == case.greedy


@pytest.mark.parametrize("name", ["xverse-7b", "internlm-7b"])
def test_goldens(name):
    """Recorded outputs of the authors' code."""
    cases = json.loads((GOLDENS / name / "golden.json").read_text())["cases"]
    llm = LLM(str(GOLDENS / name), skip_tokenizer_init=True)
    assert greedy(llm, [c["input_ids"] for c in cases]) == [c["greedy_ids"] for c in cases]
