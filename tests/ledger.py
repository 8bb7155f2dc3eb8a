"""`make ledger`: run the conformance kit where no result counts any more, keep the results, write the page.

Built-in architectures only, each against its own reference and the golden folders of its name, or of another name of
the same. `--all` checks those with a result too; names check these alone. Exit status 1 when something failed; the
results say what.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from modelport import ledger
from modelport.cli.models import markdown
from modelport.plugin import Architecture, Plugins, load_plugins
from modelport.testing import check
from modelport.testing.recording import record
from modelport.testing.reference import GoldenReference

ROOT = Path(__file__).parent.parent
GOLDENS = ROOT / "tests" / "goldens"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures")
    parser.add_argument("--all", action="store_true", help="check those that have a result too")
    args = parser.parse_args()
    plugins = load_plugins(blocked=[r.name for r in load_plugins().records if not r.builtin])
    goldens: dict[str, list[Path]] = {}
    for folder in sorted(file.parent for file in GOLDENS.glob("*/golden.json")):
        for name in GoldenReference(folder).architectures(plugins):
            goldens.setdefault(name, []).append(folder)
    failed: dict[str, list[str]] = {}  # by what went wrong, which many checks may share
    for owner in plugins.records:
        known = ledger.read(owner) or {}
        stale = [name for name in owner.provides if args.all or known.get(name) is None]
        for name in [name for name in owner.provides if name in args.names] if args.names else stale:
            architecture = plugins.architectures[name]
            folders = goldens.get(name) or shared(architecture, plugins, goldens)
            reports = [check(name)] if architecture.reference or not folders else []
            reports += [check(name, golden=folder) for folder in folders]
            for report in reports:
                print(f"{report.name}: {report.summary()}", flush=True)
                for found in report.checks:
                    if not found.ok:
                        failed.setdefault(f"{report.name}: {found.detail}", []).append(found.name)
            record(reports, plugins)
    records = [found for found in plugins.records if found.builtin]
    (ROOT / "docs" / "supported-models.md").write_text(markdown(ledger.rows(ledger.entries(records) or {})))
    for detail, names in failed.items():
        print(f"failed: {detail} ({', '.join(names)})", file=sys.stderr)
    return 1 if failed else 0


def shared(architecture: Architecture, plugins: Plugins, goldens: dict[str, list[Path]]) -> list[Path]:
    """The golden folders of an architecture that is the same under another name."""
    for name, folders in goldens.items():
        other = plugins.architectures.get(name)
        if other is not None and replace(other, name=architecture.name) == architecture:
            return folders
    return []


if __name__ == "__main__":
    sys.exit(main())
