"""Which plugins there are, without importing any of them: installed ones, asked-for modules, blocked names.

Decisions: a plugin is found in package metadata (one entry-point group) or named by its module; `installed_plugins`
reads the module's source instead of running it, so that listing plugins never costs an import of torch; `-p` on the
command line and the MODELPORT_PLUGINS variable share one grammar.
"""

from __future__ import annotations

import ast
import difflib
import importlib.metadata
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec

from modelport import API_VERSION, __version__

ENTRY_POINT_GROUP = "modelport.plugins"
ENVIRONMENT_VARIABLE = "MODELPORT_PLUGINS"
OWN_DISTRIBUTION = "modelport"
_DOTTED_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


class PluginError(ValueError):
    """A plugin, or a name given for one, cannot be used; the message says which, why, and the cure."""


@dataclass(frozen=True)
class PluginRecord:
    """One plugin and what became of it.

    :ivar name: what `no:NAME` blocks: the entry point's name, or the dotted name for a module asked for by name.
    :ivar module: dotted name of the plugin's module.
    :ivar distribution: the package it was installed with; None for a module asked for by name.
    :ivar version: that package's version.
    :ivar api: the `modelport_api` its module declares; None when that is not known (yet).
    :ivar status: `"loaded"`, `"blocked"` or `"broken"`; `"installed"` in a listing that imports nothing.
    :ivar reason: one line: why it is broken, or which of its architectures another plugin claims too.
    :ivar provides: names of the architectures it registers; empty until it is loaded.
    :ivar hooks: names of the hooks it implements; empty until it is loaded.
    :ivar builtin: it comes with modelport itself.
    :ivar asked: somebody asked for it by its dotted name, so its failure is an error and no warning.
    :ivar traceback: the formatted traceback behind `reason`, or `""`.
    """

    name: str
    module: str
    distribution: str | None = None
    version: str | None = None
    api: int | None = None
    status: str = "installed"
    reason: str = ""
    provides: tuple[str, ...] = ()
    hooks: tuple[str, ...] = ()
    builtin: bool = False
    asked: bool = False
    traceback: str = ""

    def __str__(self) -> str:
        return f"'{self.name}' ({self.distribution} {self.version})" if self.distribution else f"'{self.name}'"


