"""`modelport new-plugin`: what it writes installs, loads and passes; what it refuses, it refuses with a cure."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from modelport import cli
from modelport.cli.new_plugin import write_package
from modelport.plugin import load_plugins

ROOT = Path(__file__).parents[3]


def test_the_package_is_complete_and_under_the_new_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["new-plugin", str(tmp_path / "zeta-bar")]) == 0
    assert "pip install -e" in capsys.readouterr().out
    folder = tmp_path / "zeta-bar"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "pyproject.toml",
        "README.md",
        ".gitignore",
        ".github/workflows/test.yml",
        "zeta_bar/__init__.py",
        "zeta_bar/model.py",
        "tests/test_conformance.py",
    }
    for file in files:
        assert not re.search("acme|\\bfoo", (folder / file).read_text(), re.IGNORECASE), file
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["entry-points"]["modelport.plugins"] == {"zeta-bar": "zeta_bar.model"}
    assert "ZetaBarForCausalLM" in (folder / "tests" / "test_conformance.py").read_text()


@pytest.mark.parametrize("origin", [None, "llama", "InternLMForCausalLM", "gpt2", "gemma2", "olmo"])
def test_the_model_registers_its_architecture_and_nothing_else(origin, tmp_path: Path, monkeypatch) -> None:
    name = f"zeta-{(origin or 'plain').lower()}"
    folder = write_package(tmp_path / name, "ZetaForCausalLM", origin)
    monkeypatch.syspath_prepend(folder)
    module = name.replace("-", "_") + ".model"
    plugins = load_plugins([module])
    assert plugins.records[-1].provides == ("ZetaForCausalLM",)
    architecture = plugins.find(["ZetaForCausalLM"])
    assert architecture.model_class().__name__ == "Zeta"
    assert architecture.config.__name__ == "ZetaConfig"
    assert architecture.config.model_validate(architecture.tiny).hidden_size == 64
    if origin:
        old = next(r for r in plugins.records if origin in (r.name, *r.provides))
        other = plugins.architectures[origin if origin in old.provides else old.provides[0]]
        for field in ("rename", "ignore", "tiny", "reference", "variants", "expected_failures"):
            assert getattr(architecture, field) == getattr(other, field)
    lint = [sys.executable, "-m", "ruff"]
    config = ["--isolated", "--line-length", "120"]
    subprocess.run([*lint, "check", *config, "--select", "E,F,W", str(folder)], check=True, capture_output=True)
    subprocess.run([*lint, "format", *config, "--check", str(folder)], check=True, capture_output=True)


def test_the_package_installs_and_passes_at_once(tmp_path: Path) -> None:
    folder = write_package(tmp_path / "zeta-bar")
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-build-isolation", "--no-deps"]
    site = tmp_path / "site"
    subprocess.run([*pip, "--no-index", "--quiet", "--target", str(site), str(folder)], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=folder / "tests", env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    listed = {row["name"]: row for row in json.loads(run("modelport", "plugins", "--json"))}
    assert listed["zeta-bar"]["status"] == "loaded"
    assert listed["zeta-bar"]["distribution"] == "zeta-bar"
    assert "passed" in run("pytest", "-q", "-p", "no:cacheprovider")


def test_the_conformance_test_of_a_wrong_model_fails(tmp_path: Path) -> None:
    """A template whose test passes whatever the model does would prove nothing."""
    folder = write_package(tmp_path / "zeta-bar")
    model = folder / "zeta_bar" / "model.py"
    text = model.read_text()
    wrong = text.replace("return x + self.mlp(", "return x - self.mlp(")
    assert wrong != text
    model.write_text(wrong)
    environment = {**os.environ, "PYTHONPATH": str(folder), "MODELPORT_PLUGINS": "zeta_bar.model"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder / "tests")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "logits" in done.stdout


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("Acme_Foo", "how about 'acme-foo'"),
        ("AcmeFoo", "how about 'acme-foo'"),
        ("acme--foo", "how about 'acme-foo'"),
        ("1foo", "how about 'foo'"),
        ("!", "such as 'acme-foo'"),
        ("json", "'acme-json'"),
        ("modelport", "'acme-modelport'"),
        ("llama", "'acme-llama'"),
    ],
)
def test_a_bad_name_is_refused_with_a_cure(name: str, cure: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new-plugin", name]) == 2
    error = capsys.readouterr().err
    assert repr(name) in error
    assert cure in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--architecture", "Foo Bar"], "--architecture 'Foo Bar' is no architecture's name"),
        (["--from", "lama"], "no plugin or architecture 'lama' to start from; did you mean llama"),
        (["--from", "gguf"], "no plugin or architecture 'gguf' to start from; there are"),
    ],
)
def test_what_cannot_be_written_is_not_begun(arguments, message, tmp_path: Path, capsys) -> None:
    assert cli.main(["new-plugin", str(tmp_path / "zeta-bar"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "zeta-bar").mkdir()
    assert cli.main(["new-plugin", str(tmp_path / "zeta-bar")]) == 2
    assert "exists already; choose another name" in capsys.readouterr().err
    assert not list((tmp_path / "zeta-bar").iterdir())
