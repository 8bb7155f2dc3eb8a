"""The ledger: what the project set out to run, beside what the conformance kit measured of it.

Decisions: the rows are data that lie with the built-in plugins. Results are data too, one small JSON file per module,
in the folder `ledger` of the package that has the plugin's module or of a package above it, so that a vendor's package
brings results the way modelport does. A result counts for the source it was taken from and for no other: an edited
module is unverified until it is checked again. Reading all of it imports no plugin and no torch.
"""

import csv
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from modelport.discovery import PluginRecord, locate

FOLDER = "ledger"
PASSED = "passed"
UNVERIFIED = "unverified"
EXPECTED = "expected to fail: "
RUNS = "runs"
LEVELS = ("L1", "L2", "L3")
"""What a result can prove; a row without one is `UNVERIFIED`, which is level L4. docs/model-support-policy.md."""

_DATA = "modelport.plugins"  # where the built-in plugins lie, and the project's own rows with them
_TASKS = {"generation": "generate", "embedding": "embed", "reward": "reward"}  # by the last word of a category
_CATEGORIES = {"generate": "text generation", "embed": "text embedding", "reward": "reward"}


@dataclass(frozen=True)
class Result:
    """What the kit said of one architecture.

    :ivar level: what the checks prove, one of `LEVELS`; None when one of them failed.
    :ivar references: what it was compared with.
    :ivar checks: name of each check that ran -> `"passed"`, `"failed"`, `"unexpected_pass"`, or `EXPECTED` and why.
    :ivar tasks: the tasks that the architecture names.
    :ivar maintainers: who answers for it, as it says itself.
    :ivar version: version of modelport that it was checked with.
    :ivar date: day of the check, `YYYY-MM-DD`.
    :ivar modalities: what its input processor says that it takes, as in `Row`.
    """

    level: str | None
    references: tuple[str, ...]
    checks: Mapping[str, str]
    tasks: tuple[str, ...]
    maintainers: tuple[str, ...]
    version: str
    date: str
    modalities: str = "T"


@dataclass(frozen=True)
class Entry:
    """An architecture that somebody provides.

    :ivar plugin: the plugin's name.
    :ivar result: None when it was not checked, or its source changed since.
    """

    plugin: str
    tasks: tuple[str, ...] = ("generate",)
    maintainers: tuple[str, ...] = ()
    result: Result | None = None


@dataclass(frozen=True)
class Row:
    """One line of the ledger.

    :ivar modalities: T, I, V, A for text, image, video, audio; `+` takes several, `^E` takes embeddings too.
    :ivar level: one of `LEVELS`, or `UNVERIFIED`.
    :ivar lora: `"yes"`, `"no"` or `UNVERIFIED`, as measured; so are `pipeline_parallel` and `tensor_parallel`.
    :ivar plugin: who provides it here; None for nobody.
    :ivar checked: day and version of the check; None when there was none.
    :ivar checkpoints: published examples.
    :ivar known_failures: checks that did not pass, each with what is known about it.
    """

    category: str
    architecture: str
    models: str
    modalities: str
    tasks: tuple[str, ...]
    level: str
    lora: str
    pipeline_parallel: str
    tensor_parallel: str
    plugin: str | None
    checked: str | None
    checkpoints: tuple[str, ...] = ()
    maintainers: tuple[str, ...] = ()
    known_failures: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The eleven keys of `modelport models --json`."""
        return {key: list(self.tasks) if key == "tasks" else getattr(self, key) for key in JSON_KEYS}


JSON_KEYS = tuple(Row.__dataclass_fields__)[:11]


def moved() -> dict[str, str]:
    """Architectures that left modelport -> the package that has them now."""
    return {line["architecture"]: line["package"] for line in _table("moved.csv")}


def entries(records: Iterable[PluginRecord]) -> dict[str, Entry] | None:
    """Every architecture that these plugins provide, by name; None when only loading the plugins can tell.

    :param records: from `discovery.installed_plugins` or `Plugins.records`; blocked and broken ones provide nothing.
    """
    packages: dict[str, ModuleSpec | None] = {}
    found: dict[str, Entry] = {}
    for record in records:
        if record.status not in ("installed", "loaded"):
            continue
        results = read(record, packages)
        if results is None:
            if any(b"register_architectures" in file.read_bytes() for file in _sources(record.module, packages)):
                return None
            continue  # a format, a source, a quantisation
        for name, result in results.items():
            if name in found:
                return None  # who of the two provides it is settled by what they say when they are loaded
            found[name] = Entry(record.name, result.tasks, result.maintainers, result) if result else Entry(record.name)
    return found


def read(record: PluginRecord, packages: dict[str, ModuleSpec | None] | None = None) -> dict[str, Result | None] | None:
    """The recorded results of a plugin's architectures, all that it registers; None for one that was not checked.

    :param packages: specs found so far, filled on the way (see `discovery.locate`).
    :return: None when nothing is recorded, or what is recorded was taken from another source than the installed one.
    """
    packages = {} if packages is None else packages
    for path in _files(record.module, packages):
        if path.is_file():
            data = json.loads(path.read_text())
            if data["source"] != digest(record.module, packages):
                return None
            return {name: entry and _result(entry) for name, entry in data["architectures"].items()}
    return None


def write(record: PluginRecord, results: Mapping[str, Result]) -> Path:
    """Keep what the kit said of a plugin's architectures; results of others that still count stay.

    :param record: of the loaded plugin; `provides` says all its names.
    :return: the file that was written.
    :raises ValueError: the plugin's module lies in no package, so there is no place for a file beside it.
    """
    packages: dict[str, ModuleSpec | None] = {}
    files = _files(record.module, packages)
    if not files:
        raise ValueError(
            f"the plugin {record} is a single module, which has no folder for results; make it a package "
            f"({record.module}/__init__.py)"
        )
    path = next((file for file in files if file.parent.is_dir()), files[0])
    kept = {**(read(record, packages) or {}), **results}
    data = {
        "source": digest(record.module, packages),
        "architectures": {name: (entry := kept.get(name)) and asdict(entry) for name in sorted(record.provides)},
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    return path


def digest(module: str, packages: dict[str, ModuleSpec | None]) -> str:
    """What identifies a plugin's source: its module, or all modules of the package that it is."""
    total = hashlib.sha256()
    for file in _sources(module, packages):
        total.update(file.read_bytes().replace(b"\r\n", b"\n"))
    return total.hexdigest()[:16]


