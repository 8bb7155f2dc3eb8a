"""`modelport doctor`: what this installation runs on, and what is broken in it; exit status 1 when something is."""

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from modelport import API_VERSION, __version__
from modelport.cli.flags import DEFAULT_MODEL, add_plugin_flags, load_chosen

if TYPE_CHECKING:
    import torch

    from modelport.plugin import Plugins


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    :ivar problem: it keeps something from working, and sets the exit status.
    """

    topic: str
    text: str
    problem: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_plugin_flags(parser)


def run(args: argparse.Namespace) -> int:
    findings = []
    for finding in _findings(args):
        print(f"{'!!' if finding.problem else 'ok'}  {finding.topic:<15}  {finding.text}", flush=True)
        findings.append(finding)
    problems = sum(finding.problem for finding in findings)
    print(f"\n{problems or 'no'} problem{'' if problems == 1 else 's'} found")
    return 1 if problems else 0


def _findings(args: argparse.Namespace) -> Iterator[Finding]:
    yield Finding("modelport", f"{__version__}, plugin API {API_VERSION}")
    yield Finding(
        "python", f"{platform.python_version()} on {platform.system()} {platform.machine()} ({sys.executable})"
    )
    try:
        yield from _requirements()
        import torch
    except ImportError as error:
        yield Finding("imports", f"{error}; install modelport again, with what it requires", problem=True)
        return  # nothing that follows works without them
    except Exception as error:  # a broken shared library raises OSError, a half-installed package anything
        yield Finding("torch", f"cannot be imported: {error}", problem=True)
        return
    yield from _devices(torch)
    yield from _cpu_kernels()
    try:
        plugins = load_chosen(args)
    except ImportError as error:  # of a package that the core itself needs; those of plugins are in their records
        yield Finding("imports", f"{error}; install modelport again, with what it requires", problem=True)
        return
    yield from _plugins(plugins)
    yield _default_model(plugins)


def _requirements() -> Iterator[Finding]:
    """Every package that ours requires, against the version it asks for."""
    from packaging.requirements import Requirement

    for text in metadata.requires("modelport") or ():
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(requirement.name, f"is not installed; pip install '{requirement}'", problem=True)
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        wish = "" if fits else f", but {requirement.specifier} is needed; pip install --upgrade '{requirement}'"
        yield Finding(requirement.name, version + wish, problem=not fits)


def _devices(torch: "torch") -> Iterator[Finding]:
    from modelport.engine.memory import available_memory

    free = available_memory(torch.device("cpu")) / 2**30
    isa = torch.backends.cpu.get_cpu_capability()
    yield Finding(
        "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {isa}, {free:.1f} GiB of memory free"
    )
    yield Finding("cpu dtypes", _dtypes(torch, "cpu"))
    for index in range(torch.cuda.device_count()):
        name = f"cuda:{index}"
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
        yield Finding(name, f"{torch.cuda.get_device_name(index)}, {free:.1f} of {total:.1f} GiB free")
        yield Finding(f"{name} dtypes", _dtypes(torch, name))
    if not torch.cuda.is_available():
        yield Finding("cuda", "no device" if torch.version.cuda else "this torch is built for the CPU only")


def _dtypes(torch: "torch", device: str) -> str:
    """The types that a matrix product really runs in."""
    words = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.ones(8, 8, dtype=dtype, device=device)
        try:
            right = bool((x @ x == 8).all())
        except RuntimeError:
            right = False
        words.append(str(dtype).removeprefix("torch.") + ("" if right else " (does not work)"))
    return ", ".join(words)


def _cpu_kernels() -> Iterator[Finding]:
    from modelport.kernels import cpu

    slow = "not built: the torch implementations are used, which are slower; a C++ compiler at install time builds them"
    yield Finding("cpu kernels", slow if cpu.lib is None else "compiled")


def _plugins(plugins: "Plugins") -> Iterator[Finding]:
    status = [record.status for record in plugins.records]
    counts = ", ".join(f"{status.count(word)} {word}" for word in ("loaded", "blocked", "broken") if word in status)
    yield Finding("plugins", f"{counts or 'none'}; {len(plugins.architectures)} architectures")
    for record in plugins.records:
        if record.status == "broken":
            yield Finding("plugins", f"{record} is broken: {record.reason}", problem=True)
    for conflict in plugins.conflicts.values():
        yield Finding("plugins", conflict, problem=True)


def _default_model(plugins: "Plugins") -> Finding:
    try:
        path = plugins.hook.resolve_checkpoint(model=DEFAULT_MODEL, revision=None)
    except FileNotFoundError as error:  # worth knowing, but every other model works
        return Finding("default model", str(error))
    return Finding("default model", f"{DEFAULT_MODEL}: {path or 'no plugin knows it'}")
