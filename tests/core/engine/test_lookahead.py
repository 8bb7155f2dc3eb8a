"""Steps launched before the one before them is settled give what steps one after the other give."""

import random

import pytest
import torch

from modelport import LLM, SamplingParams
from modelport.engine.engine import Engine
from modelport.engine.graphs import GraphRecorder
from modelport.plugin import load_plugins
from modelport.request import Logprob, Request
from modelport.testing.reference import ModuleReference
from modelport.testing.session import check

NUM_FUZZED = 12


def run(llm: LLM, prompts: list, params: list[SamplingParams], ahead: bool) -> list[list[tuple]]:
    """All that callers see of each completion, the latter with steps launched ahead or without."""
    engine = llm._front.engine
    engine.lookahead = None
    if ahead:
        engine.look_ahead()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert not engine.has_work
    assert all(group.pool.num_free == group.pool.num_blocks for group in engine.cache.groups)
    return [
        [(c.token_ids, c.text, c.finish_reason, c.stop_reason, _close(c.logprobs)) for c in o.outputs]
        + [_close(o.prompt_logprobs)]
        for o in outputs
    ]


def _close(logprobs: list[dict[int, Logprob] | None] | None) -> list:
    """What a step computes together with others may differ in the last bits."""
    return [
        None if entry is None else {token: pytest.approx(found.logprob, abs=1e-4) for token, found in entry.items()}
        for entry in logprobs or []
    ]


SOME = (
    "LlamaForCausalLM", "MambaForCausalLM", "Mamba2ForCausalLM", "MixtralForCausalLM", "DeepseekV2ForCausalLM",
    "GptOssForCausalLM", "Gemma2ForCausalLM", "JambaForCausalLM", "BloomForCausalLM", "BartForConditionalGeneration",
)  # fmt: skip
OTHERS = [a.name for a in load_plugins().architectures.values() if a.tiny and a.reference and a.name not in SOME]


@pytest.mark.parametrize("name", [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_families(name: str, tmp_path) -> None:
    """Prompts that are cut, wait, share a beginning, are preempted; greedy and drawn; that stop at a token or not."""
    ModuleReference(load_plugins().find([name])).save(tmp_path)
    llm = LLM(
        str(tmp_path), skip_tokenizer_init=True, max_model_len=128, num_kv_blocks=9, max_num_seqs=3, dtype="float32",
        max_num_batched_tokens=24,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(5, 300, (n,), generator=generator).tolist() for n in (1, 17, 40, 9, 3)]
    prompts.append(prompts[2][:33] + prompts[1])
    params = [
        SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=3, max_tokens=20, ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=22, ignore_eos=True),
        SamplingParams(temperature=3.0, seed=5, max_tokens=40, ignore_eos=True, stop_token_ids=list(range(0, 300, 9))),
        SamplingParams(temperature=3.0, seed=6, max_tokens=40, ignore_eos=True, stop_token_ids=list(range(0, 300, 9))),
        SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True),
    ]
    want = run(llm, prompts, params, ahead=False)
    assert run(llm, prompts, params, ahead=True) == want
    if name in SOME:  # as on a GPU: steps from graphs, whose inputs stay in place
        runner = llm._front.engine.runner
        runner.recorder = GraphRecorder(runner._decode, runner.recorder.states, capture=lambda function: function)
        assert run(llm, prompts, params, ahead=True) == want
        assert runner.recorder.num_replays > 5


