"""The `modelport` command: quick where it must be, one line where it fails, and every flag arrives where it belongs."""

import importlib
import io
import json
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelport import __version__, cli
from modelport.cli import chat, doctor, flags, generate
from modelport.discovery import PluginRecord
from modelport.sampling_params import SamplingParams


class FakeLLM:
    """Answers every prompt with two pieces, and keeps what it was asked."""

    calls: list
    pieces = ("Hello", " there")

    def __init__(self, **settings: object):
        type(self).calls = [("settings", settings)]

    def stream(self, prompt: object, params: SamplingParams, *, lora_request: str | None) -> Iterator:
        return self._stream("stream", prompt, params, lora_request)

    def _stream(self, kind: str, prompt: object, params: SamplingParams, adapter: str | None) -> Iterator:
        self.calls.append((kind, prompt, params) if adapter is None else (kind, prompt, params, adapter))
        for end in range(1, len(self.pieces) + 1):
            yield self._output("".join(self.pieces[:end]), end)

    def stream_chat(self, messages: list, params: SamplingParams, *, lora_request: str | None) -> Iterator:
        return self._stream("stream_chat", list(messages), params, lora_request)

    def generate(self, prompt: object, params: SamplingParams, *, use_tqdm: bool, lora_request: str | None) -> list:
        return list(self._stream("generate", prompt, params, lora_request))[-1:]

    def chat(self, messages: list, params: SamplingParams, *, use_tqdm: bool, lora_request: str | None) -> list:
        return list(self._stream("chat", messages, params, lora_request))[-1:]

    def _output(self, text: str, tokens: int) -> object:
        return types.SimpleNamespace(outputs=[types.SimpleNamespace(text=text, token_ids=list(range(tokens)))])


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    monkeypatch.setattr("modelport.LLM", FakeLLM, raising=False)
    return FakeLLM


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["models"],
        ["models", "--json"],
        ["models", "--markdown"],
        ["plugins", "--no-load"],
        ["plugins", "--no-load", "--json"],
        ["plugins", "-h"],
    ],
)
def test_answers_without_torch_and_at_once(arguments: list[str]) -> None:
    code = (
        "import sys, modelport.cli as cli\n"
        "try: status = cli.main(sys.argv[1:])\n"
        "except SystemExit as end: status = end.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'pydantic', 'jinja2', 'pluggy'} & set(sys.modules)\n"
        "sys.exit(status or str(heavy) if heavy else status)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert time.perf_counter() - started < 2  # the aim is 0.3 s; a busy machine gets room


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"modelport {__version__}\n"
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["genrate"], ["generate", "--dtype", "float8", "x"]])
def test_a_wrong_command_line_exits_2_with_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage: modelport" in capsys.readouterr().err


def test_generate_streams_text_to_stdout_and_timings_to_stderr(llm, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "Hi"]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello there\n"
    assert "2 tokens" in err
    assert "first token after" in err
    kind, prompt, params = llm.calls[-1]
    assert (kind, prompt, params.temperature, params.max_tokens) == ("stream", "Hi", 0.0, 256)
    assert llm.calls[0] == ("settings", {"model": "smollm2"})


def test_every_flag_reaches_the_engine_or_the_sampler(llm, capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "generate Hi -q --no-stream -m here --dtype float32 --max-model-len 64 --seed 7 --no-enable-prefix-caching "
        "--trust-remote-code -p no:gpt2,acme.model -p no:llama "
        "--max-tokens 3 --temperature 0.5 --top-p 0.9 --top-k 5 --min-p 0.1 --repetition-penalty 1.5 --stop a --stop b"
    )
    assert cli.main(line.split()) == 0
    assert capsys.readouterr() == ("Hello there\n", "")
    assert llm.calls[0][1] == {
        "model": "here",
        "dtype": "float32",
        "max_model_len": 64,
        "seed": 7,
        "enable_prefix_caching": False,
        "trust_remote_code": True,
        "plugins": ("acme.model",),
        "blocked_plugins": ("gpt2", "llama"),
    }
    kind, _, params = llm.calls[-1]
    wanted = SamplingParams(
        max_tokens=3, temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.5, stop=["a", "b"]
    )
    assert (kind, params) == ("generate", wanted)


