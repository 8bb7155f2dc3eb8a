"""From a name to files, a configuration and a stream of weights; every way it can fail says what to do."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pluggy
import pytest
import torch
from safetensors.torch import save_file

from modelport import hookimpl, hookspecs
from modelport.loading.checkpoint import open_weights, read_config, resolve
from modelport.plugin import Checkpoint


def plugins_of(*implementations: object):
    manager = pluggy.PluginManager("modelport")
    manager.add_hookspecs(hookspecs)
    for i, implementation in enumerate(implementations):
        manager.register(implementation, name=f"plugin{i}")
    return SimpleNamespace(hook=manager.hook)


NONE = plugins_of()


class Source:
    """A source that knows one name."""

    def __init__(self, path: Path):
        self.path, self.asked = path, []

    @hookimpl
    def resolve_checkpoint(self, model, revision):
        self.asked.append((model, revision))
        return self.path if model == "acme/rocket" else None


# --- resolve


def test_a_local_folder_or_file_wins(tmp_path, monkeypatch):
    (tmp_path / "acme" / "rocket").mkdir(parents=True)
    (tmp_path / "x.gguf").touch()
    monkeypatch.chdir(tmp_path)
    source = Source(tmp_path)
    checkpoint = resolve("acme/rocket", None, plugins_of(source), load_format="pt", trust_remote_code=True)
    assert checkpoint == Checkpoint(Path("acme/rocket"), "acme/rocket", "pt", True)
    assert resolve("x.gguf", None, plugins_of(source)).path == Path("x.gguf")
    assert not source.asked


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert resolve("~/models", None, NONE).path == tmp_path / "models"
    with pytest.raises(FileNotFoundError, match=r"'~nobody-here/x': this path does not exist"):
        resolve("~nobody-here/x", None, NONE)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "../nothing", "~/nothing-here", "model.gguf"])
def test_a_path_that_does_not_exist(name):
    with pytest.raises(FileNotFoundError) as error:
        resolve(name, None, NONE)
    assert f"model {name!r}: this path does not exist" in str(error.value)
    assert "check its spelling" in str(error.value)


def test_a_plain_path_is_no_question_for_a_source(tmp_path):
    source = Source(tmp_path)
    with pytest.raises(FileNotFoundError):
        resolve("/no/such/folder", None, plugins_of(source))
    assert not source.asked


def test_a_name_nobody_knows_says_who_was_asked(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'acme/comet'.*asked: plugin0.*give the path of a local checkpoint"):
        resolve("acme/comet", None, plugins_of(Source(tmp_path)))
    with pytest.raises(FileNotFoundError, match=r"'comet'.*asked: none is loaded.*\"organisation/model\""):
        resolve("comet", None, NONE)


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name(name):
    with pytest.raises(ValueError, match=r"model is .*give a path"):
        resolve(name, None, NONE)


def test_a_source_that_answers_with_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"resolved 'acme/rocket' to .*gone.*does not exist"):
        resolve("acme/rocket", None, plugins_of(Source(tmp_path / "gone")))


def test_hook_resolve_checkpoint(tmp_path):
    """Asked with the name and the revision, until one answers; its own error goes through."""

    class Stern:
        @hookimpl
        def resolve_checkpoint(self, model):
            if model == "stern/model":
                raise FileNotFoundError("stern/model is gone; take another")

    first, second = Source(tmp_path), Source(tmp_path / "never")
    plugins = plugins_of(second, first, Stern())  # the last registered is asked first
    assert resolve("acme/rocket", "v2", plugins) == Checkpoint(tmp_path, "acme/rocket")
    assert first.asked == [("acme/rocket", "v2")]
    assert not second.asked
    with pytest.raises(FileNotFoundError, match=r"take another"):
        resolve("stern/model", None, plugins)


# --- config


def test_config_json(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["AcmeForCausalLM"], "hidden_size": 8}')
    assert read_config(Checkpoint(tmp_path, ""), NONE) == {"architectures": ["AcmeForCausalLM"], "hidden_size": 8}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config.json is not valid JSON .*download it again"),
        ("\udcff", r"config.json is not valid JSON"),
        ("[1]", r"config.json holds a list, not a JSON object"),
        (
            '{"model_type": "acme"}',
            r"config.json names no architectures \(model_type is 'acme'\); add .*modelport models",
        ),
        ('{"architectures": []}', r"config.json has architectures = \[\]; add"),
        ('{"architectures": "Acme"}', r"has architectures = 'Acme'; add"),
        ('{"architectures": [null]}', r"has architectures = \[None\]; add"),
    ],
)
def test_bad_config_json(text, message, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message):
        read_config(Checkpoint(tmp_path, ""), NONE)


def test_no_config(tmp_path):
    (tmp_path / "readme.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"holds no config.json \(it holds readme.txt\).*complete download"):
        read_config(Checkpoint(tmp_path, ""), NONE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.gguf", r"no plugin reads the file .*x.gguf; `modelport plugins`"),
        ("model.safetensors", r"give the folder that holds it"),
        ("model.bin", r'give the folder that holds it.*load_format="pt"'),
    ],
)
def test_a_file_that_nobody_reads(name, message, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=message):
        read_config(Checkpoint(tmp_path / name, ""), NONE)


def test_hook_read_config(tmp_path):
    """Asked before config.json is read; an answer without architectures is an error like a file's."""
    (tmp_path / "config.json").write_text('{"architectures": ["FromFile"]}')

    class Params:
        answer = None

        @hookimpl
        def read_config(self, checkpoint):
            assert checkpoint.name == "acme"
            return self.answer

    plugin = Params()
    checkpoint = Checkpoint(tmp_path, "acme")
    assert read_config(checkpoint, plugins_of(plugin))["architectures"] == ["FromFile"]
    plugin.answer = {"architectures": ["FromPlugin"]}
    assert read_config(checkpoint, plugins_of(plugin)) == plugin.answer
    plugin.answer = {"hidden_size": 1}
    with pytest.raises(ValueError, match=r"names no architectures"):
        read_config(checkpoint, plugins_of(plugin))


