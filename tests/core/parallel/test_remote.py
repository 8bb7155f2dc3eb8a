"""Real worker processes: the same tokens as one process, the same plugins, and results over the wire."""

import os
import signal

import pytest

from modelport import LLM, SamplingParams
from modelport.engine.runner import StepResult
from modelport.engine.sampler import TokenLogprobs
from modelport.parallel.channel import Frame, Kind
from modelport.parallel.fleet import WorkerError
from modelport.parallel.wire import read_result, write_result

SETTINGS = {"dtype": "float32", "max_model_len": 128}
PROMPTS = ["The capital of France is", "a", "x" * 60, "To be or not to be, that is"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=2, prompt_logprobs=1)
DRAWN = SamplingParams(
    temperature=1.0, top_p=0.9, seed=3, max_tokens=20, n=2, ignore_eos=True, repetition_penalty=1.3,
    presence_penalty=0.2, logit_bias={70: 2.0, 71: -1.0}, bad_words=["q"], min_tokens=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def one(tiny: str) -> LLM:
    return LLM(tiny, **SETTINGS)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_processes_give_what_one_gives(processes, one: LLM, tiny: str, tensor: int, pipeline: int) -> None:
    parts = LLM(
        tiny, **SETTINGS, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline, num_kv_blocks=12,
        max_num_batched_tokens=32, max_num_seqs=4,
    )  # fmt: skip
    for params in (GREEDY, DRAWN, GREEDY):
        wanted, found = (llm.generate(PROMPTS, params, use_tqdm=False) for llm in (one, parts))
        for ours, theirs in zip(found, wanted, strict=True):
            assert [c.token_ids for c in ours.outputs] == [c.token_ids for c in theirs.outputs]
            assert [c.text for c in ours.outputs] == [c.text for c in theirs.outputs]
            if params is GREEDY:
                for mine, other in zip(ours.outputs[0].logprobs, theirs.outputs[0].logprobs, strict=True):
                    assert {t: pytest.approx(p.logprob, abs=1e-4) for t, p in mine.items()} == {
                        t: p.logprob for t, p in other.items()
                    }
                assert len(ours.prompt_logprobs) == len(ours.prompt_token_ids)
    assert any(output.metrics.num_preemptions for output in found)  # else blocks were never told anew
    pids = processes.workers(parts)
    assert len(pids) == tensor * pipeline
    del parts
    assert processes.gone(pids)


def test_heads_that_cannot_be_divided_stop_the_start(tiny: str) -> None:
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn: num_attention_heads=4 and num_key_value_heads=2 .* use"
    ):
        LLM(tiny, **SETTINGS, tensor_parallel_size=3)


def test_functions_are_not_sent_to_workers(processes, tiny: str) -> None:
    llm = LLM(tiny, **SETTINGS, pipeline_parallel_size=2)
    with pytest.raises(ValueError, match="logits_processors are functions"):
        llm.generate("a", SamplingParams(logits_processors=[lambda ids, logits: logits]), use_tqdm=False)
    os.kill(processes.workers(llm)[0], signal.SIGKILL)
    for _ in range(2):  # the second finds nobody
        with pytest.raises(WorkerError):
            llm.generate("a", GREEDY, use_tqdm=False)


def test_results_survive_the_wire() -> None:
    logprobs = TokenLogprobs(-0.5, 2, [4, 7], [-0.25, -0.5])
    result = StepResult([5, -1], {0: logprobs}, {1: [logprobs, logprobs]}, {1: "no finite logits"})
    assert read_result(Frame.of(Kind.RESULT, write_result(result)).message) == result
