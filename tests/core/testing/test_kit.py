"""The kit finds what it is for: each fault fails the check that is meant for it, and a sound architecture passes."""

import importlib.util
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from modelport.plugin import Architecture, PluginError
from modelport.testing import Report, check
from modelport.testing.configuration import _import_in_a_new_process
from modelport.testing.registry import all_checks

GOLDENS = Path(__file__).parents[2] / "goldens"

spec = importlib.util.spec_from_file_location("faulty", Path(__file__).with_name("faulty.py"))
faulty = importlib.util.module_from_spec(spec)
sys.modules["faulty"] = faulty
spec.loader.exec_module(faulty)


def llama(**changes: object) -> Architecture:
    return faulty.altered(**changes)


def with_block(block: type) -> Architecture:
    return llama(model=faulty.llama_of(block))


BIASED = {**faulty.TINY, "attention_bias": True}
FAULTS = {
    # name: (architecture, checks that fail, checks that pass)
    "a norm is never applied": (lambda: with_block(faulty.Skipping), "logits greedy", "weights missing_weights"),
    "positions are off by one": (
        lambda: faulty.altered("GPT2LMHeadModel", model=faulty.OffByOne, variants={}),
        "logits greedy",
        "weights chunked",
    ),
    "later chunks are written to a wrong place": (
        lambda: with_block(faulty.MisplacedBlock),
        "chunked",
        "logits greedy batched",
    ),
    "the batch leaks": (lambda: with_block(faulty.Crosstalk), "batched seeds", "logits greedy"),
    "a window is one too wide": (
        lambda: faulty.altered("MistralForCausalLM", config=faulty.WideWindow),
        "logits",
        "chunked",
    ),
    "a weight is never loaded": (
        lambda: llama(config=faulty.Unbiased, weights=faulty.without_biases, tiny=BIASED),
        "missing_weights logits",
        "weights",
    ),
    "everything unknown is ignored": (lambda: llama(ignore=("*",)), "extra_weight", "missing_weights logits"),
    "a default is wrong": (lambda: llama(config=faulty.OtherDefault), "config_defaults", "logits"),
    "an old spelling is not read": (lambda: llama(config=faulty.OwnRope), "config_spellings", "config_extra_keys"),
    "unknown keys are refused": (lambda: llama(config=faulty.Strict), "config_extra_keys", ""),
    "a tied head is transposed": (lambda: llama(model=faulty.TransposedTie, tiny=faulty.SQUARE), "logits", "weights"),
    "bfloat16 is rounded further": (lambda: with_block(faulty.Coarse), "bfloat16", "logits"),
    "the reference is insensitive": (lambda: llama(reference=faulty.Constant), "runs", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_that_is_meant_for_a_fault_fails(fault: str) -> None:
    make, fails, passes = FAULTS[fault]
    report = check(make(), only=[*fails.split(), *passes.split()])
    found = {outcome.name: outcome.status for outcome in report.checks}
    assert found == dict.fromkeys(fails.split(), "failed") | dict.fromkeys(passes.split(), "passed"), report
    assert not report.passed
    assert all(outcome.detail for outcome in report.checks if outcome.status == "failed")


@pytest.fixture(scope="module")
def sound() -> Report:
    """A Llama with a variant, a reference function and an expected failure that is none."""
    return check(
        llama(
            reference=faulty.Plain,
            variants={"tied": {"tie_word_embeddings": True}, "biased": {"attention_bias": True}},
            expected_failures={"tied:chunked": "it was broken once"},
        )
    )


def test_a_sound_architecture_passes_every_check_but_a_wrong_expectation(sound: Report) -> None:
    status = {outcome.name: outcome.status for outcome in sound.checks}
    assert status.pop("tied:chunked") == "unexpected_pass"
    assert {name for name, found in status.items() if found != "passed"} == {
        "tied_weights",  # only the variant is tied
        "sliding_window",
        "config_defaults",  # the reference is a Plain
        "media",
        "pooling",
        "several_items",  # the model takes text only
        "embedded_items",
        "kept_items",
        "refused_items",
    }
    assert {"tied:logits", "biased:greedy", "biased:preempted"} < set(status)
    assert not sound.passed
    assert sound["pooling"].detail.startswith("not built yet")
    assert "1 not built yet" in sound.summary()
    assert sound.reference == "faulty:Plain"
    assert 0 < sound["logits"].worst < sound["logits"].limit == 1e-4


def test_the_level_needs_every_check_to_pass(sound: Report) -> None:
    from modelport.testing.report import level_of

    assert sound.level == "L3"
    checks = tuple(replace(c, status="passed") if c.status == "unexpected_pass" else c for c in sound.checks)
    assert level_of(checks, has_reference=True) == "L1"
    assert level_of(checks, has_reference=False) == "L3"

    def worse(name: str, status: str) -> str:
        return level_of(tuple(replace(c, status=status) if c.name == name else c for c in checks), True)

    assert worse("tied:logits", "failed") == worse("batched", "expected_failure") == "L3"
    assert worse("greedy", "skipped") == "L3"  # parity that did not run proves nothing
    assert worse("runs", "failed") == "L4"


def test_a_report_survives_json(sound: Report) -> None:
    assert Report.from_json(sound.to_json()) == sound
    assert json.loads(sound.to_json())["versions"]["torch"]
    with pytest.raises(ValueError, match="no report"):
        Report.from_json("[]")
    with pytest.raises(ValueError, match="no report"):
        Report.from_json('{"checks": []}')


def test_an_expected_failure_is_told_and_lowers_the_level() -> None:
    record = llama(config=faulty.OtherDefault, expected_failures={"config_defaults": "the default is under dispute"})
    (outcome,) = check(record, only="config_defaults").checks
    assert outcome.status == "expected_failure"
    assert outcome.detail.startswith("the default is under dispute (")


def test_without_a_reference_it_runs_and_that_is_all() -> None:
    report = check(llama(reference=None))
    assert report.passed
    assert (report.level, report.reference) == ("L3", None)
    assert report["logits"].status == report["missing_weights"].status == "skipped"
    assert report["chunked"].status == "passed"


def test_an_instance_that_cannot_be_made_is_told_once() -> None:
    report = check(llama(reference="transformers:NoSuchModel"))
    assert report.level == "L4"
    assert "NoSuchModel" in report["runs"].detail
    assert {outcome.status for outcome in report.checks[1:]} == {"skipped"}


def test_a_golden_folder_is_its_own_reference(tmp_path: Path) -> None:
    report = check(golden=GOLDENS / "xverse-7b", only=["logits", "greedy", "bfloat16", "missing_weights"])
    assert [outcome.status for outcome in report.checks] == ["passed"] * 4
    assert (report.name, report.reference) == ("XverseForCausalLM@xverse-7b", "golden:xverse-7b")
    assert report.level is None  # only a part ran

    for file in (GOLDENS / "xverse-7b").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    recorded = json.loads((tmp_path / "golden.json").read_text())
    recorded["cases"][1]["greedy_ids"][30] ^= 1
    (tmp_path / "golden.json").write_text(json.dumps(recorded))
    (outcome,) = check(golden=tmp_path, only="greedy").checks
    assert outcome.status == "failed"
    assert "token 30 is" in outcome.detail


def test_a_golden_folder_serves_another_name() -> None:
    """What is recorded of Xverse is what a Llama of the same weights gives; the name asked for is what runs."""
    recorded = {"golden": GOLDENS / "xverse-7b", "only": "logits"}
    assert check("LlamaForCausalLM", **recorded)["logits"].status == "passed"
    assert check(with_block(faulty.Skipping), **recorded)["logits"].status == "failed"


def test_wrong_names_are_refused_with_near_ones(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="LlamaForCausalLM"):
        check("LlamaForCausalLm")
    with pytest.raises(ValueError, match=re.escape("there is no check 'logit'; did you mean 'logits'")):
        check("LlamaForCausalLM", only="logit")
    with pytest.raises(ValueError, match="expected_failures names 'bfloat61'"):
        check(llama(expected_failures={"bfloat61": "?"}))
    with pytest.raises(ValueError, match="expected_failures names 'tied:logits'"):
        check(llama(expected_failures={"tied:logits": "there is no such variant"}))
    with pytest.raises(ValueError, match=re.escape("golden.json")):
        check("LlamaForCausalLM", golden=tmp_path)
    with pytest.raises(ValueError, match="nothing to check"):
        check()


def test_a_plugin_that_imports_transformers_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_plugin.py").write_text("import transformers\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert _import_in_a_new_process("slow_plugin")[2] == "transformers"
    assert _import_in_a_new_process("no_such_plugin")[0] is None


def test_every_check_says_what_it_proves() -> None:
    for entry in all_checks().values():
        assert entry.summary.endswith("."), entry.name
