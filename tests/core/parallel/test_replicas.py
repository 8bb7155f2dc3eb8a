"""Copies of a model behind one front end: the same tokens, work for all, and prompts go where they are known."""

import os
import signal

import pytest

from modelport import LLM, SamplingParams
from modelport.parallel.fleet import WorkerError

SETTINGS = {"dtype": "float32", "max_model_len": 128, "skip_tokenizer_init": True}
PROMPTS = [[3 + i, 7, 11 + i] * (1 + i % 4) for i in range(7)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, top_p=0.9, seed=3, max_tokens=12, n=3)


def run(llm: LLM, params: SamplingParams) -> list[list[list[int]]]:
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    return [[one.token_ids for one in output.outputs] for output in outputs]


def count(llm: LLM) -> list[list[object]]:
    """The requests that each copy is given from now on."""
    given = []
    for engine in llm._front.engine.engines:
        mine, add = [], engine.add
        engine.add = lambda request, mine=mine, add=add: (mine.append(request), add(request))
        given.append(mine)
    return given


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pipeline_parallel_size": 2},
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    ],
)
def test_copies_give_what_one_gives(tiny: str, settings: dict) -> None:
    one = LLM(tiny, **SETTINGS)
    llm = LLM(tiny, **SETTINGS, **settings, data_parallel_size=2, executor="inproc")
    given = count(llm)
    for params in (GREEDY, DRAWN):
        assert run(llm, params) == run(one, params)
    assert all(len(mine) > 7 for mine in given)
    homes = {id(request): index for index, mine in enumerate(given) for request in mine}
    followers = [request for mine in given for request in mine if request.leader is not None]
    assert followers
    assert all(homes[id(request)] == homes[id(request.leader)] for request in followers)
    assert not llm._front.engine._home


def test_a_prompt_goes_where_its_beginning_is_known_unless_that_copy_is_busy(tiny: str) -> None:
    llm = LLM(tiny, **SETTINGS, data_parallel_size=3, executor="inproc")
    given = count(llm)
    one = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    prompts = [[start + i for i in range(48)] for start in (5, 100, 200)]
    llm.generate(prompts, one, use_tqdm=False)  # all at once, so each has a copy of its own
    assert [len(mine) for mine in given] == [1, 1, 1]
    for index, prompt in enumerate(prompts):
        (output,) = llm.generate([[*prompt, 9]], one, use_tqdm=False)
        assert output.num_cached_tokens == 48
        assert len(given[index]) == 2
    llm.generate([[*prompts[0], i] for i in range(10, 30)], one, use_tqdm=False)
    assert all(len(mine) > 3 for mine in given)


def test_processes_run_copies(processes, tiny: str) -> None:
    before = processes.left()
    one = LLM(tiny, **SETTINGS)
    llm = LLM(tiny, **SETTINGS, data_parallel_size=2)
    engines = llm._front.engine.engines
    pids = [pid for engine in engines for pid in engine.runner.worker_pids]
    assert len(set(pids)) == 2
    assert run(llm, GREEDY) == run(one, GREEDY)
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"worker 0 .* was ended by SIGKILL"):
        run(llm, GREEDY)
    llm.restart_workers()
    assert run(llm, GREEDY) == run(one, GREEDY)
    llm._front.engine.shutdown()
    assert processes.gone(pids)
    assert processes.left() <= before


def test_copies_on_several_machines_are_refused(tiny: str) -> None:
    with pytest.raises(ValueError, match="copies lie on one machine"):
        LLM(tiny, **SETTINGS, data_parallel_size=2, nnodes=2, master_addr="127.0.0.1")
