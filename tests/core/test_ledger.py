"""The ledger: rows, results that count, results that no longer do, and what left for a package of its own."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from modelport import ledger
from modelport.discovery import PluginRecord, installed_plugins
from modelport.plugin import PluginError, load_plugins

ROOT = Path(__file__).parents[2]


def result(level: str | None = "L1", **checks: str) -> ledger.Result:
    outcomes = {"runs": "passed", "logits": "passed", **checks}
    return ledger.Result(level, ("golden x",), outcomes, ("generate",), ("Ann",), "0.1.0", "2026-01-02")


@pytest.fixture
def vendor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PluginRecord:
    """A package in whose module nothing but text is true; reading its ledger must not run it."""
    package = tmp_path / "vendor_x"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "model.py").write_text("raise SystemExit('imported')  # has register_architectures\n")
    monkeypatch.syspath_prepend(tmp_path)
    provides = ("XForCausalLM", "YForCausalLM")
    return PluginRecord("x", "vendor_x.model", "vendor-x", "1.0", status="installed", provides=provides)


def test_rows_are_the_projects_own_and_then_what_else_is_provided() -> None:
    provided = {"ZForCausalLM": ledger.Entry("z"), "GPT2LMHeadModel": ledger.Entry("gpt2")}
    rows = ledger.rows(provided)
    with (ROOT / "plugins" / "ledger" / "supported-models.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(row.category, row.architecture) for row in rows[:-1]] == [
        (x["category"], x["architecture"]) for x in lines
    ]
    assert len(lines) >= 72
    assert (rows[-1].architecture, rows[-1].plugin, rows[-1].category) == ("ZForCausalLM", "z", "text generation")
    assert {row.plugin for row in rows[:-1]} == {None, "gpt2"}
    assert all(row.level == row.lora == ledger.UNVERIFIED and row.checked is None for row in rows)


def test_json_has_exactly_the_promised_keys() -> None:
    assert list(ledger.rows({})[0].as_json()) == [
        "category", "architecture", "models", "modalities", "tasks", "level", "lora", "pipeline_parallel",
        "tensor_parallel", "plugin", "checked",
    ]  # fmt: skip


def test_what_the_kit_measured_is_what_a_row_says() -> None:
    measured = result(lora="passed", pipeline_parallel="failed")
    (row,) = (r for r in ledger.rows({"GPT2LMHeadModel": ledger.Entry("gpt2", result=measured)}) if r.plugin)
    assert (row.level, row.checked) == ("L1", "2026-01-02 (0.1.0)")
    assert (row.lora, row.pipeline_parallel, row.tensor_parallel) == ("yes", "no", "unverified")
    assert row.known_failures == ("pipeline_parallel: failed",)
    broken = result(None, runs="failed", lora="failed")
    (row,) = (r for r in ledger.rows({"GPT2LMHeadModel": ledger.Entry("gpt2", result=broken)}) if r.plugin)
    assert row.lora == "unverified"


def test_a_failed_check_leaves_a_row_unverified() -> None:
    (row,) = (r for r in ledger.rows({"GPT2LMHeadModel": ledger.Entry("gpt2", result=result(None))}) if r.plugin)
    assert (row.level, row.checked) == ("unverified", None)


def test_rows_of_one_architecture_are_verified_one_by_one() -> None:
    """Text alone proves nothing about images; each needs the check of its own kind."""
    text = ledger.Entry("glm", result=result())
    levels = [r.level for r in ledger.rows({"ChatGLMModel": text}) if r.plugin]
    assert levels == ["L1", "unverified"]
    unsure = ledger.Entry("glm", result=result(media="passed"))
    assert [r.level for r in ledger.rows({"ChatGLMModel": unsure}) if r.plugin] == ["L1", "unverified"]
    seen = {"media": "passed", "refused_items": "passed"}
    both = ledger.Entry("glm", result=result(**seen))
    assert [r.level for r in ledger.rows({"ChatGLMModel": both}) if r.plugin] == ["L1", "L1"]
    every = {**seen, "several_items": "passed", "embedded_items": "passed"}
    for missing in every:
        part = ledger.Entry("phi3v", result=result(**{name: "passed" for name in every if name != missing}))
        (row, _) = (r for r in ledger.rows({"Phi3VForCausalLM": part}) if r.plugin)
        assert (row.modalities, row.level) == ("T + I^E+", "unverified")
    embedding = ledger.Entry("phi3v", result=result(**every))
    assert [r.level for r in ledger.rows({"Phi3VForCausalLM": embedding}) if r.plugin] == ["L1", "unverified"]


def test_a_row_that_nobody_listed_says_what_its_processor_takes() -> None:
    seen = {"media": "passed", "refused_items": "passed", "embedded_items": "passed"}
    made = replace(result(**seen), modalities="T + I^E")
    (row,) = (r for r in ledger.rows({"SeeingForCausalLM": ledger.Entry("x", result=made)}) if r.plugin)
    assert (row.category, row.modalities, row.level) == ("multimodal generation", "T + I^E", "L1")
    made = replace(made, modalities="T + I^E+")  # of several items nothing was measured
    (row,) = (r for r in ledger.rows({"SeeingForCausalLM": ledger.Entry("x", result=made)}) if r.plugin)
    assert row.level == "unverified"


def test_results_count_for_the_source_they_were_taken_from(vendor: PluginRecord, tmp_path: Path) -> None:
    assert ledger.entries([vendor]) is None  # only loading could tell
    path = ledger.write(vendor, {"XForCausalLM": result()})
    assert path == tmp_path / "vendor_x" / "ledger" / "model.json"
    found = ledger.entries([vendor])
    assert found == {
        "XForCausalLM": ledger.Entry("x", ("generate",), ("Ann",), result()),
        "YForCausalLM": ledger.Entry("x"),
    }
    ledger.write(vendor, {"YForCausalLM": result("L3")})  # keeps the other's
    assert {name: entry.result.level for name, entry in ledger.entries([vendor]).items()} == {
        "XForCausalLM": "L1",
        "YForCausalLM": "L3",
    }
    (tmp_path / "vendor_x" / "model.py").write_text("# another source with register_architectures\n")
    assert ledger.read(vendor) is None
    assert ledger.entries([vendor]) is None
    ledger.write(vendor, {"YForCausalLM": result("L2")})  # the other's was taken from the old source
    assert json.loads(path.read_text())["architectures"]["XForCausalLM"] is None
    assert "vendor_x" not in sys.modules


def test_results_are_found_however_the_plugin_is_found(vendor: PluginRecord) -> None:
    """Recorded from a checkout under its dotted name, read under its entry point's name, and the other way round."""
    ledger.write(replace(vendor, name="vendor_x.model"), {"XForCausalLM": result()})
    assert ledger.read(vendor)["XForCausalLM"] == result()