@pytest.mark.parametrize("command", ["generate Hi -q", "generate Hi -q --no-stream", "generate Hi -q --chat"])
def test_adapters_are_named_and_chosen(llm, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command.split(), "--lora", "a=x/y", "--lora", "b=z=1", "--lora-name", "b"]) == 0
    assert llm.calls[0][1] == {"lora_modules": {"a": "x/y", "b": "z=1"}, "model": flags.DEFAULT_MODEL}
    assert llm.calls[-1][-1] == "b"
    for wrong, message in (
        (["--lora", "a"], "'a' should read NAME=PATH"),
        (["--lora", "a=x", "--lora", "a=y"], "'a' twice"),
        (["--lora", "a=x", "--lora", "b=y"], "choose one with --lora-name"),
    ):
        assert cli.main([*command.split(), *wrong]) == 2
        assert message in capsys.readouterr().err


def test_every_engine_setting_has_a_flag_with_a_description() -> None:
    from modelport.config import EngineConfig

    parser = cli._parser(["generate"])
    text = " ".join(parser._subparsers._group_actions[0].choices["generate"].format_help().split())
    for name, field in EngineConfig.model_fields.items():
        if name not in flags._NO_FLAG - {"model"}:
            assert "--" + name.replace("_", "-") in text
            assert field.description in text


