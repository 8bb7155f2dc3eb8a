"""Configuration and module: `config.json` in the spellings that checkpoints have, and what an import costs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from modelport.loading.model import text_config
from modelport.testing.reference import LOGITS_LIMIT, ModuleReference
from modelport.testing.registry import Failure, Measured, conformance_check
from modelport.testing.subject import Subject, difference, needs

IMPORT_SECONDS = 0.25
IMPORT_SHARE = 0.1
"""A plugin may take this share of what importing torch takes, and in any case a quarter of a second."""


@conformance_check()
def config_extra_keys(subject: Subject) -> None:
    """Keys of `config.json` that the model does not know are ignored."""
    extra = {"_name_or_path": "someone/something", "unheard_of": {"a": [1]}, "transformers_version": "4.0.0"}
    _read_alike(subject, {**subject.raw_config, **extra}, "unknown keys")


@conformance_check()
def config_spellings(subject: Subject) -> None:
    """`config.json` as transformers 4 and as transformers 5 write it reads the same."""
    _read_alike(subject, as_transformers_4(subject.raw_config), "the spelling of transformers 4")
    _read_alike(subject, as_transformers_5(subject.raw_config), "the spelling of transformers 5")


@conformance_check()
def config_defaults(subject: Subject) -> Measured:
    """What `config.json` leaves out is taken to be what the reference takes it to be."""
    reference = subject.reference
    needs(isinstance(reference, ModuleReference), "no reference whose defaults could be compared")
    kind = type(reference.model).__name__
    needs(kind == subject.architecture.name, f"the reference is a {kind}, whose defaults are its own")
    sparse = {**reference.entries, "architectures": [subject.architecture.name]}
    bases = subject.baseline[:5]
    found = subject.alone([c.prompt for c in bases], folder=subject.write("defaults", config=sparse))
    worst = max(difference(base, other) for base, other in zip(bases, found, strict=True))
    left_out = sorted(set(subject.config.model_dump()) & (set(subject.raw_config) - set(sparse)))
    return Measured(worst, LOGITS_LIMIT, f"left out: {', '.join(left_out) or 'nothing that the model reads'}")


@conformance_check()
def import_cost(subject: Subject) -> Measured:
    """Importing the plugin's module takes little time, and does not import transformers."""
    seconds, torch_seconds, heavy = _import_in_a_new_process(subject.module)
    needs(seconds is not None, f"{subject.module} cannot be imported from another process")
    if heavy:
        raise Failure(f"importing {subject.module} imports {heavy}, which takes seconds; import it where it is used")
    limit = max(IMPORT_SECONDS, IMPORT_SHARE * torch_seconds)
    return Measured(seconds, limit, f"seconds for {subject.module}; torch takes {torch_seconds:.1f}")


def as_transformers_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` beside `rope_scaling`, and `torch_dtype`; settings per kind of layer stay as they are."""
    old = dict(config)
    if "dtype" in old:
        old["torch_dtype"] = old.pop("dtype")
    rope = old.get("rope_parameters")
    if isinstance(rope, Mapping) and not any(isinstance(value, Mapping) for value in rope.values()):
        rope = dict(old.pop("rope_parameters"))
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in rope:
                old[key] = rope.pop(key)
        kind = rope.pop("rope_type", "default")
        old["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    return old


def as_transformers_5(config: Mapping[str, Any]) -> dict[str, Any]:
    """One `rope_parameters`, and `dtype`."""
    new = dict(config)
    if "torch_dtype" in new:
        new["dtype"] = new.pop("torch_dtype")
    if "rope_parameters" not in new and ("rope_theta" in new or new.get("rope_scaling")):
        rope = dict(new.pop("rope_scaling", None) or {})
        rope["rope_type"] = rope.pop("type", rope.pop("rope_type", "default"))
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in new:
                rope[key] = new.pop(key)
        new["rope_parameters"] = rope
    return new


def _read_alike(subject: Subject, config: dict[str, Any], what: str) -> None:
    wanted = subject.config.model_dump()
    found = text_config(subject.architecture, config, subject.plugins).model_dump()
    changed = [f"{key}: {found[key]!r} instead of {wanted[key]!r}" for key in wanted if found[key] != wanted[key]]
    if changed:
        raise Failure(f"{what} changes what is read: {'; '.join(changed)}")


@cache
def _import_in_a_new_process(module: str) -> tuple[float | None, float, str]:
    """Seconds for the module, None when it cannot be imported there; seconds for torch; heavy modules it imported."""
    code = (
        "import sys, time\n"
        "start = time.perf_counter(); import torch; torch_seconds = time.perf_counter() - start\n"
        "import modelport.modeling, modelport.config, modelport.plugin\n"
        "from importlib import import_module\n"
        "start = time.perf_counter()\n"
        "try: import_module(sys.argv[1])\n"
        "except ModuleNotFoundError as error:\n"
        "    if error.name and sys.argv[1].startswith(error.name): sys.exit(3)\n"
        "    raise\n"
        "print(time.perf_counter() - start, torch_seconds, ','.join({'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, module], capture_output=True, text=True)
    if done.returncode == 3:
        return None, 0.0, ""
    if done.returncode:
        raise Failure(f"importing {module} in a new process fails: {done.stderr.strip().splitlines()[-1]}")
    seconds, torch_seconds, *heavy = done.stdout.split()
    return float(seconds), float(torch_seconds), "".join(heavy)
