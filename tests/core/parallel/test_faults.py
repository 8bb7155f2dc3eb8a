"""Every way in which workers, agents and engines can die, stop or hang, with real processes: nobody stays behind."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from modelport import LLM, SamplingParams
from modelport.llm import AsyncLLM
from modelport.parallel import fleet
from modelport.parallel.channel import Listener
from modelport.parallel.fleet import WorkerError

SETTINGS = {"dtype": "float32", "max_model_len": 128, "skip_tokenizer_init": True}
PROMPT = {"prompt_token_ids": [1, 2, 3, 4]}
LONG = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
SHORT = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


def tokens(llm: LLM, params: SamplingParams = SHORT) -> list[int]:
    return llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].token_ids


async def tokens_until(llm: AsyncLLM, params: SamplingParams, happens: Callable[[], None]) -> list[int]:
    """Those of a request, in the middle of which something happens."""
    found: list[int] = []
    async for output in llm.generate(PROMPT, params):
        if len(found) <= 3 < len(output.outputs[0].token_ids):
            happens()
        found = output.outputs[0].token_ids
    return found


@pytest.mark.parametrize(
    ("what", "told"), [(signal.SIGKILL, "was ended by SIGKILL"), (signal.SIGSTOP, "has not answered for 1.5 s")]
)
def test_a_lost_worker_fails_what_runs_and_others_take_its_place(
    processes, tiny: str, what: signal.Signals, told: str
) -> None:
    wanted = tokens(LLM(tiny, **SETTINGS), LONG)

    async def talk() -> None:
        llm = AsyncLLM(tiny, **SETTINGS, tensor_parallel_size=2, worker_timeout=1.5)
        assert await tokens_until(llm, LONG, lambda: None) == wanted
        pids = processes.workers(llm)
        agent = processes.parent(pids[0])
        ports, shared = processes.listening(pids), processes.shared_memory(pids)
        assert ports  # gloo's
        happened = 0.0

        def happens() -> None:
            nonlocal happened
            happened = time.monotonic()
            os.kill(pids[1], what)

        with pytest.raises(RuntimeError) as failure:
            await tokens_until(llm, LONG, happens)
        assert time.monotonic() - happened < 3
        error = str(failure.value.__cause__)
        assert error.startswith("worker 1 (tensor-parallel part 1 of 2, stage 0 of 1), process ")
        assert f"process {pids[1]} on " in error
        assert told in error
        assert processes.gone(pids, 1.0)
        assert processes.are_free(ports)
        assert not any(map(os.path.exists, shared))
        assert not processes.gone([agent], 0)
        with pytest.raises(RuntimeError, match="not running"):
            await tokens_until(llm, SHORT, lambda: None)
        began = time.monotonic()
        await llm.restart_workers()
        assert time.monotonic() - began < 3  # nothing is imported anew
        assert await tokens_until(llm, LONG, lambda: None) == wanted
        assert not set(pids) & set(processes.workers(llm))
        assert processes.parent(processes.workers(llm)[0]) == agent
        pids = [*processes.workers(llm), processes.agent(llm)]
        llm.shutdown()
        with pytest.raises(WorkerError, match="shut down"):
            await llm.restart_workers()
        assert processes.gone(pids)

    asyncio.run(talk())


def test_silence_is_noticed_in_four_seconds_when_nothing_is_set() -> None:
    from modelport import EngineConfig

    assert EngineConfig(model="m").worker_timeout == 4.0


def test_workers_start_again_when_their_agent_was_killed(processes, tiny: str) -> None:
    llm = LLM(tiny, **SETTINGS, pipeline_parallel_size=2)
    wanted = tokens(llm)
    pids, agent = processes.workers(llm), processes.agent(llm)
    assert len(os.listdir(f"/proc/{agent}/task")) == 1  # else it could not fork
    os.kill(agent, signal.SIGKILL)
    assert processes.gone(pids, 2.0)  # they do not live without it
    with pytest.raises(WorkerError, match=r"worker \d .* was lost with its machine's agent"):
        tokens(llm)
    with pytest.raises(WorkerError, match="restart_workers"):
        tokens(llm)
    llm.restart_workers()
    assert tokens(llm) == wanted
    llm.restart_workers()  # also when nothing is wrong
    assert tokens(llm) == wanted


def test_workers_that_are_slow_to_start_again_are_waited_for(
    processes, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(tiny, **SETTINGS, tensor_parallel_size=2)
    wanted = tokens(llm)
    os.kill(processes.workers(llm)[1], signal.SIGKILL)
    with pytest.raises(WorkerError, match="was ended by SIGKILL"):
        tokens(llm)
    waited = []

    def late(things: list, seconds: float) -> list:
        if isinstance(things[0], Listener) and len(waited) < 2:
            waited.append(things[0])
            return []  # nobody has connected yet
        return wait(things, seconds)

    monkeypatch.setattr(fleet, "wait", late)
    llm.restart_workers()  # and the end of the one before is not theirs
    assert waited
    assert tokens(llm) == wanted
    llm._front.engine.shutdown()


def test_one_place_has_no_workers_to_restart(tiny: str) -> None:
    with pytest.raises(ValueError, match="one place"):
        LLM(tiny, **SETTINGS).restart_workers()


def test_threads_can_be_restarted_too(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelport.parallel.groups import ThreadLinks

    llm = LLM(tiny, **SETTINGS, tensor_parallel_size=2, executor="inproc")
    wanted = tokens(llm)
    with monkeypatch.context() as patch:
        patch.setattr(ThreadLinks, "all_reduce", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tokens(llm)
    with pytest.raises(RuntimeError, match="has failed"):
        tokens(llm)
    llm.restart_workers()
    assert tokens(llm) == wanted


HANGS = """
import os, time
from modelport import Architecture, hookimpl
from modelport.plugins.text.llama import Llama, LlamaConfig
modelport_api = 1