@pytest.mark.parametrize("extra", [[], ["--no-stream"]])
def test_generate_as_chat(llm, extra: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--system", "Be kind.", "Hi", *extra]) == 0
    kind, messages, _ = llm.calls[-1]
    assert kind == ("chat" if extra else "stream_chat")
    assert messages == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert capsys.readouterr().out == "Hello there\n"


@pytest.mark.parametrize("given", [[], ["-"]])
def test_generate_reads_a_pipe(llm, given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    assert cli.main(["generate", *given]) == 0
    assert llm.calls[-1][1] == "two\nlines"


def test_generate_without_a_prompt_says_how(llm, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    assert cli.main(["generate"]) == 2
    assert "modelport: error: there is no prompt; write it in quotes" in capsys.readouterr().err


def test_timings_count_the_tokens_after_the_first() -> None:
    assert generate._timings(11, 1.5, 10.0, 10.5, 12.5).startswith(
        "11 tokens, 5.0 tokens per second; first token after 0.5"
    )
    assert generate._timings(1, 1.5, 10.0, 10.5, 10.5) == "1 tokens in 0.50 s; model loaded in 1.5 s"


def talk(monkeypatch: pytest.MonkeyPatch, *lines: str, arguments: tuple[str, ...] = ()) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return cli.main(["chat", *arguments])


def test_chat_remembers_until_reset(llm, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert talk(monkeypatch, "one", "", "two", "/reset", "three", "/exit", "four", arguments=("--system", "S")) == 0
    asked = [[message["content"] for message in messages] for _, messages, _ in llm.calls[1:]]
    assert asked == [["S", "one"], ["S", "one", "Hello there", "two"], ["S", "three"]]
    assert capsys.readouterr().out == "Hello there\n" * 3


def test_chat_knows_its_commands(llm, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert talk(monkeypatch, "/help", "/nothing", "/etc/hosts is what?") == 0
    out = capsys.readouterr().out
    assert out.count("/reset forgets the conversation") == 2
    assert "there is no command /nothing" in out
    assert len(llm.calls) == 2  # the question with a slash is a question


def test_chat_survives_a_refused_message(llm, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(self, messages: list, params: SamplingParams, *, lora_request: str | None) -> Iterator:
        if messages[-1]["content"] == "long":
            raise ValueError("the prompt is too long")
        return FakeLLM._stream(self, "stream", list(messages), params, lora_request)

    monkeypatch.setattr(FakeLLM, "stream_chat", refuse)
    assert talk(monkeypatch, "long", "short") == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("Hello there\n", "modelport: error: the prompt is too long\n")
    assert llm.calls[-1][1] == [{"role": "user", "content": "short"}]


def test_ctrl_c_stops_the_answer_and_not_the_program(llm, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    closed = []

    def interrupted(self, messages: list, params: SamplingParams, *, lora_request: str | None) -> Iterator:
        self.calls.append(list(messages))
        try:
            yield self._output("Hel", 1)
            if len(messages) == 1:
                signal.raise_signal(signal.SIGINT)
            yield self._output("Hello", 2)
            yield self._output("Hello there", 3)
        except GeneratorExit:
            closed.append(True)
            raise

    monkeypatch.setattr(FakeLLM, "stream_chat", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert talk(monkeypatch, "one", "two") == 0
    assert capsys.readouterr().out == "Hello [stopped]\nHello there\n"
    assert closed == [True]
    assert [message["content"] for message in llm.calls[-1]] == ["one", "Hello", "two"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_interrupts() -> None:
    with chat._stop_flag() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no such thing; try another"), "no such thing; try another"),
        (FileNotFoundError("model 'x' is nowhere"), "model 'x' is nowhere"),
        (RuntimeError("bad"), "RuntimeError: bad (this should not happen; MODELPORT_TRACEBACK=1 shows where it did)"),
    ],
)
def test_an_error_is_one_line(llm, monkeypatch, capsys, error: Exception, line: str) -> None:
    def fail(self, **settings: object) -> None:
        raise error

    monkeypatch.setattr(FakeLLM, "__init__", fail)
    assert cli.main(["generate", "Hi"]) == 2
    assert capsys.readouterr().err == f"modelport: error: {line}\n"
    monkeypatch.setenv("MODELPORT_TRACEBACK", "1")
    assert cli.main(["generate", "Hi"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_pydantic_error_names_field_and_value() -> None:
    from modelport.config import EngineConfig

    with pytest.raises(ValueError, match="max_model_len") as caught:
        EngineConfig(model="x", max_model_len=0)
    assert cli.describe(caught.value) == "max_model_len=0: Input should be greater than 0"


def test_ctrl_c_ends_generate_quietly(llm, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(self, prompt: str, params: SamplingParams, *, lora_request: str | None) -> Iterator:
        yield self._output("Hel", 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeLLM, "stream", interrupted)
    assert cli.main(["generate", "Hi"]) == 130
    assert capsys.readouterr().err == "\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    pipe = f"{sys.executable} -m modelport plugins --json | {sys.executable} -c 'import sys; sys.stdin.close()'"
    done = subprocess.run(["sh", "-c", f"for i in 1 2 3; do {pipe}; done"], capture_output=True, text=True)
    assert done.stderr == ""


def models(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[tuple[str, str], dict]:
    assert cli.main(["models", "--json", *arguments]) == 0
    return {(row["architecture"], row["category"]): row for row in json.loads(capsys.readouterr().out)}


def test_models_lists_the_ledger(capsys: pytest.CaptureFixture[str]) -> None:
    rows = models(capsys, "-p", "no:gpt2")
    llama = rows["LlamaForCausalLM", "text generation"]
    assert (llama["plugin"], llama["tasks"], llama["modalities"]) == ("llama", ["generate"], "T")
    assert "Llama 3.1" in llama["models"]
    gpt2 = rows["GPT2LMHeadModel", "text generation"]
    assert (gpt2["plugin"], gpt2["level"], gpt2["checked"]) == (None, "unverified", None)
    assert ("AquilaModel", "text generation") in rows  # no row of the project's, and provided all the same
    assert cli.main(["models"]) == 0
    table = capsys.readouterr().out
    assert all(architecture in table for architecture, _ in rows)


@pytest.mark.parametrize(
    ("arguments", "inside", "outside"),
    [
        (["--category", "embedding"], "MistralModel", "MistralForCausalLM"),
        (["--task", "reward"], "Qwen2ForRewardModel", "Qwen2ForCausalLM"),
        (["--modality", "audio"], "UltravoxModel", "Phi3VForCausalLM"),
        (["--modality", "V"], "Qwen2VLForConditionalGeneration", "Phi3VForCausalLM"),
        (["--level", "unverified", "-p", "no:gpt2"], "GPT2LMHeadModel", "LlamaForCausalLM"),
        (["LLAMA"], "MllamaForConditionalGeneration", "GPT2LMHeadModel"),
        (["pythia"], "GPTNeoXForCausalLM", "GPT2LMHeadModel"),  # by the name of a model
    ],
)
def test_models_filters(arguments: list[str], inside: str, outside: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = {architecture for architecture, _ in models(capsys, *arguments)}
    assert inside in names
    assert outside not in names


def test_models_says_when_a_filter_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "no-such-model"]) == 0
    assert capsys.readouterr() == ("", "no such model; `modelport models` without filters lists all\n")


def test_the_page_and_the_results_agree(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--markdown"]) == 0
    page = (Path(__file__).parents[3] / "docs" / "supported-models.md").read_text()
    assert page == capsys.readouterr().out, "docs/supported-models.md is out of date; run `make ledger`"


@pytest.fixture
def vendor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plugin that is asked for by name, provides an architecture, and brings no results."""
    (tmp_path / "vendor_y.py").write_text(
        "from modelport import Architecture, hookimpl\nmodelport_api = 1\n"
        "@hookimpl\ndef register_architectures():\n"
        "    return [Architecture('YForCausalLM', 'm:C', dict, tasks=('embed',), maintainers=('Ann', 'Bo'))]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_models_shows_a_vendors_architecture_as_unverified(vendor: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = models(capsys, "-p", "vendor_y")["YForCausalLM", "text embedding"]
    assert (row["plugin"], row["level"], row["tasks"], row["checked"]) == ("vendor_y", "unverified", ["embed"], None)
    assert cli.main(["models", "YFor", "-p", "vendor_y"]) == 0
    assert "maintained by Ann, Bo" in capsys.readouterr().out
    assert cli.main(["models", "--markdown", "-p", "vendor_y"]) == 0
    assert "YForCausalLM" not in capsys.readouterr().out  # the page is about what is built in


def test_plugins_tells_what_loads_and_what_it_provides(vendor: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plugins", "-p", "no:gpt2,vendor_y", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["gpt2"]["status"] == "blocked"
    assert (rows["llama"]["status"], rows["llama"]["distribution"], rows["llama"]["api"]) == ("loaded", "modelport", 1)
    assert "LlamaForCausalLM" in rows["llama"]["provides"]
    assert rows["gguf"]["hooks"] == ["load_tokenizer", "open_weights", "read_config"]
    assert (rows["vendor_y"]["provides"], rows["vendor_y"]["maintainers"]) == (["YForCausalLM"], ["Ann", "Bo"])
    assert cli.main(["plugins", "-p", "vendor_y"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "YForCausalLM (maintained by Ann, Bo)" in lines["vendor_y"]
    assert "open_weights" in lines["gguf"]


def test_a_plugin_in_the_current_folder_needs_no_installation(vendor: Path, monkeypatch, capsys) -> None:
    """The console script has no current folder on its path, unlike `python -m`."""
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", str(vendor))])
    monkeypatch.delitem(sys.modules, "vendor_y", raising=False)
    monkeypatch.chdir(vendor)
    for listing in ("--load", "--no-load"):
        assert cli.main(["plugins", listing, "-p", "vendor_y", "--json"]) == 0
        status = {row["name"]: row["status"] for row in json.loads(capsys.readouterr().out)}
        assert status["vendor_y"] == ("loaded" if listing == "--load" else "installed")


def test_plugins_tells_what_is_broken_and_why(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("modelport.plugin._imported", lambda record: importlib.import_module("no_such_part"))
    assert cli.main(["plugins"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("llama "))
    assert "broken" in line
    assert "No module named 'no_such_part'" in line


def test_plugins_without_loading_shows_metadata(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plugins", "--no-load", "-p", "no:gpt2", "--json"]) == 0
    status = {row["name"]: row["status"] for row in json.loads(capsys.readouterr().out)}
    assert (status["gpt2"], status["llama"]) == ("blocked", "installed")


def test_blocking_an_unknown_plugin_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plugins", "-p", "no:lama"]) == 2
    assert "did you mean 'llama'" in capsys.readouterr().err


def test_doctor_reports_and_its_status_tells(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = [doctor.Finding("python", "3.11"), doctor.Finding("plugins", "'acme' is broken: no")]
    monkeypatch.setattr(doctor, "_findings", lambda args: iter(found))
    assert cli.main(["doctor"]) == 0
    assert "no problems found" in capsys.readouterr().out
    found[1] = doctor.Finding("plugins", "'acme' is broken: no", problem=True)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "!!  plugins          'acme' is broken: no" in out
    assert "1 problem found" in out


def test_doctor_sees_a_broken_plugin_and_an_old_package(monkeypatch) -> None:
    plugins = types.SimpleNamespace(
        records=[PluginRecord("acme", "acme.model", "acme-llm", "0.3", status="broken", reason="no module 'x'")],
        architectures={},
        conflicts={"XForCausalLM": "XForCausalLM is provided by two"},
    )
    problems = [finding.text for finding in doctor._plugins(plugins) if finding.problem]
    assert problems == ["'acme' (acme-llm 0.3) is broken: no module 'x'", "XForCausalLM is provided by two"]
    monkeypatch.setattr(
        doctor.metadata, "requires", lambda name: ["numpy>=999", "nowhere-to-be-found", "numpy", 'x; extra == "y"']
    )
    texts = [(finding.problem, finding.text) for finding in doctor._requirements()]
    assert [problem for problem, _ in texts] == [True, True, False]
    assert ">=999 is needed" in texts[0][1]
    assert "is not installed; pip install 'nowhere-to-be-found'" in texts[1][1]


@pytest.mark.parametrize("package", ["packaging", "torch", "pluggy"])
def test_doctor_names_a_package_that_is_missing(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from modelport import cli; sys.exit(cli.main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert package in done.stdout.split("!!  imports")[1]


def test_doctor_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor"])
    out = capsys.readouterr().out
    for topic in ("python", "torch", "transformers", "cpu dtypes", "cpu kernels", "plugins", "default model"):
        assert f"  {topic} " in out
    assert "float32, bfloat16" in out