def _of_media() -> list:
    names = [a.name for a in load_plugins().architectures.values() if a.tiny and a.reference and a.inputs is not None]
    return [name if name == "FuyuForCausalLM" else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """All that are made, which look ahead."""
    opened, engines = Engine._open, []

    def open_ahead(engine: Engine, *given) -> None:
        opened(engine, *given)
        if engine._executor is None:
            engine.look_ahead()
            engines.append(engine)

    monkeypatch.setattr(Engine, "_open", open_ahead)
    return engines


@pytest.mark.parametrize("name", _of_media())
def test_families_that_take_media(name: str, engines: list[Engine]) -> None:
    """What the kit asks of them."""
    report = check(name, only=["media", "batched", "chunked", "prefix_cached", "preempted"])
    assert [(c.name, c.detail) for c in report.checks if c.status in ("failed", "unexpected_pass")] == []
    assert report["media"].status == "passed"
    assert sum(engine.lookahead.num_ahead for engine in engines) > 50


@pytest.mark.parametrize("name", ["LlamaForCausalLM", pytest.param("MixtralForCausalLM", marks=pytest.mark.slow)])
def test_adapters(name: str, engines: list[Engine]) -> None:
    """They change their slots while a step is under way."""
    (lora,) = (c for c in check(name, only="lora").checks if c.name == "lora")
    assert (lora.status, lora.detail) == ("passed", lora.detail)
    assert sum(engine.lookahead.num_ahead for engine in engines) > 20


def fuzzed(chance: random.Random) -> SamplingParams:
    """Mostly plain, and now and then of everything that looks at the tokens before."""
    given = {
        "temperature": chance.choice([0.0, 0.0, 0.8, 1.5]),
        "seed": chance.randrange(99),
        "max_tokens": chance.randint(1, 40),
    }
    several = {
        "stop": ["e", "th"], "logprobs": 2, "prompt_logprobs": 1, "n": 2, "top_p": 0.8, "top_k": 7, "min_tokens": 8,
        "ignore_eos": True, "stop_token_ids": [40, 41, 42, 43], "repetition_penalty": 1.3, "bad_words": ["a"],
        "logit_bias": {9: 3.0}, "presence_penalty": 0.7, "allowed_token_ids": list(range(5, 90)),
        "include_stop_str_in_output": True,
        "logits_processors": [lambda output, logits: logits * (1 + len(output) % 3)],
    }  # fmt: skip
    if chance.random() < 0.6:
        for name in chance.sample(list(several), chance.randint(1, 3)):
            given[name] = several[name]
    given["max_tokens"] = max(given["max_tokens"], given.get("min_tokens", 0))
    if given["temperature"] == 0:
        given.pop("n", None)
    return SamplingParams(**given)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_requests_ask_for(tiny: str, seed: int) -> None:
    chance = random.Random(seed)
    llm = LLM(
        tiny, max_model_len=96, num_kv_blocks=chance.choice([7, 12, 40]), max_num_seqs=chance.choice([2, 4, 8]),
        max_num_batched_tokens=chance.choice([8, 16, 64]), enable_prefix_caching=chance.random() < 0.7, dtype="float32",
    )  # fmt: skip
    prompts = ["the cat " * chance.randint(0, 3) + "x" * chance.randint(1, 9) for _ in range(NUM_FUZZED)]
    params = [fuzzed(chance) for _ in prompts]
    assert run(llm, prompts, params, ahead=True) == run(llm, prompts, params, ahead=False)
    assert llm._front.engine.lookahead is None
    simple = [SamplingParams(temperature=1.0, seed=i, max_tokens=30) for i in range(NUM_FUZZED)]
    assert run(llm, prompts, simple, ahead=False) == run(llm, prompts, simple, ahead=True)
    assert llm._front.engine.lookahead.num_ahead > 15


@pytest.fixture
def llm(tiny: str) -> LLM:
    return LLM(tiny, max_model_len=96, num_kv_blocks=12, max_num_seqs=3, max_num_batched_tokens=16, dtype="float32")


def requests(llm: LLM, several: int, **params) -> list[Request]:
    made = SamplingParams(max_tokens=24, ignore_eos=True, **params)
    return [llm._front.job("word " * (i % 4 + 1), made).requests[0] for i in range(several)]


@pytest.mark.parametrize("seed", range(4))
def test_aborted_at_any_time(llm: LLM, seed: int) -> None:
    """Who goes on gets the same tokens, also in a slot and blocks that somebody left while a step was under way."""
    engine, chance = llm._front.engine, random.Random(seed)
    want = [list(r.token_ids) for r in _finish(llm, requests(llm, 8, seed=1))]
    engine.look_ahead()
    waiting, made = requests(llm, 8, seed=1), []
    gone: set[int] = set()
    while waiting or engine.has_work:
        while waiting and chance.random() < 0.5:
            made.append(waiting.pop(0))
            engine.add(made[-1])
        engine.step()
        if chance.random() < 0.08:
            victim = chance.choice(made or [None])
            if victim is not None and not victim.finished:
                engine.abort(victim)
                gone.add(made.index(victim))
    assert gone
    for index, request in enumerate(made):
        tokens = request.token_ids
        if index in gone:
            assert tokens == want[index][: len(tokens)]
        else:
            assert tokens == want[index]
    assert all(group.pool.num_free == group.pool.num_blocks for group in engine.cache.groups)
    assert engine.lookahead.num_ahead > 10


def test_all_aborted_and_begun_anew(llm: LLM) -> None:
    engine = llm._front.engine
    want = [list(r.token_ids) for r in _finish(llm, requests(llm, 3, temperature=0))]
    engine.look_ahead()
    first = requests(llm, 3, temperature=0)
    for request in first:
        engine.add(request)
    for _ in range(6):
        engine.step()
    for request in first:
        engine.abort(request)
    assert not engine.has_work
    assert engine.step() == []
    assert [list(r.token_ids) for r in _finish(llm, requests(llm, 3, temperature=0))] == want


def test_a_step_is_under_way_when_a_result_is_settled(llm: LLM) -> None:
    """In a row of single tokens every step but the first is launched before its predecessor has landed."""
    engine, events = llm._front.engine, []
    engine.look_ahead()
    runner = engine.runner
    launch, land = runner.launch, runner.land
    runner.launch = lambda *given: (events.append("launch"), launch(*given))[1]
    runner.land = lambda *given: (events.append("land"), land(*given))[1]
    _finish(llm, requests(llm, 2, temperature=0))
    assert events == ["launch", *["launch", "land"] * (len(events) // 2 - 1), "land"]
    assert len(events) == 2 * 24


def test_what_looks_back_waits_for_its_token(llm: LLM) -> None:
    engine = llm._front.engine
    engine.look_ahead()
    _finish(llm, requests(llm, 2, temperature=0, repetition_penalty=1.2))
    assert engine.lookahead.num_ahead == 0
    _finish(llm, requests(llm, 2, temperature=0, min_tokens=9, stop_token_ids=[5], logit_bias={7: 1.0}))
    assert engine.lookahead.num_ahead == 23


def test_one_whose_logits_are_of_no_use_ends_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm._front.engine
    want = [list(r.token_ids) for r in _finish(llm, requests(llm, 3, temperature=0))]
    engine.look_ahead()
    made = requests(llm, 3, temperature=0)
    choose = engine.runner.sampler.choose

    def spoiled(logits, slots, ahead=None):
        places = [engine.runner._outputs[slot] for slot in slots]
        rows = [i for i, slot in enumerate(slots) if slot == made[1].slot and len(places[i]) > 7]
        logits = logits.clone()
        logits[rows] = torch.nan
        return choose(logits, slots, ahead)

    monkeypatch.setattr(engine.runner.sampler, "choose", spoiled)
    _finish(llm, made)
    assert made[1].finish_reason == "error"
    assert list(made[1].token_ids) == want[1][: len(made[1].token_ids)]
    assert [list(made[i].token_ids) for i in (0, 2)] == [want[0], want[2]]


def test_a_launch_that_fails(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised where `step` is called, and the engine goes on once its requests are ended."""
    prompts, params = ["one", "two two"], SamplingParams(temperature=0, max_tokens=20)
    want = run(llm, prompts, [params] * 2, ahead=False)
    engine = llm._front.engine
    engine.look_ahead()
    launch, calls = engine.runner.launch, []

    def failing(*given):
        calls.append(given)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return launch(*given)

    monkeypatch.setattr(engine.runner, "launch", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        llm.generate(prompts, params, use_tqdm=False)
    assert not engine.has_work
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [made[0][0] for made in want]


def _finish(llm: LLM, made: list[Request]) -> list[Request]:
    engine = llm._front.engine
    for request in made:
        engine.add(request)
    while engine.has_work:
        engine.step()
    return made