class Hangs(Llama):
    def embed(self, token_ids):
        if (token_ids == 9).any():
            time.sleep(30)
        return super().embed(token_ids)

@hookimpl
def register_architectures():
    return [Architecture("LlamaForCausalLM", Hangs, LlamaConfig, replaces="llama")]
"""


@pytest.mark.slow
def test_a_step_that_takes_too_long_is_blamed_on_who_does_not_wait(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hanging_model.py").write_text(HANGS)
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = {**SETTINGS, "plugins": ("hanging_model",), "worker_timeout": 1.0, "step_timeout": 2.0}
    llm = LLM(tiny, **settings, pipeline_parallel_size=2)
    tokens(llm)
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"step_timeout=2 s: worker 0 .* runs step 5 since [12].* s$"):
        llm.generate({"prompt_token_ids": [1, 9]}, SHORT, use_tqdm=False)
    assert time.monotonic() - began < 4


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, tests among them, ignore it
from modelport import LLM, SamplingParams
llm = LLM({model!r}, dtype="float32", max_model_len=128, skip_tokenizer_init=True, pipeline_parallel_size=2)
workers = llm._front.engine.runner.worker_pids
print(*workers, open(f"/proc/{{workers[0]}}/stat").read().rpartition(")")[2].split()[1], flush=True)
while True:
    llm.generate({{"prompt_token_ids": [1, 2]}}, SamplingParams(max_tokens=100, ignore_eos=True), use_tqdm=False)
"""


@pytest.mark.parametrize(
    "case", [pytest.param("killed", marks=pytest.mark.slow), "killed while a worker is stopped", "interrupted"]
)
def test_nobody_outlives_the_engine(processes, tiny: str, case: str) -> None:
    before = processes.left()
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(model=tiny)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as engine:  # fmt: skip
        try:
            pids = [int(pid) for pid in engine.stdout.readline().split()]
            assert len(pids) == 3
            assert not processes.gone(pids, 0.3)
            assert processes.left() > before
            if case == "interrupted":  # as a terminal does it
                os.killpg(engine.pid, signal.SIGINT)
            else:
                if "stopped" in case:
                    os.kill(pids[1], signal.SIGSTOP)
                engine.kill()
            engine.wait(5)
            assert processes.gone(pids, 2.0)
            errors = engine.stderr.read()
        finally:
            engine.kill()  # else a failure above would wait for it
    assert errors.count("KeyboardInterrupt") == (case == "interrupted")  # the engine's, and nobody else's
    assert processes.left() <= before


def test_an_agent_that_is_not_needed_ends(processes, tiny: str, tmp_path: Path) -> None:
    before = processes.left()
    with pytest.raises(FileNotFoundError):
        LLM(str(tmp_path / "nothing"), tensor_parallel_size=2)
    assert processes.left() <= before
