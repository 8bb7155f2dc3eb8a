"""Several steps under way at once: every stage works, and each request gets what it gets alone."""

import os
import signal
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelport import LLM, SamplingParams
from modelport.engine import engine as engine_module
from modelport.engine.scheduler import Plan
from modelport.parallel.channel import Channel, Frame
from modelport.parallel.fleet import WorkerError
from modelport.plugin import load_plugins
from modelport.testing.reference import ModuleReference

SETTINGS = {"dtype": "float32", "max_model_len": 128, "skip_tokenizer_init": True}
PROMPTS = [[3 + i, 7, 11 + i] * (1 + i % 4) for i in range(7)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, top_p=0.9, seed=3, max_tokens=20, n=2, repetition_penalty=1.3, min_tokens=3)
SCORED = SamplingParams(temperature=0.0, max_tokens=5, prompt_logprobs=0, ignore_eos=True)


def run(llm: LLM, params: SamplingParams) -> list[list[list[int]]]:
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    if params is SCORED:
        assert all(len(output.prompt_logprobs) == len(output.prompt_token_ids) for output in outputs)
    return [[one.token_ids for one in output.outputs] for output in outputs]


def watch(llm: LLM) -> tuple[list[int], list[Plan]]:
    """How many steps were under way whenever one was collected, and all plans."""
    runner, under_way, plans, now = llm._front.engine.runner, [], [], [0]
    submit, collect = runner.submit, runner.collect

    def submits(plan: Plan) -> None:
        now[0] += 1
        plans.append(plan)
        submit(plan)

    def collects():
        under_way.append(now[0])
        now[0] -= 1
        return collect()

    runner.submit, runner.collect = submits, collects
    return under_way, plans


@pytest.mark.parametrize(
    ("executor", "stages", "limits"),
    [
        ("inproc", 2, {}),
        ("inproc", 3, {"num_kv_blocks": 12, "max_num_batched_tokens": 16, "max_num_seqs": 5}),
        ("mp", 2, {"num_kv_blocks": 12, "max_num_batched_tokens": 16, "max_num_seqs": 5}),
    ],
)
def test_outputs_are_the_same_with_several_steps_under_way(tiny: str, executor: str, stages: int, limits: dict) -> None:
    one = LLM(tiny, **SETTINGS)
    llm = LLM(tiny, **SETTINGS, **limits, pipeline_parallel_size=stages, executor=executor)
    under_way, plans = watch(llm)
    for params in (GREEDY, DRAWN, SCORED, GREEDY):
        assert run(llm, params) == run(one, params)
    assert max(under_way) == stages
    assert under_way.count(stages) > len(under_way) / 2
    assert any(len(plan.requests) > 1 for plan in plans)
    engine = llm._front.engine
    assert not engine._flying
    assert not engine.scheduler._away


def test_a_request_that_is_ended_while_its_step_is_under_way_gets_nothing_more(tiny: str) -> None:
    llm = LLM(tiny, **SETTINGS, pipeline_parallel_size=2, executor="inproc", max_num_seqs=4)
    wanted = run(llm, GREEDY)
    streams = [llm.stream({"prompt_token_ids": prompt}, GREEDY) for prompt in PROMPTS]
    firsts = [next(stream).outputs[0].token_ids for stream in streams[:4]]
    assert all(first == found[0][: len(first)] for first, found in zip(firsts, wanted, strict=False))
    assert llm._front.engine._flying
    for stream in streams:
        stream.close()
    assert run(llm, GREEDY) == wanted  # their slots and blocks are others' now


def test_a_worker_that_dies_with_steps_under_way_can_be_replaced(processes, tiny: str) -> None:
    llm = LLM(tiny, **SETTINGS, pipeline_parallel_size=2)
    wanted = run(llm, GREEDY)
    streams = [llm.stream({"prompt_token_ids": prompt}, GREEDY) for prompt in PROMPTS]
    for stream in streams[:3]:
        next(stream)
    os.kill(processes.workers(llm)[0], signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"worker 0 .* was ended by SIGKILL"):
        list(streams[0])
    llm.restart_workers()
    assert run(llm, GREEDY) == wanted


LONGROPE = {
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 20,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
    },
}


def pictures(llm: LLM) -> Iterator[dict[str, Any]]:
    """Prompts with no picture, with one of six or with two, so that several have the same."""
    here = llm._front.media.processor.placeholder_id("image")
    source = np.random.default_rng(3)
    noise = [source.integers(0, 256, (30 + 9 * i, 40, 3), dtype=np.uint8) for i in range(6)]
    for i in range(12):
        shown = ([noise[i % 6]], [noise[i % 6], noise[0]], [])[i % 4 % 3]
        ids = [5 + i, *(token for _ in shown for token in (here, 7)), 8, 9 + i]
        yield {"prompt_token_ids": ids, "multi_modal_data": {"image": shown}} if shown else {"prompt_token_ids": ids}


def packed(monkeypatch: pytest.MonkeyPatch) -> dict[Channel, list[int]]:
    """Bytes of tensors in each message from now on."""
    found, send = defaultdict(list), Channel.send

    def sends(channel: Channel, frame: Frame) -> None:
        found[channel].append(len(frame.packed))
        send(channel, frame)

    monkeypatch.setattr(Channel, "send", sends)
    return found


@pytest.mark.parametrize("executor", ["inproc", pytest.param("mp", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("LlavaForConditionalGeneration", {}),
        ("MllamaForConditionalGeneration", {}),
        ("BartForConditionalGeneration", {}),
        ("Phi3ForCausalLM", LONGROPE),
    ],
)
def test_models_with_media_an_encoder_or_angles_by_length_have_several_steps_under_way(
    name: str, entries: dict, executor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes
) -> None:
    monkeypatch.setattr(engine_module, "MEDIA_ROWS", 1)  # room for one request's media, so that some are forgotten
    architecture = load_plugins().find([name])
    ModuleReference(replace(architecture, tiny={**architecture.tiny, **entries})).save(tmp_path)
    settings = {"dtype": "float32", "max_model_len": 96, "skip_tokenizer_init": True}
    one = LLM(str(tmp_path), **settings)
    if architecture.inputs is not None:
        prompts = list(pictures(one))
    else:
        prompts = PROMPTS
    limits = {"max_num_batched_tokens": 40, "max_num_seqs": 5, "num_kv_blocks": 30}
    llm = LLM(str(tmp_path), **settings, **limits, pipeline_parallel_size=2, executor=executor)
    under_way, plans = watch(llm)
    sizes = packed(monkeypatch)
    for _ in range(2):  # the second time from the cache, where there is one
        found, wanted = (
            [o.outputs[0].token_ids for o in each.generate(prompts, GREEDY, use_tqdm=False)] for each in (llm, one)
        )
        assert found == wanted
    assert max(under_way) == 2
    assert under_way.count(2) > len(under_way) / 2
    if architecture.inputs is not None:
        assert any(plan.encode for plan in plans)
        assert any(plan.forget for plan in plans)
    if executor == "mp":
        takes = [any(sizes[member.channel]) for member in llm._front.engine.runner._fleet.members]
        reads_media = name.startswith("Mllama")  # in its blocks
        assert takes == [architecture.inputs is not None, reads_media]
    engine = llm._front.engine
    assert not engine._flying
    assert not engine.scheduler._away
    engine.shutdown()
