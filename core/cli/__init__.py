"""The `modelport` command: which subcommands there are, and how their errors reach the user.

Decisions: a subcommand's module is imported only when it is the one that runs, so `--help` and `--version` cost no
more than Python itself; an error is one line and exit status 2, MODELPORT_TRACEBACK=1 shows where it came from.
"""

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from modelport import __version__

COMMANDS = {
    "generate": "continue a prompt",
    "chat": "talk with a model",
    "models": "list architectures, who provides them, and what was measured",
    "plugins": "list the plugins that are installed, and what is broken",
    "check": "prove that architectures compute what they should",
    "new-plugin": "write a package for a model of yours",
    "bench": "measure speed, latency and start-up",
    "doctor": "check this installation",
}
TRACEBACK_VARIABLE = "MODELPORT_TRACEBACK"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, `sys.argv` by default, and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser(argv).parse_args(argv)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a terminal that lacks a character shows a mark instead of failing
                stream.reconfigure(errors="replace")
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status = _serve_node(args) if getattr(args, "node_rank", 0) else _module(args.command).run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130  # what a shell reports for a program that SIGINT ended
    except BrokenPipeError:  # the reader left, as in `modelport generate ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return 1
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE, "") not in ("", "0"):
            traceback.print_exc()
        sys.stdout.flush()
        print(f"modelport: error: {describe(error)}", file=sys.stderr)
        return 2


def _serve_node(args: argparse.Namespace) -> int:
    """A machine other than the first runs workers, whatever the command."""
    from modelport.cli.flags import DEFAULT_MODEL, engine_settings
    from modelport.parallel.nodes import serve_node
    from modelport.settings import engine_config

    settings = engine_settings(args)
    return serve_node(engine_config(settings.pop("model", DEFAULT_MODEL), settings))


def describe(error: Exception) -> str:
    """An error as a user reads it: our own messages as they are, surprises with their type and how to see more."""
    if hasattr(error, "errors") and hasattr(error, "error_count"):  # pydantic, which is not imported for this
        return "; ".join(_describe_field(detail) for detail in error.errors())
    if isinstance(error, (ValueError, OSError)) and str(error):
        return str(error)
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{text} (this should not happen; {TRACEBACK_VARIABLE}=1 shows where it did)"


def _describe_field(detail: dict) -> str:
    name = ".".join(str(part) for part in detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    return f"{name}={detail['input']!r}: {message}" if name else message


def _module(command: str) -> ModuleType:
    return import_module(f"modelport.cli.{command.replace('-', '_')}")


def _show_warning(message: Warning | str, category: type[Warning], *_where: object) -> None:
    print(f"modelport: warning: {message}", file=sys.stderr)


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="modelport", description="Run transformer models; every model is a plugin.")
    parser.add_argument("--version", action="version", version=f"modelport {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        if name == chosen:
            _module(name).add_arguments(subparser)
    return parser