def parse_options(options: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Read the `-p` grammar: `no:NAME` blocks, `dotted.name` loads, commas separate.

    :return: the dotted names to load, and the plugin names to block, each in the order given.
    """
    words = [word.strip() for option in options for word in option.split(",") if word.strip()]
    load = tuple(word for word in words if not word.startswith("no:"))
    block = tuple(word.removeprefix("no:").strip() for word in words if word.startswith("no:"))
    return load, block


def discover(extra: Iterable[str] = (), blocked: Iterable[str] = ()) -> list[PluginRecord]:
    """List every plugin in loading order, importing none; MODELPORT_PLUGINS is added to both arguments.

    Built-ins come first, then installed third parties, both by name, then asked-for modules as given.

    :raises PluginError: `extra` holds something else than dotted names, or `blocked` a name that no plugin has.
    """
    env_extra, env_blocked = parse_options([os.environ.get(ENVIRONMENT_VARIABLE, "")])
    records = _installed()
    for module in dict.fromkeys((*_dotted_names(env_extra), *_dotted_names(extra))):
        here = next((i for i, record in enumerate(records) if record.module == module), None)
        if here is None:
            records.append(PluginRecord(module, module, asked=True))
        else:  # installed as well: it keeps its place and its name
            records[here] = replace(records[here], asked=True)

    names = {record.name for record in records}
    hidden = {*env_blocked, *blocked}
    for name in sorted(hidden - names):
        near = difflib.get_close_matches(name, names, cutoff=0.5)
        cure = f"did you mean {' or '.join(map(repr, near))}?" if near else "`modelport plugins` lists all names."
        raise PluginError(f"cannot block the plugin {name!r}: there is none of that name; {cure}")
    for record in records:
        if record.asked and record.name in hidden:
            raise PluginError(f"the plugin {record} is both asked for and blocked; drop one of the two")
    return [replace(r, status="blocked", reason="") if r.name in hidden else r for r in records]


def installed_plugins(extra: Iterable[str] = (), blocked: Iterable[str] = ()) -> list[PluginRecord]:
    """List every plugin as `"installed"`, `"blocked"` or `"broken"` without running any plugin's code.

    What only running can show (a failing import, a misspelt hook) is left to `modelport.plugin.load_plugins`.

    :raises PluginError: as `discover` does.
    """
    packages: dict[str, ModuleSpec | None] = {}
    return [_inspected(r, packages) if r.status == "installed" else r for r in discover(extra, blocked)]


def api_complaint(record: PluginRecord, api: object) -> str:
    """Why a module that declares `modelport_api = api` cannot be used, with the cure; `""` when it can."""
    if api is None:
        return f"declares no API version; add `modelport_api = {API_VERSION}` to {record.module}"
    if isinstance(api, bool) or not isinstance(api, int):
        return f"declares `modelport_api = {api!r}`; write an integer, such as {API_VERSION}"
    if api == API_VERSION:
        return ""
    package = record.distribution or record.module
    other = "upgrade modelport" if api > API_VERSION else "use an older modelport"
    return (
        f"is written for plugin API {api}, and modelport {__version__} has API {API_VERSION}; "
        f"install a version of {package} for API {API_VERSION}, or {other}"
    )


def declared_api(record: PluginRecord, packages: dict[str, ModuleSpec | None]) -> int | None:
    """Read `modelport_api` from the source of a plugin's module; None when only running the module can tell.

    :param packages: specs found so far, filled on the way, so that plugins of one package share the search.
    :raises PluginError: the module does not exist, or declares no API version or one that is not ours.
    :raises SyntaxError: the source does not parse.
    """
    spec = locate(record.module, packages)
    if spec is None or spec.origin is None:  # no origin: a folder without __init__.py
        cure = f"reinstall {record.distribution}" if record.distribution else "install the package that has it"
        raise PluginError(f"there is no module {record.module!r}; {cure}")
    if record.builtin:  # as new as the core by construction; parsing a hundred of them would take a quarter second
        return API_VERSION
    source = spec.loader.get_source(record.module) if hasattr(spec.loader, "get_source") else None
    if source is None:
        return None
    api, unclear = _literal_api(ast.parse(source, spec.origin or record.module))
    if unclear:
        return None
    if complaint := api_complaint(record, api):
        raise PluginError(complaint)
    return api  # type: ignore[return-value]  # api_complaint accepts only an int


def _literal_api(module: ast.Module) -> tuple[object, bool]:
    """The literal bound to `modelport_api` at the top level, and whether something else may bind it."""
    unclear = False
    for node in module.body:
        match node:
            case (
                ast.Assign(targets=[ast.Name("modelport_api")], value=value)
                | ast.AnnAssign(target=ast.Name("modelport_api"), value=value)
            ):
                return (value.value, False) if isinstance(value, ast.Constant) else (None, True)
            case ast.ImportFrom(names=names):
                unclear |= any((alias.asname or alias.name) in ("modelport_api", "*") for alias in names)
    return None, unclear


def _inspected(record: PluginRecord, packages: dict[str, ModuleSpec | None]) -> PluginRecord:
    try:
        return replace(record, api=declared_api(record, packages))
    except PluginError as error:
        return replace(record, status="broken", reason=str(error))
    except (SyntaxError, ImportError, ValueError) as error:  # ImportError: not decodable; ValueError: null bytes
        return replace(record, status="broken", reason=f"{type(error).__name__}: {error}".split("\n")[0])


def _installed() -> list[PluginRecord]:
    found: dict[str, list[PluginRecord]] = {}
    for distribution in importlib.metadata.distributions():
        text = distribution.read_text("entry_points.txt") or ""
        if ENTRY_POINT_GROUP in text:  # reading the name of every other package would cost more than all the rest
            metadata = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
            package, version = _header(metadata, "Name"), _header(metadata, "Version")
            # the first one on sys.path hides later ones of its name, as it does for imports
            found.setdefault(_canonical(package), _offered_by(distribution, package, version))
    offers = [record for records in found.values() for record in records]
    offers.sort(key=lambda record: (not record.builtin, record.name, record.distribution))
    for i, record in enumerate(offers):
        for first in offers[:i]:
            if record.name == first.name:
                reason = f"its name is taken by the plugin of {first.distribution} {first.version}"
                offers[i] = replace(record, status="broken", reason=f"{reason}; uninstall one of the two packages")
            elif record.module == first.module and first.status == "installed":
                reason = f"its module {record.module} is already the plugin {first}; drop one of the entry points"
                offers[i] = replace(record, status="broken", reason=reason)
    return offers


def _offered_by(distribution: importlib.metadata.Distribution, package: str, version: str) -> list[PluginRecord]:
    builtin = _canonical(package) == OWN_DISTRIBUTION
    try:
        points = distribution.entry_points.select(group=ENTRY_POINT_GROUP)
    except Exception as error:  # a file that is no INI file; the parser promises no particular exception
        reason = f"the entry_points.txt of {package} cannot be read: {error}"
        return [PluginRecord(package, "", package, version, status="broken", reason=reason, builtin=builtin)]
    records = [PluginRecord(p.name, p.value, package, version, builtin=builtin) for p in points]
    complaint = "its entry point must name a module (package.module), not {!r}"
    return [
        r if _DOTTED_NAME.fullmatch(r.module) else replace(r, status="broken", reason=complaint.format(r.module))
        for r in records
    ]


def _header(metadata: str, field: str) -> str:
    """One field; `Distribution.metadata` would parse the whole message, and a listing would take twice as long."""
    match = re.search(rf"^{field}: *(.+)$", metadata, re.MULTILINE)
    return match[1].strip() if match else "?"


def _canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def locate(module: str, packages: dict[str, ModuleSpec | None]) -> ModuleSpec | None:
    """`importlib.util.find_spec`, except that the packages around the module are not imported either.

    :param packages: specs found so far, filled on the way, so that modules of one package share the search.
    """
    if module in packages:
        return packages[module]
    parent, _, leaf = module.rpartition(".")
    path: list[str] | None = None
    if parent:
        package = locate(parent, packages)
        if package is None or package.submodule_search_locations is None:
            return None
        path = list(package.submodule_search_locations)
    finders = (finder for finder in sys.meta_path if hasattr(finder, "find_spec"))
    try:
        spec = next((spec for finder in finders if (spec := finder.find_spec(module, path)) is not None), None)
    except KeyError:  # a folder without __init__.py inside a package: its spec insists on the imported parent
        spec = ModuleSpec(module, None, is_package=True)
        spec.submodule_search_locations = [os.path.join(folder, leaf) for folder in path or ()]
    packages[module] = spec
    return spec


def _dotted_names(extra: Iterable[str]) -> list[str]:
    """Check what `plugins=` was given: a worker process must be able to import it again from its name alone."""
    if isinstance(extra, str):
        raise PluginError(f"plugins= takes a list of dotted module names; write plugins=[{extra!r}]")
    names = []
    for name in extra:
        if not isinstance(name, str):
            raise PluginError(
                f"plugins= takes dotted module names, not the object {name!r}: worker processes must be able to "
                f"import it again; move it to a module and give that module's name"
            )
        if name == "__main__" or name.startswith("__main__."):
            raise PluginError(
                f"the plugin {name!r} is the running script, which worker processes cannot import again; "
                f"move it to a module of its own and give that module's name"
            )
        if name.startswith("no:"):
            blocked = name.removeprefix("no:")
            raise PluginError(f"plugins= names what to load, and got {name!r}; write blocked_plugins=[{blocked!r}]")
        if not _DOTTED_NAME.fullmatch(name):
            raise PluginError(f"plugins= takes dotted module names (package.module), not {name!r}")
        names.append(name)
    return names
