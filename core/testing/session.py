"""A run of the kit: find the architecture, make its checkpoints, run the checks, write the report.

Decisions: the main instance goes through every check, a variant through those of its mathematics and of the cache; a
record that is no installed plugin is put into a module of its own, so that it takes the way of every other plugin.
"""

from __future__ import annotations

import difflib
import itertools
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from modelport import API_VERSION, __version__
from modelport.discovery import PluginRecord
from modelport.loading.model import pick_device, text_config
from modelport.plugin import Architecture, hookimpl, load_plugins
from modelport.testing.reference import GoldenReference, ModuleReference, sensible_reference
from modelport.testing.registry import Entry, Failure, Measured, Skip, all_checks
from modelport.testing.report import Check, Report, level_of
from modelport.testing.subject import Subject

_numbers = itertools.count()


def check(
    architecture: Architecture | str | None = None,
    *,
    golden: str | Path | None = None,
    only: str | Iterable[str] | None = None,
    device: str = "cpu",
    plugins: Sequence[str] = (),
) -> Report:
    """Check one architecture.

    :param architecture: its name, or its record; not needed with `golden`, whose `config.json` has the name.
    :param golden: a golden folder to compare with, instead of the architecture's own reference.
    :param only: checks to run (`"logits"`, `"variant:logits"`); a plain name includes its variants.
    :param device: `"cpu"` or `"cuda"`; the reference runs on the CPU.
    :param plugins: dotted names of plugin modules to load besides the installed ones.
    :raises PluginError: nobody provides the architecture.
    :raises ValueError: an unknown check or device, or a folder that is no golden folder.
    """
    with Session(architecture, golden=golden, device=device, plugins=plugins) as session:
        return session.run(only)


