"""`modelport plugins`: what is installed, from metadata and source alone; `--load` imports it and shows the truth."""

import argparse
import json
from dataclasses import asdict

from modelport.cli.flags import add_plugin_flags, load_chosen, plugin_choice
from modelport.cli.table import table
from modelport.discovery import installed_plugins


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--load", action="store_true", help="import every plugin and show what it provides")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_plugin_flags(parser)


def run(args: argparse.Namespace) -> int:
    if args.load:
        records = load_chosen(args).records
    else:
        records = installed_plugins(*plugin_choice(args))
    if args.json:
        print(json.dumps([asdict(record) for record in records], indent=2))
        return 0
    rows = [
        (
            record.name,
            record.status,
            "-" if record.api is None else str(record.api),
            f"{record.distribution} {record.version}" if record.distribution else "-",
            record.reason or ", ".join(record.provides) or record.module,
        )
        for record in records
    ]
    print(table(("PLUGIN", "STATUS", "API", "PACKAGE", "PROVIDES" if args.load else "MODULE"), rows))
    return 0
