"""From reports to the ledger: the worst outcome counts, what did not run does not, a part of a run is no result."""

from dataclasses import replace
from pathlib import Path

import pytest

from modelport import cli, ledger
from modelport.cli import check as cli_check
from modelport.plugin import Architecture, PluginError, Plugins, load_plugins
from modelport.testing.recording import record, summary
from modelport.testing.report import Check, Report

ARCHITECTURE = Architecture(
    "XForCausalLM", "m:C", dict, maintainers=("Ann",), expected_failures={"bfloat16": "sums in another order"}
)


def report(level: str | None = "L1", reference: str | None = "transformers:X", **outcomes: str) -> Report:
    checks = tuple(Check(name, status) for name, status in {"runs": "passed", **outcomes}.items())
    versions = {"modelport": "0.1.0"}
    return Report(
        "XForCausalLM", "XForCausalLM", "x", "x", "1", reference, checks, level, 1.0, "cpu", "2026-01-02", versions
    )


def test_outcomes_are_kept_and_what_did_not_run_is_not() -> None:
    found = summary(ARCHITECTURE, [report(logits="passed", lora="skipped")])
    assert found == ledger.Result(
        "L1",
        ("transformers:X",),
        {"runs": "passed", "logits": "passed"},
        ("generate",),
        ("Ann",),
        "0.1.0",
        "2026-01-02",
    )


def test_an_expected_failure_says_why() -> None:
    found = summary(ARCHITECTURE, [report("L3", bfloat16="expected_failure")])
    assert (found.level, found.checks["bfloat16"]) == ("L3", "expected to fail: sums in another order")


@pytest.mark.parametrize("order", [1, -1])
def test_of_several_reports_the_worst_counts(order: int) -> None:
    good, bad = report(logits="passed"), report("L3", "golden y", logits="failed")
    found = summary(ARCHITECTURE, [good, bad][::order])
    assert (found.level, found.checks["logits"]) == (None, "failed")
    assert set(found.references) == {"transformers:X", "golden y"}
    weaker = summary(ARCHITECTURE, [good, report("L3", "golden y", bfloat16="expected_failure")][::order])
    assert weaker.level == "L3"


def test_a_run_without_a_reference_does_not_weaken_one_with() -> None:
    assert summary(ARCHITECTURE, [report("L3", None), report("L1", "golden y")]).level == "L1"
    assert summary(ARCHITECTURE, [report("L3", None)]).level == "L3"
    assert summary(ARCHITECTURE, [report("L4", None)]).level is None


def test_only_complete_runs_of_a_plugins_architecture_are_kept(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="only some checks of XForCausalLM ran"):
        record([report(None)], load_plugins())
    with pytest.raises(PluginError, match="belongs to no loaded plugin"):
        record([report()], load_plugins())

    package = tmp_path / "vendor_z"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from modelport import Architecture, hookimpl\nmodelport_api = 1\n"
        "@hookimpl\ndef register_architectures():\n    return [Architecture('XForCausalLM', 'm:C', dict)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plugins: Plugins = load_plugins(["vendor_z"])
    assert record([report()], plugins) == package / "ledger" / "vendor_z.json"
    (owner,) = (r for r in plugins.records if r.name == "vendor_z")
    assert ledger.read(owner)["XForCausalLM"] == replace(summary(ARCHITECTURE, [report()]), maintainers=())


def test_check_records_each_architecture_once_with_all_its_reports(monkeypatch, capsys) -> None:
    kept = []
    monkeypatch.setattr("modelport.testing.recording.record", lambda reports, _: kept.append(reports) or Path("here"))
    other = replace(report(), architecture="YForCausalLM")
    cli_check._record([report(), other, report("L3", "golden y")], load_plugins())
    assert [[r.architecture for r in reports] for reports in kept] == [["XForCausalLM"] * 2, ["YForCausalLM"]]
    assert capsys.readouterr().err.splitlines()[0] == "recorded XForCausalLM in here"


def test_check_does_not_record_a_part_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "GPT2LMHeadModel", "--record", "--only", "logits"]) == 2
    assert "--only leaves checks out" in capsys.readouterr().err
