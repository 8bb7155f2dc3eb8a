"""Who runs the places: executors by name, several machines, a Ray cluster; and the same plugins everywhere."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from modelport import LLM, EngineConfig, SamplingParams
from modelport.cli import main
from modelport.discovery import PluginRecord
from modelport.frontend import Frontend
from modelport.parallel import worker
from modelport.parallel.channel import Channel, Frame, Kind
from modelport.parallel.cluster import RayLauncher
from modelport.parallel.executor import ThreadExecutor, executor_class
from modelport.parallel.fleet import WorkerError
from modelport.parallel.network import interface_of
from modelport.parallel.nodes import NodesLauncher
from modelport.parallel.remote import ProcessExecutor
from modelport.plugin import PluginError, load_plugins

SETTINGS = {"dtype": "float32", "max_model_len": 64, "skip_tokenizer_init": True}
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
SECRET = "0123456789abcdef" * 2
EVERY = ["inproc", "mp", pytest.param("ray", marks=pytest.mark.slow)]
ACME = """
from modelport import Architecture, hookimpl
from modelport.plugins.text.llama import Llama, LlamaConfig
modelport_api = 1
OFFERS = False

@hookimpl
def register_architectures():
    return [Architecture("AcmeForCausalLM", Llama, LlamaConfig)]

@hookimpl
def register_executors():
    return {"acme": "acme_models:run", "ray": "acme_models:run"} if OFFERS else {}

def run(*_):
    raise ValueError("acme runs nothing")
"""


def tokens(llm: LLM) -> list[int]:
    return llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids


@pytest.fixture
def acme(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of an architecture that only a module in a folder provides."""
    (tmp_path / "acme_models.py").write_text(ACME)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "acme_models", raising=False)
    config = json.loads((Path(tiny) / "config.json").read_text()) | {"architectures": ["AcmeForCausalLM"]}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    return str(tmp_path / "model")


def install(folder: Path) -> None:
    """As a package with an entry point."""
    about = folder / "acme_modelport-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-modelport\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text("[modelport.plugins]\nacme = acme_models\n")


def test_hook_register_executors(acme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built_in = load_plugins()
    assert executor_class(built_in, "mp") is ProcessExecutor
    assert executor_class(built_in, "inproc") is ThreadExecutor
    with pytest.raises(ValueError, match=r"executor='slurm' is offered by no plugin; there are inproc, mp, ray"):
        LLM(acme, **SETTINGS, plugins=["acme_models"], load_format="dummy", tensor_parallel_size=2, executor="slurm")
    import acme_models

    monkeypatch.setattr(acme_models, "OFFERS", True)
    for name in ("acme", "ray"):  # a third party comes before what is built in
        with pytest.raises(ValueError, match="acme runs nothing"):
            executor_class(load_plugins(["acme_models"]), name)()
    with pytest.raises(ValueError, match=r"there are inproc, mp$"):
        executor_class(load_plugins(blocked=["ray"]), "ray")


@pytest.mark.parametrize("executor", EVERY)
@pytest.mark.parametrize("how", ["plugins=", "entry point"])
def test_a_third_partys_plugin_works_in_workers(acme: str, executor: str, how: str) -> None:
    settings = {**SETTINGS, "load_format": "dummy"}
    if how == "entry point":
        install(Path(acme).parent)
    else:
        settings["plugins"] = ("acme_models",)
    wanted = tokens(LLM(acme, **settings))
    llm = LLM(acme, **settings, pipeline_parallel_size=2, executor=executor)
    assert tokens(llm) == wanted
    llm._front.engine.shutdown()


@pytest.mark.parametrize("executor", EVERY[1:])
def test_a_machine_that_lacks_a_plugin_stops_the_start(tiny: str, executor: str) -> None:
    settings = EngineConfig(model=tiny, tensor_parallel_size=2, executor=executor, **SETTINGS)
    host = re.escape(socket.gethostname())

    def told(*records: PluginRecord, version: str | None = None) -> str:
        plugins = load_plugins()
        plugins.records.extend(records)
        if version is not None:
            for i, record in enumerate(plugins.records):
                if record.name == "llama":
                    plugins.records[i] = PluginRecord("llama", record.module, version=version, status="loaded")
        with pytest.raises(PluginError) as error:
            Frontend(settings, plugins=plugins)
        assert "install the same packages on every machine" in str(error.value)
        return str(error.value)

    lacking = told(
        PluginRecord("acme", "acme_modelport", version="1.2", status="loaded"),
        PluginRecord("no.such", "no.such", status="loaded"),
    )
    assert re.match(rf"{host} lacks the plugin 'acme' 1\.2; {host} cannot load what was asked for: .*no\.such", lacking)
    if executor == "mp":
        assert re.match(rf"{host} has version \S+ of the plugin 'llama', and the engine 9", told(version="9"))


def test_plugins_that_only_a_worker_has_are_left_out(tiny: str) -> None:
    plugins = load_plugins(blocked=["gguf", "pickle"])
    settings = EngineConfig(model=tiny, tensor_parallel_size=2, **SETTINGS)
    front = Frontend(settings, plugins=plugins)  # the workers find these two, and nobody told them to block them
    front.engine.shutdown()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def test_two_machines_divide_a_model(processes, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELPORT_SECRET", SECRET)
    wanted = tokens(LLM(tiny, **SETTINGS))
    settings = {"nnodes": 2, "master_addr": "127.0.0.1", "master_port": free_port(), "pipeline_parallel_size": 2}
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "modelport", "generate", "-m", tiny, *flags, "--node-rank", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as other:
        try:
            llm = LLM(tiny, **SETTINGS, **settings, worker_timeout=2.0)
            assert tokens(llm) == wanted
            pids = processes.workers(llm)
            agents = [processes.parent(pid) for pid in pids]
            assert processes.parent(agents[0]) == os.getpid()
            assert processes.parent(agents[1]) == other.pid
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(WorkerError):
                tokens(llm)
            llm.restart_workers()
            assert tokens(llm) == wanted
            pids = processes.workers(llm)
            os.kill(agents[1], signal.SIGSTOP)  # with its workers, as a machine does that is cut off
            os.kill(pids[1], signal.SIGSTOP)
            began = time.monotonic()
            with pytest.raises(WorkerError, match=r"worker 1 .* has not answered for 2 s .* machine is cut off"):
                tokens(llm)
            assert time.monotonic() - began < 5
            os.kill(agents[1], signal.SIGCONT)
            llm._front.engine.shutdown()
            assert other.wait(5) == 0
            assert processes.gone([*pids, *agents])
        finally:
            other.kill()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"nnodes": 2}, "master_addr"),
        ({"nnodes": 2, "master_addr": "127.0.0.1"}, "MODELPORT_SECRET"),
        ({"nnodes": 3, "master_addr": "127.0.0.1", "secret": SECRET}, "2 places cannot be shared out .* 3 machines"),
        ({"nnodes": 2, "node_rank": 1, "master_addr": "127.0.0.1"}, "only machine 0 has an engine"),
    ],
)
def test_wrong_settings_of_several_machines_are_told(tiny, settings: dict, told: str, monkeypatch) -> None:
    settings = dict(settings)
    if secret := settings.pop("secret", None):
        monkeypatch.setenv("MODELPORT_SECRET", secret)
    with pytest.raises(ValueError, match=told):
        LLM(tiny, **SETTINGS, pipeline_parallel_size=2, **settings)