class Session:
    """One architecture and what its checks share; close it, or use it in a `with` statement.

    :raises PluginError: as for `check`; nothing is built yet.
    """

    def __init__(
        self,
        architecture: Architecture | str | None = None,
        *,
        golden: str | Path | None = None,
        device: str = "cpu",
        plugins: Sequence[str] = (),
    ):
        self.golden = None if golden is None else GoldenReference(Path(golden))
        if architecture is None:
            if self.golden is None:
                raise ValueError("nothing to check: name an architecture or a golden folder")
            architecture = self.golden.architectures(load_plugins(tuple(plugins)))[0]
        pick_device(device)
        self.device, self._own_module = device, None
        self.architecture, self.record = self._find(architecture, tuple(plugins))
        self._entries = all_checks()
        self._refuse_unknown(self.architecture.expected_failures, "expected_failures names")
        self._scratch = tempfile.TemporaryDirectory(prefix="modelport-check-")
        self._subjects: dict[str, Subject | Exception] = {}

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the checkpoints."""
        self._subjects.clear()
        self._scratch.cleanup()
        if self._own_module is not None:
            sys.modules.pop(self._own_module, None)

    @property
    def name(self) -> str:
        """The architecture, and the golden folder if there is one."""
        return self.architecture.name + (f"@{self.golden.folder.name}" if self.golden else "")

    def checks(self, only: str | Iterable[str] | None = None) -> list[str]:
        """Names of the checks, in order; a golden folder is one instance, so it has no variants.

        :raises ValueError: `only` names a check that there is not.
        """
        variants = [] if self.golden else list(self.architecture.variants)
        names = list(self._entries)
        entries = [(name, entry) for name, entry in self._entries.items() if entry.every_variant]
        entries = [(name, entry) for name, entry in entries if name != "media" or self.architecture.inputs is not None]
        names += [f"{v}:{name}" for v in variants for name, _ in entries]
        if only is None:
            return names
        wanted = [only] if isinstance(only, str) else list(only)
        self._refuse_unknown(wanted, "there is no check")
        return [name for name in names if name in wanted or name.rpartition(":")[2] in wanted]

    def run(self, only: str | Iterable[str] | None = None, told: Callable[[Check], None] = lambda _: None) -> Report:
        """Run the checks; `told` hears of each as it ends."""
        done = []
        for name in self.checks(only):
            done.append(self.run_check(name))
            told(done[-1])
        return self.report(done, complete=only is None)

    def run_check(self, name: str) -> Check:
        """Run one check; whatever it raises becomes part of what is returned."""
        variant, _, kind = name.rpartition(":")
        started = time.perf_counter()
        found = _run(self._entries[kind], lambda: self._subject(variant))
        found = replace(found, name=name, seconds=time.perf_counter() - started)
        reason = self.architecture.expected_failures.get(name)
        if reason is not None and found.status == "failed":
            found = replace(found, status="expected_failure", detail=f"{reason} ({found.detail})")
        elif reason is not None and found.status == "passed":
            detail = f"it passes now; take it out of expected_failures, where it says: {reason}"
            found = replace(found, status="unexpected_pass", detail=detail)
        return found

    def report(self, checks: Iterable[Check], complete: bool = True) -> Report:
        """Put outcomes together.

        :param complete: all checks ran, so that a level can be given.
        """
        checks, record = tuple(checks), self.record
        versions = {"modelport": __version__, "python": platform.python_version()}
        versions |= {name: version(name) for name in ("torch", "transformers")}
        return Report(
            self.name,
            self.architecture.name,
            record.name if record else self._module(),
            record.distribution if record else None,
            record.version if record else None,
            self._reference_name(),
            checks,
            level_of(checks, self._reference_name() is not None) if complete else None,
            sum(found.seconds for found in checks),
            self.device,
            datetime.now(UTC).date().isoformat(),
            versions,
        )

    def _find(self, wanted: Architecture | str, modules: tuple[str, ...]) -> tuple[Architecture, PluginRecord | None]:
        self.plugins = load_plugins(modules)
        if isinstance(wanted, str):
            wanted = self.plugins.find([wanted])
        record = next((r for r in self.plugins.records if wanted.name in r.provides), None)
        if self.plugins.architectures.get(wanted.name) == wanted:
            return wanted, record
        # not what the plugins provide under this name: give it a module of its own, which takes the name over
        offered = replace(wanted, replaces=record.name) if record else wanted
        module = ModuleType(f"modelport_check_{next(_numbers)}")
        module.modelport_api = API_VERSION
        module.register_architectures = hookimpl(lambda: [offered])
        sys.modules[module.__name__] = module
        self._own_module = module.__name__
        self.plugins = load_plugins((*modules, module.__name__))
        return wanted, None

    def _module(self) -> str:
        if self.record is not None:
            return self.record.module
        model = self.architecture.model
        return model.partition(":")[0] if isinstance(model, str) else model.__module__

    def _reference_name(self) -> str | None:
        if self.golden is not None:
            return self.golden.name
        reference = self.architecture.reference
        return f"{reference.__module__}:{reference.__qualname__}" if callable(reference) else reference

    def _subject(self, variant: str) -> Subject:
        if variant not in self._subjects:
            try:
                self._subjects[variant] = self._make(variant)
            except Exception as error:
                self._subjects[variant] = error
                raise
        found = self._subjects[variant]
        if isinstance(found, Exception):  # told once, by the check that met it
            raise Skip("not run: there is no instance to check; the first check says why")
        return found

    def _make(self, variant: str) -> Subject:
        architecture = self.architecture
        folder = Path(self._scratch.name) / (variant or "main")
        reference: ModuleReference | GoldenReference | None = self.golden
        overrides = architecture.variants[variant] if variant else {}
        if self.golden is not None:
            files = self.golden.under(architecture.name, folder / "files", self.plugins)
        elif architecture.reference is not None:
            entries = {**architecture.tiny, **overrides, "architectures": [architecture.name]}
            reference = sensible_reference(
                architecture, text_config(architecture, entries, self.plugins).vocab_size, overrides
            )
            files = reference.save(folder / "files")
            for name, content in architecture.files.items():
                (files / name).write_text(json.dumps(content))
        elif architecture.tiny:
            files = folder / "files"
            files.mkdir(parents=True)
            entries = {**architecture.tiny, **overrides, "architectures": [architecture.name]}
            (files / "config.json").write_text(json.dumps(entries))
        else:
            raise Failure(
                f"{architecture.name} has neither `reference` nor `tiny`, so there is nothing to run; give it at least "
                "`tiny`, the config.json entries of a small instance"
            )
        scratch = folder / "scratch"
        scratch.mkdir(parents=True)
        return Subject(architecture, self.plugins, self._module(), files, scratch, reference, self.device)

    def _refuse_unknown(self, names: Iterable[str], what: str) -> None:
        known = [*self._entries, *(n for n in (f"{v}:{e}" for v in self.architecture.variants for e in self._entries))]
        for name in names:
            variant, _, kind = name.rpartition(":")
            entry = self._entries.get(kind)
            if entry is None or variant and (variant not in self.architecture.variants or not entry.every_variant):
                near = difflib.get_close_matches(name, known, n=2)
                cure = (
                    f"did you mean {' or '.join(map(repr, near))}?"
                    if near
                    else f"there are: {', '.join(self._entries)}"
                )
                raise ValueError(f"{self.architecture.name}: {what} {name!r}; {cure}")


def _run(entry: Entry, subject: Callable[[], Subject]) -> Check:
    """The outcome under no name yet."""
    try:
        found = entry.function(subject()) or Measured()
        if found.worst is not None and not found.worst <= found.limit:  # NaN is no pass
            raise Failure(found.detail or "the difference is too large", found.worst, found.limit)
    except Skip as reason:
        return Check(entry.name, "skipped", detail=str(reason))
    except Failure as failure:
        return Check(entry.name, "failed", worst=failure.worst, limit=failure.limit, detail=str(failure), error=failure)
    except Exception as error:
        return Check(entry.name, "failed", detail=_told(error), error=error)
    return Check(entry.name, "passed", worst=found.worst, limit=found.limit, detail=found.detail)


def _told(error: Exception) -> str:
    """An exception in one line, with the last place outside the kit that it came through."""
    here = str(Path(__file__).parent)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(here)]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}{place}" if text else f"{type(error).__name__}{place}"
