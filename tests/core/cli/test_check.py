"""`modelport check`: what it runs, what it prints, and its exit status."""

import json
from pathlib import Path

import pytest

from modelport import cli
from modelport.cli.check import find_targets
from modelport.plugin import load_plugins
from modelport.testing import Report

GOLDENS = Path(__file__).parents[2] / "goldens"


def run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = cli.main(["check", *line.split()])
    return status, *capsys.readouterr()


def test_a_table_for_each_and_a_sum(capsys) -> None:
    status, out, _ = run("LlamaForCausalLM gpt2 --only logits --only pooling", capsys)
    assert status == 0
    first, titles, logits, pooling, summary, *_ = out.splitlines()
    assert first.startswith("LlamaForCausalLM: plugin llama (modelport ")
    assert titles.split() == ["CHECK", "RESULT", "SECONDS", "WORST", "LIMIT"]
    assert logits.split()[:2] == ["logits", "passed"]
    assert logits.split()[4] == "1.0e-04"
    assert "not built yet: pooling" in pooling
    assert summary.startswith("1 passed, 1 not built yet in")
    assert out.splitlines()[-1] == "2 of 2 passed"


def test_json_is_a_list_of_reports(capsys) -> None:
    status, out, _ = run(f"{GOLDENS / 'internlm-7b'} --only greedy --json", capsys)
    (entry,) = json.loads(out)
    assert status == 0
    assert Report.from_dict(entry)["greedy"].status == "passed"


def test_only_a_pass_is_a_success(capsys, tmp_path: Path) -> None:
    assert run("LlamaForCausalLM --only pooling", capsys)[0] == 1  # nothing passed: nothing is proved
    for file in (GOLDENS / "xverse-7b").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1.0}))
    status, out, _ = run(f"{tmp_path} --only logits", capsys)
    assert status == 1
    assert "failed" in out


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("LamaForCausalLM", "did you mean LlamaForCausalLM"),
        ("LlamaForCausalLM --only logit", "did you mean 'logits'"),
        (f"gpt2 --golden {GOLDENS}", "no golden folder in"),
        (f"{Path(__file__).parent}", "is no golden folder"),
        ("", "nothing to check"),
        ("llama -p no:llama", "no installed architecture"),
    ],
)
def test_unknown_names_exit_2_with_the_cure(line: str, told: str, capsys) -> None:
    status, _, err = run(line, capsys)
    assert status == 2
    assert told in err


def test_names_stand_for_architectures_plugins_and_folders() -> None:
    plugins = load_plugins()
    assert find_targets(["gemma2", "Gemma2ForCausalLM"], None, False, plugins) == [("Gemma2ForCausalLM", None)]
    assert find_targets(["XverseForCausalLM", "gpt2"], str(GOLDENS), False, plugins) == [
        ("XverseForCausalLM", GOLDENS / "xverse-7b")
    ]
    assert (None, GOLDENS / "internlm-7b") in find_targets([str(GOLDENS)], None, False, plugins)
    assert {name for name, _ in find_targets([], None, True, plugins)} == set(plugins.architectures)


def test_the_checks_are_listed(capsys) -> None:
    status, out, _ = run("--list", capsys)
    assert status == 0
    assert "prefix_cached" in out
    assert "32 greedy tokens of every prompt are the reference's." in out