def test_a_machine_with_another_secret_says_so(tiny: str, monkeypatch, capfd: pytest.CaptureFixture) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from modelport.parallel.channel import Listener

    listener = Listener(("127.0.0.1", 0), b"another secret than theirs")
    monkeypatch.setenv("MODELPORT_SECRET", SECRET)
    port = listener.address.rpartition(":")[2]
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(listener.accept)
        flags = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "127.0.0.1", "--master-port", port]
        assert main(["generate", "-m", tiny, "-pp", "2", *flags]) == 2
        assert refused.result() is None
    assert "set the same MODELPORT_SECRET on every machine" in capfd.readouterr().err


def test_devices_are_numbered_within_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    settings = EngineConfig(model="m", tensor_parallel_size=4, nnodes=2)
    assert [worker._on_device(settings, i).device for i in (0, 1)] == ["cuda:0", "cuda:1"]
    assert chosen == [0, 1]
    with pytest.raises(ValueError, match="has 2 GPUs, too few for place 3"):
        worker._on_device(settings, 2)
    assert worker._on_device(EngineConfig(model="m", device="cpu"), 0).device == "cpu"


def test_copies_on_one_machine_have_devices_of_their_own(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, send = [], Channel.send

    def sends(channel: Channel, frame: Frame) -> None:
        if frame.kind == Kind.FORK:
            asked.append(frame.message["ranks"])
        send(channel, frame)

    monkeypatch.setattr(Channel, "send", sends)
    llm = LLM(tiny, **SETTINGS, tensor_parallel_size=2, data_parallel_size=2)
    llm._front.engine.shutdown()
    assert asked == [[[0, 0], [1, 1]], [[0, 2], [1, 3]]]
    assert RayLauncher.first_device == NodesLauncher.first_device == 0  # their agents see no other copy's


def test_networks_have_names() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None


@pytest.mark.slow
def test_copies_lie_where_ray_has_room(processes, tiny: str) -> None:
    ray = pytest.importorskip("ray")
    wanted = tokens(LLM(tiny, **SETTINGS))
    llm = LLM(tiny, **SETTINGS, data_parallel_size=2, executor="ray")  # on a cluster that is started for them
    pids = [pid for engine in llm._front.engine.engines for pid in engine.runner.worker_pids]
    assert len(set(pids)) == 2
    for _ in range(2):
        outputs = llm.generate([[1, 2, 3]] * 4, GREEDY, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == [wanted] * 4
    llm._front.engine.shutdown()
    assert processes.gone(pids)
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_ray_cluster_runs_the_places(processes, tiny: str) -> None:
    ray = pytest.importorskip("ray")
    wanted = tokens(LLM(tiny, **SETTINGS))
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:
        with pytest.raises(ValueError, match=r"no room for 3 places, each of which takes a CPU: it has 2 in all"):
            LLM(tiny, **SETTINGS, pipeline_parallel_size=3, executor="ray")
        llm = LLM(tiny, **SETTINGS, tensor_parallel_size=2, executor="ray", worker_timeout=3.0)
        assert tokens(llm) == wanted
        pids = processes.workers(llm)
        agents = [processes.parent(pid) for pid in pids]
        assert len(set(agents)) == 2
        os.kill(pids[0], signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"worker 0 .* was ended by SIGKILL"):
            tokens(llm)
        llm.restart_workers()
        assert tokens(llm) == wanted
        for agent in agents:  # their actors stay
            os.kill(agent, signal.SIGKILL)
        with pytest.raises(WorkerError):
            tokens(llm)
        llm.restart_workers()
        assert tokens(llm) == wanted
        pids = processes.workers(llm)
        llm._front.engine.shutdown()
        assert processes.gone(pids)
        assert ray.is_initialized()  # it was there before
        assert ray.available_resources().get("CPU", 0) == 2 or time.sleep(2) or ray.available_resources()["CPU"] == 2
    finally:
        ray.shutdown()