def test_a_plugin_that_is_a_package_has_its_results_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "vendor_w"
    package.mkdir()
    (package / "__init__.py").write_text("# has register_architectures")
    (package / "layers.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    record = PluginRecord("w", "vendor_w", provides=("WForCausalLM",))
    assert ledger.write(record, {"WForCausalLM": result()}) == package / "ledger" / "vendor_w.json"
    assert ledger.read(record)["WForCausalLM"] == result()
    (package / "layers.py").write_text("# other")  # any of its modules may hold the mathematics
    assert ledger.read(record) is None


def test_a_plugin_that_registers_nothing_needs_no_results(vendor: PluginRecord, tmp_path: Path) -> None:
    (tmp_path / "vendor_x" / "model.py").write_text("modelport_api = 1\n")
    assert ledger.entries([vendor]) == {}


def test_two_providers_of_one_name_are_settled_by_loading(vendor: PluginRecord, tmp_path: Path) -> None:
    ledger.write(vendor, {"XForCausalLM": result()})
    second = PluginRecord("x2", "vendor_x.model", "vendor-x", "1.0")
    assert ledger.entries([vendor]) is not None
    assert ledger.entries([vendor, second]) is None


def test_a_single_module_has_no_place_for_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "alone_x.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="make it a package"):
        ledger.write(PluginRecord("alone", "alone_x", provides=("XForCausalLM",)), {})


def test_an_architecture_that_left_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ledger.moved() == {}, "a family left: say so in docs/model-support-policy.md, and drop this line"
    monkeypatch.setattr(ledger, "moved", lambda: {"OldForCausalLM": "old-modelport"})
    with pytest.raises(
        PluginError, match="OldForCausalLM has moved to a package of its own: pip install old-modelport"
    ):
        load_plugins().find(["OldForCausalLM"])
    with pytest.raises(PluginError) as caught:
        load_plugins().find(["OtherForCausalLM"])
    assert "moved" not in str(caught.value)


# --- the project's own -----------------------------------------------------------------------------------------------


def test_every_built_in_architecture_has_a_result_that_counts() -> None:
    """Fails after a change of a family file, until it is checked again."""
    provides = {record.name: record for record in load_plugins().records if record.builtin and record.provides}
    for name, record in provides.items():
        results = ledger.read(record)
        assert results is not None, f"no results of {name} count for its source as it is: run `make ledger`"
        assert set(results) == set(record.provides), f"{name} provides other names by now: run `make ledger`"
        missing = [architecture for architecture, found in results.items() if found is None]
        assert not missing, f"{', '.join(missing)} was never checked: run `make ledger`"


def test_no_result_is_left_of_a_plugin_that_is_gone() -> None:
    modules = {record.module.removeprefix("modelport.plugins.") for record in installed_plugins() if record.builtin}
    assert {path.stem for path in (ROOT / "plugins" / "ledger").glob("*.json")} <= modules
