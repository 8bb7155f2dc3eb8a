"""A machine that is cut off, as a network namespace: both sides notice, end what they run, and can go on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

SECRET = "0123456789abcdef" * 2
HOSTS = {"a": "10.213.77.1", "b": "10.213.77.2"}
ENGINE = """
import sys, time
from modelport import LLM, SamplingParams
from modelport.parallel.fleet import WorkerError
llm = LLM({model!r}, dtype="float32", max_model_len=128, skip_tokenizer_init=True, pipeline_parallel_size=2,
          nnodes=2, master_addr={host!r}, master_port=29577, worker_timeout=2.0)
params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
def tokens():
    return llm.generate({{"prompt_token_ids": [1, 2]}}, params, use_tqdm=False)[0].outputs[0].token_ids
wanted = tokens()
print("pids", *llm._front.engine.runner.worker_pids, flush=True)
try:
    while True:
        tokens()
except WorkerError as error:
    print("error", error, flush=True)
sys.stdin.readline()
llm.restart_workers()
print("again", tokens() == wanted, flush=True)
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def inside(space: str, *command: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["ip", "netns", "exec", space, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "MODELPORT_SECRET": SECRET},
    )  # fmt: skip


@pytest.fixture
def machines() -> Iterator[dict[str, str]]:
    """Names of two namespaces that a cable, `eth` in each, connects; nothing outside is touched."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip")
    names = {which: f"modelport-{os.getpid()}-{which}" for which in HOSTS}
    try:
        for name in names.values():
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        ip("-n", names["a"], "link", "add", "eth", "type", "veth", "peer", "name", "eth", "netns", names["b"])
        for which, name in names.items():
            ip("-n", name, "addr", "add", f"{HOSTS[which]}/24", "dev", "eth")
            for link in ("lo", "eth"):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
def test_a_machine_that_is_cut_off_is_noticed_on_both_sides(processes, machines: dict[str, str], tiny: str) -> None:
    flags = ["-pp", "2", "--nnodes", "2", "--node-rank", "1", "--master-addr", HOSTS["a"], "--master-port", "29577"]
    other = (machines["b"], sys.executable, "-m", "modelport", "generate", "-m", tiny, *flags)
    started = [inside(machines["a"], sys.executable, "-c", ENGINE.format(model=tiny, host=HOSTS["a"])), inside(*other)]
    engine, second = started
    try:
        kind, *pids = engine.stdout.readline().split()
        assert kind == "pids"
        pids = list(map(int, pids))
        time.sleep(0.3)  # in the middle of decoding
        assert not processes.gone(pids[:1], 0)
        began = time.monotonic()
        ip("-n", machines["b"], "link", "set", "eth", "down")
        error = engine.stdout.readline()
        assert time.monotonic() - began < 5
        assert error.startswith("error worker ")
        assert "its machine is cut off" in error
        assert processes.gone(pids[:1], 1.0)
        os.kill(pids[1], signal.SIGKILL)  # what its agent tells of that is never acknowledged
        second.wait(20)  # it cannot be told, and finds out
        assert processes.gone(pids[1:], 1.0)
        ip("-n", machines["b"], "link", "set", "eth", "up")
        started.append(inside(*other))
        engine.stdin.write("\n")
        engine.stdin.flush()
        assert engine.stdout.readline() == "again True\n"
        engine.stdin.close()
        assert engine.wait(10) == 0
        assert started[-1].wait(10) == 0
    finally:
        for process in started:
            process.kill()
            process.wait()
