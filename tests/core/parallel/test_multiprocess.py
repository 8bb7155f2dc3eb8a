"""Real worker processes: the same tokens as one process, and every way in which workers can fail."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelport import LLM, SamplingParams
from modelport.config import EngineConfig
from modelport.discovery import PluginRecord
from modelport.engine.runner import StepResult
from modelport.engine.sampler import TokenLogprobs
from modelport.frontend import Frontend
from modelport.llm import AsyncLLM
from modelport.parallel.multiprocess import WorkerError
from modelport.parallel.wire import decode, encode, read_result, write_result
from modelport.plugin import PluginError, load_plugins

SETTINGS = {"dtype": "float32", "max_model_len": 128}
PROMPTS = ["The capital of France is", "a", "x" * 60, "To be or not to be, that is"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=2, prompt_logprobs=1)
DRAWN = SamplingParams(
    temperature=1.0, top_p=0.9, seed=3, max_tokens=20, n=2, ignore_eos=True, repetition_penalty=1.3,
    presence_penalty=0.2, logit_bias={70: 2.0, 71: -1.0}, bad_words=["q"], min_tokens=3,
)  # fmt: skip


def gone(pids: list[int], seconds: float = 5.0) -> bool:
    """Whether none of them runs, at the end of so many seconds."""
    until = time.monotonic() + seconds
    while alive := [pid for pid in pids if Path(f"/proc/{pid}/stat").exists() and " Z " not in _stat(pid)]:
        if time.monotonic() > until:
            return not alive
        time.sleep(0.05)
    return True


def _stat(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return " Z "


def pids_of(llm: LLM | AsyncLLM) -> list[int]:
    return llm._front.engine.runner.worker_pids


@pytest.fixture(scope="module")
def one(tiny: str) -> LLM:
    return LLM(tiny, **SETTINGS)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_processes_give_what_one_gives(one: LLM, tiny: str, tensor: int, pipeline: int) -> None:
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
    pids = pids_of(parts)
    assert len(pids) == tensor * pipeline
    del parts
    assert gone(pids)


def test_a_killed_worker_fails_what_runs_and_leaves_nobody(tiny: str) -> None:
    async def talk() -> float:
        llm = AsyncLLM(tiny, **SETTINGS, tensor_parallel_size=2)
        pids = pids_of(llm)
        killed = 0.0
        params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)

        async def talks() -> None:
            nonlocal killed
            async for output in llm.generate("some text", params):
                if not killed and len(output.outputs[0].token_ids) > 3:
                    os.kill(pids[1], signal.SIGKILL)
                    killed = time.monotonic()

        with pytest.raises(RuntimeError) as failure:
            await talks()
        took = time.monotonic() - killed
        told = str(failure.value.__cause__)
        assert "worker 1 (tensor-parallel part 1 of 2" in told
        assert f"process {pids[1]}, was ended by SIGKILL" in told
        with pytest.raises(RuntimeError, match="not running"):
            async for _ in llm.generate("more", params):
                pass
        assert gone(pids)
        return took

    assert asyncio.run(talk()) < 5


def test_no_worker_outlives_its_engine(tiny: str) -> None:
    script = (
        "import sys; from modelport import LLM\n"
        f"llm = LLM({tiny!r}, dtype='float32', max_model_len=64, pipeline_parallel_size=2)\n"
        "print(*llm._front.engine.runner.worker_pids, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as driver:
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(pids) == 2
        assert not gone(pids, 0)
        driver.kill()
    assert gone(pids)


def test_heads_that_cannot_be_divided_stop_the_start(tiny: str) -> None:
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn: num_attention_heads=4 and num_key_value_heads=2 .* use"
    ):
        LLM(tiny, **SETTINGS, tensor_parallel_size=3)


def test_a_worker_that_sees_other_plugins_stops_the_start(tiny: str) -> None:
    plugins = load_plugins()
    plugins.records.append(PluginRecord("acme", "acme_modelport", version="1.2", status="loaded"))
    settings = EngineConfig(model=tiny, tensor_parallel_size=2, **SETTINGS)
    with pytest.raises(PluginError, match=r"worker 0 .* on .* it lacks acme 1\.2, and has besides none; install"):
        Frontend(settings, plugins=plugins)


@pytest.mark.slow
def test_a_worker_finds_a_plugin_that_was_asked_for_by_name(tmp_path: Path, tiny: str, monkeypatch) -> None:
    code = (
        "from modelport import Architecture, hookimpl\n"
        "from modelport.plugins.text.llama import Llama, LlamaConfig\n"
        "modelport_api = 1\n\n"
        "@hookimpl\ndef register_architectures():\n"
        "    return [Architecture('AcmeForCausalLM', Llama, LlamaConfig)]\n"
    )
    (tmp_path / "acme_models.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = json.loads((Path(tiny) / "config.json").read_text()) | {"architectures": ["AcmeForCausalLM"]}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    settings = {**SETTINGS, "plugins": ("acme_models",), "load_format": "dummy", "skip_tokenizer_init": True}
    llm = LLM(str(tmp_path / "model"), **settings, pipeline_parallel_size=2)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    (output,) = llm.generate([[1, 2, 3]], params, use_tqdm=False)
    (wanted,) = LLM(str(tmp_path / "model"), **settings).generate([[1, 2, 3]], params, use_tqdm=False)
    assert output.outputs[0].token_ids == wanted.outputs[0].token_ids


def test_functions_are_not_sent_to_workers(tiny: str) -> None:
    llm = LLM(tiny, **SETTINGS, pipeline_parallel_size=2)
    with pytest.raises(ValueError, match="logits_processors are functions"):
        llm.generate("a", SamplingParams(logits_processors=[lambda ids, logits: logits]), use_tqdm=False)
    os.kill(pids_of(llm)[0], signal.SIGKILL)
    for _ in range(2):  # the second finds nobody
        with pytest.raises(WorkerError):
            llm.generate("a", GREEDY, use_tqdm=False)


def test_results_survive_the_wire() -> None:
    logprobs = TokenLogprobs(-0.5, 2, [4, 7], [-0.25, -0.5])
    result = StepResult([5, -1], {0: logprobs}, {1: [logprobs, logprobs]}, {1: "no finite logits"})
    assert read_result(decode(encode(write_result(result)))) == result