# --- weights

TENSORS = {"b": torch.randn(4, 3), "a": torch.randn(5).bfloat16(), "c": torch.arange(6), "empty": torch.empty(0, 2)}


def stream(folder: Path, load_format: str = "auto") -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in open_weights(Checkpoint(folder, "", load_format), {}, NONE)}


def same(got: dict, wanted: dict = TENSORS) -> bool:
    return got.keys() == wanted.keys() and all(
        got[k].dtype == wanted[k].dtype and torch.equal(got[k], wanted[k]) for k in wanted
    )


def save_shards(folder: Path, with_index: bool = True) -> list[Path]:
    names = list(TENSORS)
    files = [folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = names[:2], names[2:]
    for file, part in zip(files, parts, strict=True):
        save_file({name: TENSORS[name] for name in part}, file)
    if with_index:
        weight_map = {name: file.name for file, part in zip(files, parts, strict=True) for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_one_file(name, load_format, tmp_path):
    save_file(TENSORS, tmp_path / name)
    assert same(stream(tmp_path, load_format))


@pytest.mark.parametrize("with_index", [True, False])
def test_shards(with_index, tmp_path):
    files = save_shards(tmp_path, with_index)
    assert same(stream(tmp_path))
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"download what is missing") as error:
        open_weights(Checkpoint(tmp_path, ""), {}, NONE)
    assert (files[1].name if with_index else "lacks shard 2 of 2") in str(error.value)


def test_files_beside_the_index_are_left_alone(tmp_path):
    save_shards(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    assert same(stream(tmp_path))


def test_several_files_without_an_index(tmp_path):
    for name in ("x", "y"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"several safetensors files \(x.safetensors, y.safetensors\)"):
        stream(tmp_path)


def test_a_tensor_in_two_files(tmp_path):
    files = save_shards(tmp_path)
    save_file({"a": torch.ones(1)}, files[1])
    with pytest.raises(ValueError, match=r"tensor 'a' is stored in both"):
        open_weights(Checkpoint(tmp_path, ""), {}, NONE)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": [5]}}']
)
def test_a_damaged_index(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index.json is not a safetensors index"):
        stream(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd"])
def test_an_index_that_leaves_its_folder(name, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=r"points outside its own folder"):
        stream(tmp_path)


def test_a_truncated_file_is_known_before_the_first_tensor(tmp_path):
    files = save_shards(tmp_path)
    whole = files[1].read_bytes()
    for length in (0, 4, 20, len(whole) - 1):
        files[1].write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=rf"{files[1].name} \({length} bytes\) is truncated.*download or copy it again"
        ):
            open_weights(Checkpoint(tmp_path, ""), {}, NONE)
    files[1].write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"git lfs pull"):
        open_weights(Checkpoint(tmp_path, ""), {}, NONE)


def test_only_pickles(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r'can run code.*pass load_format="pt" if you trust'):
        stream(tmp_path)


def test_no_weights_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no \*.safetensors files \(it holds nothing\)"):
        stream(tmp_path)


def test_a_format_that_no_plugin_reads(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"load_format is 'gguf', and no plugin reads .*modelport plugins"):
        stream(tmp_path, "gguf")


def test_hook_open_weights(tmp_path):
    """Asked before safetensors, with the checkpoint and the configuration; None means "not mine"."""
    save_file(TENSORS, tmp_path / "model.safetensors")
    asked = []

    class Silent:
        @hookimpl
        def open_weights(self, checkpoint, config):
            asked.append((checkpoint.load_format, config))

    class Streams:
        @hookimpl
        def open_weights(self, config):
            return iter([("a", torch.full((1,), config["x"]))])

    checkpoint = Checkpoint(tmp_path, "")
    assert dict(open_weights(checkpoint, {"x": 7}, plugins_of(Streams(), Silent())))["a"].item() == 7
    assert same(dict(open_weights(checkpoint, {"x": 7}, plugins_of(Silent()))))
    assert asked == [("auto", {"x": 7})] * 2


MEASURE = """
import sys, torch
from pathlib import Path
from modelport.loading.safetensors import open_safetensors

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

folder = Path(sys.argv[1])
for _, tensor in open_safetensors(folder / "warm"):  # lazy imports and first allocations
    tensor.clone()
before, peak, kept = status("VmRSS"), 0.0, []
for _, tensor in open_safetensors(folder):
    kept.append(tensor.clone())
    peak = max(peak, status("VmRSS"))
print(peak - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_stays_near_the_weights(tmp_path):
    """A consumer that copies each tensor: weights + 20% + the largest tensor."""
    megabyte = 2**18  # float32 values
    for folder, count in ((tmp_path, 32), (tmp_path / "warm", 1)):
        folder.mkdir(exist_ok=True)
        save_file({f"w{i:03}": torch.ones(4, megabyte) for i in range(count)}, folder / "model.safetensors")
    ran = subprocess.run([sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, check=True)
    assert float(ran.stdout) < 1.2 * 128 + 4 + 8
