"""From reports of the kit to the ledger: what is kept of a run, and where.

Decision: outcomes are kept, times and differences are not, since they would change with every run and every machine.
"""

from collections.abc import Sequence
from pathlib import Path

from modelport import ledger
from modelport.plugin import Architecture, PluginError, Plugins
from modelport.testing.report import Report

_WORST_FIRST = ("failed", "unexpected_pass", "expected_failure", "passed")


def record(reports: Sequence[Report], plugins: Plugins) -> Path:
    """Keep what complete runs of one architecture found, in its plugin's package.

    :param reports: against the architecture's own reference, against golden folders, or both.
    :return: the file that was written.
    :raises ValueError: a report is of some checks only, or the plugin's module has no folder for results.
    :raises PluginError: the architecture belongs to no installed plugin.
    """
    name = reports[0].architecture
    assert all(report.architecture == name for report in reports)
    if any(report.level is None for report in reports):
        raise ValueError(f"only some checks of {name} ran, which gives no result to keep; run all of them")
    owner = next((r for r in plugins.records if name in r.provides and name in plugins.architectures), None)
    if owner is None:
        raise PluginError(f"{name} belongs to no loaded plugin, so there is no package to keep its result in")
    return ledger.write(owner, {name: summary(plugins.architectures[name], reports)})


def summary(architecture: Architecture, reports: Sequence[Report]) -> ledger.Result:
    """One result of several reports: the level that all of them prove, and of each check the worst outcome."""
    outcomes: dict[str, str] = {}
    for report in reports:
        for check in report.checks:
            if check.status != "skipped":
                outcomes[check.name] = min(check.status, outcomes.get(check.name, "passed"), key=_WORST_FIRST.index)
    compared = [report for report in reports if report.reference] or list(reports)
    level = max(report.level or ledger.UNVERIFIED for report in compared)  # L1 is the best
    return ledger.Result(
        level=level if level in ledger.LEVELS and all(report.passed for report in reports) else None,
        references=tuple(report.reference for report in compared if report.reference),
        checks={
            name: f"{ledger.EXPECTED}{architecture.expected_failures[name]}" if status == "expected_failure" else status
            for name, status in outcomes.items()
        },
        tasks=architecture.tasks,
        maintainers=architecture.maintainers,
        version=reports[0].versions["modelport"],
        date=max(report.date for report in reports),
        modalities=modalities(architecture),
    )


def modalities(architecture: Architecture) -> str:
    """What a row of the ledger says of it: `T + I^E+`."""
    inputs, found = architecture.inputs, "T"
    for modality, most in inputs.modalities.items() if inputs is not None else ():
        embeds = "^E" if modality in inputs.embeddable else ""
        found += f" + {modality[0].upper()}{embeds}{'+' if most is None or most > 1 else ''}"
    return found
