"""`modelport plugins`: what is installed, what it provides, and what is broken, with the reason.

Decision: plugins are loaded, because only that shows all that can be broken; `--no-load` reads metadata and source
alone, which is instant and runs nobody's code.
"""

import argparse
import json
from dataclasses import asdict

from modelport.cli.flags import add_plugin_flags, load_chosen, plugin_choice
from modelport.cli.table import table
from modelport.discovery import installed_plugins


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--load",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="import every plugin; --no-load shows what can be told without running any",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_plugin_flags(parser)


def run(args: argparse.Namespace) -> int:
    if args.load:
        plugins = load_chosen(args)
        records, architectures = plugins.records, plugins.architectures
    else:
        records, architectures = installed_plugins(*plugin_choice(args)), {}
    maintainers = {
        record.name: list(
            dict.fromkeys(m for n in record.provides if n in architectures for m in architectures[n].maintainers)
        )
        for record in records
    }
    if args.json:
        print(json.dumps([{**asdict(record), "maintainers": maintainers[record.name]} for record in records], indent=2))
        return 0
    rows = []
    for record in records:
        others = (hook for hook in record.hooks if hook != "register_architectures")
        what = record.reason or ", ".join((*record.provides, *others)) or record.module
        if names := ", ".join(maintainers[record.name]):
            what += f" (maintained by {names})"
        package = f"{record.distribution} {record.version}" if record.distribution else "-"
        rows.append((record.name, record.status, "-" if record.api is None else str(record.api), package, what))
    print(table(("PLUGIN", "STATUS", "API", "PACKAGE", "PROVIDES" if args.load else "MODULE"), rows))
    return 0