def rows(provided: Mapping[str, Entry]) -> list[Row]:
    """The ledger: the project's rows in their order, then whatever else is provided, by name."""
    listed = [_row(line, provided.get(line["architecture"])) for line in _table("supported-models.csv")]
    names = {row.architecture for row in listed}
    further = []
    for name in sorted(set(provided) - names):
        category = _CATEGORIES.get(provided[name].tasks[0], "other") if provided[name].tasks else "other"
        result = provided[name].result
        takes = result.modalities if result else "T"
        category = category if takes == "T" else category.replace("text", "multimodal")
        line = {
            "category": category,
            "architecture": name,
            "models": "",
            "modalities": takes,
            "example_checkpoints": "",
        }
        further.append(_row(line, provided[name]))
    return listed + further


def _row(line: Mapping[str, str], entry: Entry | None) -> Row:
    result = entry.result if entry else None
    task = _TASKS.get(line["category"].rpartition(" ")[2])
    tasks = (task,) if task else entry.tasks if entry else ()
    needed = _media_checks(line["modalities"])
    needed += ["pooling"] if task != "generate" and task else []
    proven = result if result and result.level and all(result.checks.get(n) == PASSED for n in needed) else None

    def measured(check: str) -> str:
        if result is None or check not in result.checks or result.checks.get(RUNS) != PASSED:
            return UNVERIFIED  # of a model that does not even run nothing else was measured
        return "yes" if result.checks[check] == PASSED else "no"

    return Row(
        category=line["category"],
        architecture=line["architecture"],
        models=line["models"],
        modalities=line["modalities"],
        tasks=tasks,
        level=proven.level if proven else UNVERIFIED,
        lora=measured("lora"),
        pipeline_parallel=measured("pipeline_parallel"),
        tensor_parallel=measured("tensor_parallel"),
        plugin=entry.plugin if entry else None,
        checked=f"{proven.date} ({proven.version})" if proven else None,
        checkpoints=tuple(line["example_checkpoints"].split("; ")) if line["example_checkpoints"] else (),
        maintainers=entry.maintainers if entry else (),
        known_failures=tuple(
            f"{check}: {outcome}" for check, outcome in (result.checks.items() if result else ()) if outcome != PASSED
        ),
    )


def _media_checks(modalities: str) -> list[str]:
    """What a row that says this has to have passed."""
    media = [part for part in modalities.split(" + ") if part != "T"]
    found = ["media", "refused_items"] if media else []
    found += ["embedded_items"] if any("^E" in part for part in media) else []
    return found + (["several_items"] if any(part.endswith("+") for part in media) else [])


def _result(entry: Mapping[str, Any]) -> Result:
    return Result(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()})


def _table(name: str) -> list[dict[str, str]]:
    text = resources.files(_DATA).joinpath(FOLDER, name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _sources(module: str, packages: dict[str, ModuleSpec | None]) -> list[Path]:
    """The files of a module; of a package all modules in it."""
    spec = locate(module, packages)
    if spec is None or not spec.has_location:
        return []
    origin = Path(spec.origin)
    return sorted(origin.parent.rglob("*.py")) if spec.submodule_search_locations is not None else [origin]


def _files(module: str, packages: dict[str, ModuleSpec | None]) -> list[Path]:
    """Where results of a module may lie, the innermost package first; named by the module, since a plugin's own name
    depends on how it is found."""
    found, package = [], module
    while package:
        spec = locate(package, packages)
        inside = module[len(package) + 1 :] or module.rpartition(".")[2]
        folders = (spec and spec.submodule_search_locations) or ()
        found += [Path(folder) / FOLDER / f"{inside}.json" for folder in folders]
        package = package.rpartition(".")[0]
    return found
