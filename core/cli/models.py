"""`modelport models`: every architecture that the installed plugins can build."""

import argparse
import json
import sys

from modelport.cli.flags import add_plugin_flags, load_chosen
from modelport.cli.table import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_plugin_flags(parser)


def run(args: argparse.Namespace) -> int:
    plugins = load_chosen(args)
    provider = {name: record for record in plugins.records for name in record.provides}
    rows = [
        {
            "architecture": name,
            "plugin": provider[name].name,
            "tasks": list(plugins.architectures[name].tasks),
            "package": provider[name].distribution,
            "version": provider[name].version,
        }
        for name in sorted(plugins.architectures)
    ]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    cells = []
    for row in rows:
        package = f"{row['package']} {row['version']}" if row["package"] else "-"
        cells.append((row["architecture"], row["plugin"], ", ".join(row["tasks"]), package))
    print(table(("ARCHITECTURE", "PLUGIN", "TASKS", "PACKAGE"), cells))
    broken = [record.name for record in plugins.records if record.status == "broken"]
    if broken:
        names = ", ".join(broken)
        print(f"not shown: what broken plugins provide ({names}); see `modelport plugins --load`", file=sys.stderr)
    return 0
