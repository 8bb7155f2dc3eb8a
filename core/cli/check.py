"""`modelport check`: run the conformance kit on architectures, plugins and golden folders.

Decision: the exit status is 0 only when everything asked for was found and passed: 1 when a check failed, 2 when a
name is not known.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from modelport.cli.flags import add_plugin_flags, load_chosen, plugin_choice
from modelport.cli.table import table

if TYPE_CHECKING:
    from modelport.plugin import Plugins
    from modelport.testing.report import Check, Report

GOLDEN_FILE = "golden.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="architecture, plugin, or golden folder")
    parser.add_argument("--all", action="store_true", help="every architecture that is installed")
    parser.add_argument(
        "--golden", metavar="FOLDER", help="compare with this golden folder, or with those in it that fit the names"
    )
    parser.add_argument(
        "--only", action="append", metavar="CHECK", help="run this check only; may be repeated (--list shows them)"
    )
    parser.add_argument("--list", action="store_true", help="show the checks and what they prove, and run none")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model runs (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print the reports as a JSON list")
    parser.add_argument("--record", action="store_true", help="keep the results in the plugins' packages (the ledger)")
    add_plugin_flags(parser)


def run(args: argparse.Namespace) -> int:
    if args.list:
        from modelport.testing.registry import all_checks

        print(table(("CHECK", "PROVES THAT"), [(entry.name, entry.summary) for entry in all_checks().values()]))
        return 0
    plugins = load_chosen(args)
    targets = find_targets(args.names, args.golden, args.all, plugins)
    load, block = plugin_choice(args)
    if block:
        raise ValueError(f"-p no:{block[0]}: what is blocked cannot be checked; leave its name out instead")

    if args.record and args.only:
        raise ValueError("--record keeps results of complete runs, and --only leaves checks out; give one of the two")

    from modelport.testing.session import Session

    reports = []
    for architecture, golden in targets:
        with Session(architecture, golden=golden, device=args.device, plugins=load) as session:
            session.checks(args.only)  # an unknown name is told before anything runs
            report = session.run(args.only, _progress if sys.stderr.isatty() else lambda _: None)
        reports.append(report)
        if sys.stderr.isatty():
            print(end="\r\033[K", file=sys.stderr)
        if not args.json:
            print(as_text(report), flush=True)
    if args.record:
        _record(reports, plugins)
    if args.json:
        print(json.dumps([report.to_dict() for report in reports], indent=1))
    elif len(reports) > 1:
        bad = [report.name for report in reports if not report.passed]
        print(f"{len(reports) - len(bad)} of {len(reports)} passed" + (f"; not: {', '.join(bad)}" if bad else ""))
    return 0 if all(report.passed for report in reports) else 1


def find_targets(
    names: list[str], golden: str | None, everything: bool, plugins: Plugins
) -> list[tuple[str | None, Path | None]]:
    """What to check, as (architecture, golden folder).

    :raises ValueError: nothing is asked for, or a name is no architecture, plugin or golden folder.
    """
    found: dict[tuple[str | None, Path | None], None] = {}
    known = [*plugins.architectures, *(record.name for record in plugins.records if record.provides)]
    architectures = list(plugins.architectures) if everything else []
    for name in names:
        provided = next((r.provides for r in plugins.records if r.name == name and r.provides), ())
        if name in plugins.architectures or name in plugins.conflicts:
            architectures.append(name)
        elif provided:
            architectures += [a for a in provided if a in plugins.architectures]
        elif Path(name).is_dir():
            found |= dict.fromkeys((None, folder) for folder in _golden_folders(Path(name)))
        else:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            broken = [f"; the plugin {r} is broken: {r.reason}" for r in plugins.records if r.status == "broken"]
            cure = f"did you mean {' or '.join(near)}?" if near else "`modelport models` lists the architectures"
            raise ValueError(
                f"{name!r} is no installed architecture, no plugin and no golden folder; {cure}" + "".join(broken)
            )
    if golden is None:
        found |= dict.fromkeys((name, None) for name in architectures)
    else:
        folders = _golden_folders(Path(golden))
        fitting = (
            [(a, f) for a in architectures for f in folders if a in _architectures(f, plugins)] if architectures else []
        )
        if architectures and not fitting:
            raise ValueError(
                f"no golden folder in {golden} is of {', '.join(architectures)}; its config.json says which"
            )
        found |= dict.fromkeys(fitting or [(None, folder) for folder in folders])
    if not found:
        raise ValueError("nothing to check: name architectures, plugins or golden folders, or give --all")
    return list(found)


def as_text(report: Report) -> str:
    """The report as a terminal shows it: a line on top, a table, a line with the sum."""
    package = f"{report.distribution} {report.version}" if report.distribution else "not installed"
    against = f"against {report.reference}" if report.reference else "without a reference"
    head = f"{report.name}: plugin {report.plugin} ({package}), {against}, on {report.device}"
    rows = [_row(check) for check in report.checks]
    return f"{head}\n{table(('CHECK', 'RESULT', 'SECONDS', 'WORST', 'LIMIT', ''), rows)}\n{report.summary()}\n"


def _record(reports: list[Report], plugins: Plugins) -> None:
    from modelport.testing.recording import record

    for name in dict.fromkeys(report.architecture for report in reports):
        path = record([report for report in reports if report.architecture == name], plugins)
        print(f"recorded {name} in {path}", file=sys.stderr)


def _row(check: Check) -> tuple[str, ...]:
    worst, limit = (format(x, ".1e") if x is not None else "-" for x in (check.worst, check.limit))
    return check.name, check.status.replace("_", " "), f"{check.seconds:.2f}", worst, limit, check.detail


def _progress(check: Check) -> None:
    print(end=f"\r\033[K{check.name}: {check.status}", file=sys.stderr, flush=True)


def _golden_folders(folder: Path) -> list[Path]:
    """The folder itself, or the golden folders in it.

    :raises ValueError: neither.
    """
    if (folder / GOLDEN_FILE).is_file():
        return [folder]
    inside = sorted(file.parent for file in folder.glob(f"*/{GOLDEN_FILE}"))
    if not inside:
        raise ValueError(f"{folder} is no golden folder and holds none: there is no {GOLDEN_FILE}")
    return inside


def _architectures(folder: Path, plugins: Plugins) -> list[str]:
    from modelport.loading.checkpoint import read_config, resolve

    return read_config(resolve(str(folder), None, plugins), plugins)["architectures"]
