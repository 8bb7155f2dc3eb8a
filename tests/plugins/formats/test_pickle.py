"""Pickled checkpoints: only when asked for, only tensors, one file at a time."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pluggy
import pytest
import torch

from modelport import hookspecs
from modelport.loading.checkpoint import open_weights
from modelport.plugin import Checkpoint
from modelport.plugins.formats import pickle as plugin


@pytest.fixture
def plugins():
    manager = pluggy.PluginManager("modelport")
    manager.add_hookspecs(hookspecs)
    manager.register(plugin)
    return SimpleNamespace(hook=manager.hook)


def asked(folder: Path) -> Checkpoint:
    return Checkpoint(folder, "", load_format="pt")


def test_only_when_asked_for(tmp_path, plugins):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r'only pickled ones \(pytorch_model.bin\).*pass load_format="pt" if you trust'
    ):
        open_weights(Checkpoint(tmp_path, ""), {}, plugins)
    assert dict(open_weights(asked(tmp_path), {}, plugins))["a"].tolist() == [1, 1]
    assert list(dict(open_weights(asked(tmp_path / "pytorch_model.bin"), {}, plugins))) == ["a"]


@pytest.mark.parametrize("old", [False, True])
def test_shards_by_their_index(old, tmp_path, plugins):
    tensors = {"a": torch.randn(3, 2), "b": torch.randn(4).bfloat16()}
    files = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    for name, file in files.items():
        torch.save({name: tensors[name]}, tmp_path / file, _use_new_zipfile_serialization=not old)
    torch.save({"optimizer": torch.ones(1)}, tmp_path / "optimizer.pt")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    got = dict(open_weights(asked(tmp_path), {}, plugins))
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], tensors[name]) for name in tensors)
    (tmp_path / files["b"]).unlink()
    with pytest.raises(FileNotFoundError, match=r"lists pytorch_model-00002-of-00002.bin"):
        open_weights(asked(tmp_path), {}, plugins)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_code_in_a_pickle_does_not_run(tmp_path, plugins, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Malicious()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin cannot be read as plain tensors.*convert"):
        list(open_weights(asked(tmp_path), {}, plugins))
    assert not (tmp_path / "pwned").exists()


def test_truncated_and_odd_files_are_named(tmp_path, plugins):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(1000)}, file)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"pytorch_model.bin cannot be read.*truncated"):
        list(open_weights(asked(tmp_path), {}, plugins))
    torch.save({"model": {"a": torch.ones(1)}}, file)
    with pytest.raises(ValueError, match=r"no dictionary of tensors.*save its state_dict"):
        list(open_weights(asked(tmp_path), {}, plugins))
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r'load_format is "pt", but'):
        open_weights(asked(tmp_path), {}, plugins)
