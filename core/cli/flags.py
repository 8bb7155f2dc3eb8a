"""Flags that several subcommands share: the engine's, made from the fields of `EngineConfig`; sampling; plugins.

Decision: a flag that is not given is not passed on, so each default lives in one place, the configuration class.
"""

import argparse
import json
import os
import sys
import types
import warnings
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from modelport.discovery import parse_options

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from modelport.plugin import Plugins
    from modelport.sampling_params import SamplingParams

DEFAULT_MODEL = "smollm2"
_NO_FLAG = {
    "model",
    "plugins",
    "blocked_plugins",
    "skip_tokenizer_init",
    "data_parallel_rank",
    "lora_modules",
}  # own flags, or no use without text
_ALSO = {  # as vLLM has them
    "tensor_parallel_size": ("-tp",),
    "pipeline_parallel_size": ("-pp",),
    "data_parallel_size": ("-dp",),
    "enable_expert_parallel": ("-ep",),
    "executor": ("--distributed-executor-backend",),
    "nnodes": ("-n",),
    "node_rank": ("-r",),
}
_SAMPLING: dict[str, tuple[type, str]] = {
    "max_tokens": (int, "most tokens to write"),
    "temperature": (float, "0 takes the likeliest token, more is more varied"),
    "top_p": (float, "sample among the likeliest tokens that hold this much probability"),
    "top_k": (int, "sample among this many of the likeliest tokens"),
    "min_p": (float, "sample among tokens at least this likely, relative to the likeliest"),
    "repetition_penalty": (float, "above 1 makes tokens that were already seen less likely"),
}


def add_plugin_flags(parser: argparse.ArgumentParser) -> None:
    """Add `-p`, which loads or blocks plugins."""
    parser.add_argument(
        "-p",
        dest="plugin_options",
        action="append",
        default=[],
        metavar="PLUGIN",
        help="dotted.name loads a plugin module, no:NAME blocks a plugin; may be repeated",
    )


def plugin_choice(args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What `-p` asked for: modules to load, and names to block.

    A module may lie in the current folder, as in a checkout that is not installed; installed ones go before it.
    """
    load, block = parse_options(args.plugin_options)
    if load and (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    return load, block


def load_chosen(args: argparse.Namespace) -> "Plugins":
    """Load the plugins that `-p` leaves; a broken one is told by its record, not by a warning."""
    from modelport.plugin import PluginWarning, load_plugins

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)
        return load_plugins(*plugin_choice(args))


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each field of `EngineConfig`."""
    from modelport.config import EngineConfig

    group = parser.add_argument_group("engine")
    fields = EngineConfig.model_fields
    group.add_argument(
        "-m", "--model", default=DEFAULT_MODEL, help=f"{fields['model'].description} (default: {DEFAULT_MODEL})"
    )
    for name, field in fields.items():
        if name not in _NO_FLAG:
            flags = (*_ALSO.get(name, ()), "--" + name.replace("_", "-"))
            kind = _kind(field.annotation)
            group.add_argument(*flags, dest=name, default=argparse.SUPPRESS, help=_help(field), **kind)
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="an adapter, a folder or a name that a source knows; may be repeated",
    )
    add_plugin_flags(group)


def add_adapter_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--lora-name`, which chooses among several `--lora`."""
    parser.add_argument("--lora-name", metavar="NAME", help="which --lora to use, when there are several")


def chosen_adapter(args: argparse.Namespace) -> str | None:
    """The name of the adapter to use, None for the model as it is.

    :raises ValueError: several were given and none was chosen.
    """
    names = list(_adapters(args))
    if args.lora_name is not None or len(names) < 2:
        return args.lora_name or next(iter(names), None)
    raise ValueError(f"there are several adapters, {', '.join(names)}; choose one with --lora-name")


def _adapters(args: argparse.Namespace) -> dict[str, str]:
    found: dict[str, str] = {}
    for given in args.lora:
        name, equals, path = given.partition("=")
        if not (name and equals and path):
            raise ValueError(f"--lora {given!r} should read NAME=PATH, as in --lora sql=path/of/adapter")
        if name in found:
            raise ValueError(f"--lora names {name!r} twice; give each adapter a name of its own")
        found[name] = path
    return found


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments for `LLM` that a command line names."""
    from modelport.config import EngineConfig

    settings = {name: value for name, value in vars(args).items() if name in EngineConfig.model_fields}
    if adapters := _adapters(args):
        settings["lora_modules"] = adapters
    load, block = plugin_choice(args)
    if load:
        settings["plugins"] = load
    if block:
        settings["blocked_plugins"] = block
    return settings


def add_sampling_flags(parser: argparse.ArgumentParser, **defaults: float) -> None:
    """Add the sampling flags; `defaults` are this subcommand's own, all others are those of `SamplingParams`."""
    group = parser.add_argument_group("sampling")
    for name, (kind, text) in _SAMPLING.items():
        shown = f" (default: {defaults[name]})" if name in defaults else ""
        group.add_argument(
            "--" + name.replace("_", "-"),
            dest=name,
            type=kind,
            default=defaults.get(name, argparse.SUPPRESS),
            metavar="N" if kind is int else "X",
            help=text + shown,
        )
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop before TEXT; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-text token")


def sampling_params(args: argparse.Namespace) -> "SamplingParams":
    """The `SamplingParams` that a command line names.

    :raises ValueError: a value is out of range.
    """
    from modelport.sampling_params import SamplingParams

    given = {name: value for name, value in vars(args).items() if name in _SAMPLING}
    return SamplingParams(stop=args.stop, ignore_eos=args.ignore_eos, **given)


def _help(field: "FieldInfo") -> str:
    text = field.description.replace("%", "%%")
    shown = field.default not in (None, "auto", (), {}) and not isinstance(field.default, bool)
    return f"{text} (default: {field.default})" if shown else text


def _kind(annotation: Any) -> dict[str, Any]:
    """How argparse reads a field: `int | None` as an int, `Literal` as choices, `bool` as `--x` and `--no-x`."""
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (part for part in get_args(annotation) if part is not type(None))
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    if get_origin(annotation) is tuple:
        return {"nargs": "+", **_kind(get_args(annotation)[0])}
    if get_origin(annotation) is dict:
        return {"type": _json_object, "metavar": "JSON"}
    assert annotation in (int, float, str), f"no flag for a field of type {annotation}"
    return {"type": annotation, "metavar": {int: "N", float: "X", str: "TEXT"}[annotation]}


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object such as '{{\"image\": 2}}'")
    return found
