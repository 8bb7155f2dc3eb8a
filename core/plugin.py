"""Plugins: load, order, isolate, settle conflicts; and the records that a plugin hands to the core.

Decisions: our own loading loop, so that one broken package stops nothing else; every plugin is loaded, blocked, or
broken with a reason, never silently absent; loading keeps nothing outside the returned `Plugins` but the imported
modules. Nothing here imports torch: a plugin's module does. Finding plugins without importing them is `discovery`.
"""

from __future__ import annotations

import difflib
import inspect
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from modelport import API_VERSION, hookspecs, ledger
from modelport.discovery import PluginError, PluginRecord, api_complaint, declared_api, discover
from modelport.discovery import installed_plugins as installed_plugins
from modelport.discovery import parse_options as parse_options

if TYPE_CHECKING:
    import torch
    from pydantic import BaseModel
    from torch import Tensor, nn

    from modelport.config import EngineConfig
    from modelport.inputs.processor import InputProcessor

hookimpl = pluggy.HookimplMarker("modelport")


@dataclass(frozen=True)
class Architecture:
    """One entry of `architectures` in a `config.json`, and how to build, load and check it.

    :ivar name: the name in `config.json`, for example `"AcmeForCausalLM"`.
    :ivar model: the model class, or `"module:Class"` when importing it is heavy. Called with the configuration.
    :ivar config: pydantic class that lists what the model reads from `config.json`.
    :ivar rename: checkpoint name prefixes to replace, `{"transformer.": "model."}`; the longest match wins.
    :ivar weights: called with the checkpoint's `(name, tensor)` stream, after `rename`, and the configuration; splits,
        stacks, transposes, and yields what the model takes.
    :ivar ignore: patterns (`fnmatch`) of checkpoint tensors that the model does not need, such as stored masks.
    :ivar inputs: the class that turns images, videos and sounds into what the model reads; None for a model of text.
    :ivar language: of a model around a language model: the key of the language model's own `config.json` entries
        (`"text_config"`), or a function that makes them from all entries. Whatever plugin provides that architecture
        builds it, and `model` is called with the configuration and the built language model, whose tensors it keeps
        under `language_model`.
    :ivar model_type: the `model_type` by which such entries name this architecture.
    :ivar defaults: what such entries may leave out; a `config.json` of its own may not.
    :ivar files: further files of a tiny instance, by name: `{"preprocessor_config.json": {...}}`.
    :ivar tasks: what the model does; `"generate"` is the only one so far.
    :ivar reference: what proves it right: `"transformers:AcmeForCausalLM"`, or a function (`"module:function"`, or the
        function itself) that takes a dictionary of `config.json` entries and returns an `nn.Module` whose `state_dict`
        has the checkpoint's names and whose call on (1, tokens) int64 ids gives the logits. docs/conformance.md.
    :ivar tiny: `config.json` entries of a small random instance, for checks.
    :ivar variants: further instances to check, by name: entries that override `tiny`, one for each flag that differs
        between published checkpoints (`{"tied": {"tie_word_embeddings": True}}`).
    :ivar expected_failures: check (`"bfloat16"`) or variant and check (`"tied:greedy"`) -> why it is known to fail;
        shown in every report, and a failure of its own once the check passes.
    :ivar maintainers: who answers for it: names, or handles with an `@`.
    :ivar replaces: name of the plugin whose architecture of the same name this one knowingly takes the place of.
    """

    name: str
    model: type[nn.Module] | str
    config: type[BaseModel]
    rename: Mapping[str, str] = field(default_factory=dict)
    weights: Callable[[Iterable[tuple[str, Tensor]], Any], Iterable[tuple[str, Tensor]]] | None = None
    ignore: tuple[str, ...] = ()
    inputs: type[InputProcessor] | None = None
    language: str | Callable[[dict[str, Any]], dict[str, Any]] | None = None
    model_type: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = ("generate",)
    reference: str | Callable[[dict[str, Any]], nn.Module] | None = None
    tiny: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    expected_failures: Mapping[str, str] = field(default_factory=dict)
    maintainers: tuple[str, ...] = ()
    replaces: str | None = None

    def model_class(self) -> type[nn.Module]:
        """The model class, imported now when `model` is a string.

        :raises PluginError: the string does not name a class that exists; an ImportError inside its module passes.
        """
        if not isinstance(self.model, str):
            return self.model
        module, _, name = self.model.partition(":")
        if not (module and name):
            raise PluginError(f"{self.name}: model={self.model!r} should read 'package.module:Class'")
        try:
            return getattr(import_module(module), name)
        except AttributeError:
            raise PluginError(f"{self.name}: the module {module!r} has no {name!r}; correct model=") from None


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, and what the user asked of them.

    :ivar path: a local folder (`config.json`, `*.safetensors`) or one file (`*.gguf`).
    :ivar name: what the user typed as `model`.
    """

    path: Path
    name: str
    load_format: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class ModelInfo:
    """What `transform_model` may look at: the architecture, its configuration, the engine's settings.

    :ivar dtype, device: of the model once it is loaded.
    :ivar rewrite: turns a stream of the checkpoint's `(name, tensor)` into what fills the model, renamed and rewritten
        as the architecture says; so a plugin that has tensors under a checkpoint's names finds their layers.
    """

    architecture: Architecture
    config: BaseModel
    engine: EngineConfig
    checkpoint: Checkpoint
    dtype: torch.dtype
    device: torch.device
    rewrite: Callable[[Iterable[tuple[str, Tensor]]], Iterator[tuple[str, Tensor]]]


class PluginWarning(UserWarning):
    """An installed plugin is broken and was left out."""


@dataclass(frozen=True)
class Manifest:
    """What another process must load to see the same plugins.

    :ivar plugins: (name, module, version) of each loaded plugin, in loading order.
    :ivar blocked: names of the plugins that were left out on purpose.
    :ivar api: the plugin API they were loaded under.
    """

    plugins: tuple[tuple[str, str, str | None], ...]
    blocked: tuple[str, ...]
    api: int


@dataclass(frozen=True)
class Plugins:
    """The loaded plugins.

    :ivar hook: call `hook.NAME(argument=...)`; while an engine is being built, never inside a step.
    :ivar architectures: what can be built, by name; names that two plugins claim are not in it.
    :ivar records: one for every plugin found, in loading order.
    :ivar conflicts: the names that two plugins claim, each with the error that `find` raises for it.
    """

    hook: pluggy.HookRelay
    architectures: Mapping[str, Architecture]
    records: list[PluginRecord]
    conflicts: Mapping[str, str]

    def find(self, names: Iterable[str]) -> Architecture:
        """The architecture to build for `architectures` of a `config.json`: the first name that a plugin provides.

        :raises PluginError: no plugin provides any of them, or two plugins claim the first that is provided.
        """
        names = list(names)
        for name in names:
            if name in self.conflicts:
                raise PluginError(self.conflicts[name])
            if name in self.architectures:
                return self.architectures[name]
        raise PluginError(self._unknown(names))

    def find_language(self, entries: Mapping[str, Any]) -> Architecture:
        """The architecture of a language model inside another: by `architectures`, else by `model_type`.

        :param entries: its own `config.json` entries.
        :raises PluginError: nobody provides it, or several do.
        """
        names, kind = list(entries.get("architectures") or ()), entries.get("model_type")
        found = [a for a in self.architectures.values() if kind is not None and a.model_type == kind]
        if not found or any(name in self.architectures or name in self.conflicts for name in names):
            return self.find(names or [f"(of a language model with model_type {kind!r})"])
        if len(found) > 1:
            raise PluginError(
                f"the language model has model_type {kind!r}, under which there are "
                f"{', '.join(a.name for a in found)}; name one of them in its `architectures`"
            )
        return found[0]

    def manifest(self) -> Manifest:
        """What a worker process needs to load the same plugins."""
        loaded = tuple((r.name, r.module, r.version) for r in self.records if r.status == "loaded")
        return Manifest(loaded, tuple(r.name for r in self.records if r.status == "blocked"), API_VERSION)

    def _unknown(self, names: list[str]) -> str:
        known: dict[str, list[str]] = {}  # names may differ in nothing but the case of letters
        for name in (*self.architectures, *self.conflicts):
            known.setdefault(name.lower(), []).append(name)
        close = (m for name in names for m in difflib.get_close_matches(name.lower(), known, cutoff=0.75))
        near = [name for m in close for name in known[m]]
        if not names:
            return 'config.json names no architecture; add "architectures": ["..."] to it'
        moved = ledger.moved()
        lines = [f"no plugin provides the architecture {' or '.join(map(repr, names))}"]
        lines += [
            f"{name} has moved to a package of its own: pip install {moved[name]}" for name in names if name in moved
        ]
        if near:
            lines.append(f"near names: {', '.join(dict.fromkeys(near))}")
        lines += [f"broken plugin {r}: {r.reason}" for r in self.records if r.status == "broken"]
        if hidden := [r.name for r in self.records if r.status == "blocked"]:
            lines.append(f"blocked plugins: {', '.join(hidden)}")
        lines.append('to add one: pip install <vendor>-modelport, or plugins=["your_package.your_module"]')
        return "\n  ".join(lines)


def load_plugins(extra: Iterable[str] = (), blocked: Iterable[str] = ()) -> Plugins:
    """Import and register the plugins that are installed or asked for.

    Built-ins come first, then installed third parties, both by name, then `extra` as given; first-result hooks ask in
    the opposite order. A broken plugin is left out with a `PluginWarning`; one that was asked for is an error.

    :param extra: dotted names of modules to load besides the installed ones; MODELPORT_PLUGINS adds to them.
    :param blocked: names of plugins not to load; MODELPORT_PLUGINS adds to them.
    :raises PluginError: a name is wrong, or an asked-for plugin is broken or claims a taken architecture.
    """
    manager = _new_manager()
    records: list[PluginRecord] = []
    offers: dict[str, list[tuple[PluginRecord, Architecture]]] = {}
    for found in discover(extra, blocked):
        record, architectures, error = _load(manager, found) if found.status == "installed" else (found, [], None)
        if record.status == "broken":
            message = f"the plugin {record} is broken: {record.reason}"
            if record.asked:
                raise PluginError(message) from error
            warnings.warn(f"{message} (it is left out)", PluginWarning, stacklevel=2)
        for architecture in architectures:
            offers.setdefault(architecture.name, []).append((record, architecture))
        records.append(record)
    architectures, conflicts = _settle(offers)
    for i, record in enumerate(records):
        claimed = [conflicts[name] for name in record.provides if name in conflicts]
        records[i] = replace(record, reason="; ".join(claimed)) if claimed else record
    return Plugins(manager.hook, architectures, records, conflicts)


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager("modelport")
    manager.add_hookspecs(hookspecs)
    return manager


def _load(
    manager: pluggy.PluginManager, record: PluginRecord
) -> tuple[PluginRecord, list[Architecture], BaseException | None]:
    trial = _new_manager()  # what fails here leaves no trace in the real one
    try:
        module = _imported(record)
        api = getattr(module, "modelport_api", None)
        if complaint := api_complaint(record, api):
            raise PluginError(complaint)
        record = replace(record, api=api)
        _check_hooks(trial, module)
        trial.register(module, record.name)
        architectures = [a for offered in trial.hook.register_architectures() for a in _checked(offered)]
    except (Exception, SystemExit) as error:  # a module may call sys.exit; Ctrl-C stays Ctrl-C
        # pluggy writes several lines, others may too: the first says what, the traceback keeps the rest
        text = " ".join(str(error).split()) if isinstance(error, pluggy.PluginValidationError) else str(error)
        kind = "" if isinstance(error, pluggy.PluginValidationError | PluginError) else f"{type(error).__name__}: "
        trace = "".join(traceback.format_exception(error))
        return replace(record, status="broken", reason=kind + text.split("\n")[0], traceback=trace), [], error
    manager.register(module, record.name)
    provides = tuple(architecture.name for architecture in architectures)
    hooks = tuple(sorted(caller.name for caller in trial.get_hookcallers(module) or ()))
    return replace(record, status="loaded", provides=provides, hooks=hooks), architectures, None


def _imported(record: PluginRecord) -> ModuleType:
    try:
        return import_module(record.module)
    except (Exception, SystemExit):
        with suppress(SyntaxError):  # a module written for another API fails at the first name it misses; say so
            declared_api(record, {})
        raise


def _check_hooks(trial: pluggy.PluginManager, module: ModuleType) -> None:
    hooks = [name for name in dir(hookspecs) if trial.parse_hookspec_opts(hookspecs, name)]
    for name in dir(module):
        options = trial.parse_hookimpl_opts(module, name)
        if options is None:
            function = getattr(module, name) if name in hooks else None
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                raise PluginError(f"the function {name} is named as a hook; put @hookimpl above it, or rename it")
        elif (hook := options.get("specname") or name) not in hooks and not options.get("optionalhook"):
            near = difflib.get_close_matches(hook, hooks, n=1) or hooks
            raise PluginError(f"there is no hook {hook!r}; did you mean {' or '.join(near)}?")


def _checked(offered: Any) -> list[Architecture]:
    offered = [offered] if isinstance(offered, Architecture) else list(offered)
    names = [a.name if isinstance(a, Architecture) else None for a in offered]
    if None in names:
        raise PluginError(f"register_architectures returned {offered[names.index(None)]!r}, which is no Architecture")
    if twice := {name for name in names if names.count(name) > 1}:
        raise PluginError(f"register_architectures returned {', '.join(sorted(twice))} twice")
    return offered


def _settle(
    offers: dict[str, list[tuple[PluginRecord, Architecture]]],
) -> tuple[dict[str, Architecture], dict[str, str]]:
    """Give each name to its only provider, or to the one that replaces the others."""
    settled, conflicts = {}, {}
    for name, claims in offers.items():
        replaced = {architecture.replaces for record, architecture in claims if architecture.replaces != record.name}
        left = [claim for claim in claims if claim[0].name not in replaced] or claims
        if len(left) == 1:
            settled[name] = left[0][1]
            continue
        records = [record for record, _ in left]
        conflicts[name] = (
            f"{name} is provided by {' and by '.join(map(str, records))}; keep one: block the other "
            f"({' or '.join(f'-p no:{r.name}' for r in records)}; in Python blocked_plugins=[...]), or write "
            f"replaces={records[0].name!r} in the Architecture of {records[-1].name!r}"
        )
        if any(record.asked for record in records):
            raise PluginError(conflicts[name])
    return settled, conflicts
