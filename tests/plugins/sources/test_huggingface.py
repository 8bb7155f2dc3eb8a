"""Hub names: the cache first, one question to the hub with a deadline, one clear error; nothing is downloaded here."""

import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from modelport.plugins.sources import huggingface
from modelport.plugins.sources.huggingface import resolve_checkpoint


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(self, *args, **kwargs):
        raise ConnectionError("network is unreachable")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """A cached model; without one, the hub library says that it has none."""
    folder = tmp_path / "snapshot"

    def snapshot_download(repo_id, *, revision=None, local_files_only=False, allow_patterns, ignore_patterns):
        if local_files_only and not folder.exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        if not local_files_only:
            for file in ("config.json", "model.safetensors"):
                (folder / file).parent.mkdir(exist_ok=True)
                (folder / file).write_text("{}")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return folder


def fill(folder: Path, **files: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize("name", ["llama", "/abs/path", "./a/b", "a/b/c", "smollm2", "a\\b", "../x", "s3://x/y"])
def test_what_is_no_hub_name_is_left_to_others(name):
    assert resolve_checkpoint(name, None) is None


def test_the_cache_is_used_without_a_question(snapshot):
    fill(snapshot, config__json="{}", model__safetensors="")
    assert resolve_checkpoint("acme/rocket", None) == snapshot


def test_no_network_is_one_clear_error(snapshot):
    with pytest.raises(FileNotFoundError) as error:
        resolve_checkpoint("acme/rocket", "v2")
    for words in (
        "'acme/rocket' at revision 'v2'",
        "no such folder",
        "not in the local cache",
        "network is unreachable",
    ):
        assert words in str(error.value)
    assert "give the path of a local checkpoint" in str(error.value)


def test_offline_asks_nobody(snapshot, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface, "_ask", lambda *args: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=r"not in the local cache, and HF_HUB_OFFLINE is set; unset it"):
        resolve_checkpoint("acme/rocket", None)


def test_a_partly_cached_model_is_not_taken_for_a_whole_one(snapshot, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fill(snapshot, config__json="{}")
    with pytest.raises(FileNotFoundError, match=r"the local cache lacks its weights"):
        resolve_checkpoint("acme/rocket", None)
    fill(snapshot, **{"model.safetensors.index__json": '{"weight_map": {"a": "model-2.safetensors"}}'})
    with pytest.raises(FileNotFoundError, match=r"the local cache lacks model-2.safetensors"):
        resolve_checkpoint("acme/rocket", None)


def test_a_hub_that_does_not_answer_is_given_up_in_time(snapshot, monkeypatch):
    monkeypatch.setattr(huggingface, "_DEADLINE", 0.2)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, *args, **kwargs: time.sleep(2))
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"no answer within 0.2 seconds"):
        resolve_checkpoint("acme/rocket", None)
    assert time.monotonic() - start < 1.5


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("RepositoryNotFoundError", r"no such model; check the spelling, or set HF_TOKEN"),
        ("GatedRepoError", r"grants access on request; request it there"),
        ("RevisionNotFoundError", r"not this revision; leave it out"),
    ],
)
def test_what_the_hub_answers_is_said(error, message, snapshot, monkeypatch):
    from huggingface_hub import errors

    kind = getattr(errors, error)

    def answer(self, *args, **kwargs):
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer)
    with pytest.raises(FileNotFoundError, match=message):
        resolve_checkpoint("acme/rocket", "v2")


def test_a_known_model_is_downloaded(snapshot, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, *args, **kwargs: object())
    assert resolve_checkpoint("acme/rocket", None) == snapshot
    assert (snapshot / "model.safetensors").is_file()
