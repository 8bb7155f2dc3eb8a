"""What a run of the kit found: one `Check` each, one `Report` for an architecture, as text and as JSON.

Decision: only what ran and passed counts; what was skipped (not applicable, not built yet) is told apart everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

Status = Literal["passed", "failed", "skipped", "expected_failure", "unexpected_pass"]
STATUSES = ("passed", "failed", "skipped", "expected_failure", "unexpected_pass")
NOT_BUILT = "not built yet: "
NOT_APPLICABLE = "not applicable: "
PARITY = ("logits", "greedy")
RUNS = "runs"


@dataclass(frozen=True)
class Check:
    """One check's outcome.

    :ivar name: `"logits"`, or `"variant:logits"`.
    :ivar seconds: how long it took; what several checks share is counted with the first that needs it.
    :ivar worst: the largest difference it measured, None where there is nothing to measure.
    :ivar limit: the largest one it allows.
    :ivar detail: why it failed or was skipped; else what is worth knowing.
    :ivar error: the exception behind a failure; not part of the JSON.
    """

    name: str
    status: Status
    seconds: float = 0.0
    worst: float | None = None
    limit: float | None = None
    detail: str = ""
    error: BaseException | None = field(default=None, repr=False, compare=False)

    @property
    def ok(self) -> bool:
        """Whether it stands in nobody's way: everything but a failure and an unexpected pass."""
        return self.status not in ("failed", "unexpected_pass")


@dataclass(frozen=True)
class Report:
    """All checks of one architecture against one reference.

    :ivar name: the architecture, with the golden folder's name when there is one: `"XverseForCausalLM@xverse-7b"`.
    :ivar plugin: the plugin that provides it; its module when it is not installed.
    :ivar distribution: the package of that plugin, and `version` that package's version; None when not installed.
    :ivar reference: what it was compared with; None when it only ran.
    :ivar level: see `level_of`; None when only some of the checks ran.
    :ivar date: ISO date (UTC) of the run.
    :ivar versions: of modelport, torch, transformers and Python.
    """

    name: str
    architecture: str
    plugin: str
    distribution: str | None
    version: str | None
    reference: str | None
    checks: tuple[Check, ...]
    level: str | None
    seconds: float
    device: str
    date: str
    versions: Mapping[str, str]

    @property
    def passed(self) -> bool:
        """Whether at least one check passed and none failed or passed unexpectedly."""
        return all(check.ok for check in self.checks) and any(check.status == "passed" for check in self.checks)

    def count(self, status: Status) -> int:
        return sum(check.status == status for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        """:raises KeyError: no check of that name ran."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"no check {name!r} in the report of {self.name}")

    def to_dict(self) -> dict[str, Any]:
        entries = {f.name: getattr(self, f.name) for f in fields(self)}
        checks = [{k: v for k, v in vars(check).items() if k != "error"} for check in self.checks]
        return {**entries, "checks": checks, "versions": dict(self.versions)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Report:
        """:raises ValueError: keys that a report does not have, or lacks."""
        try:
            checks = tuple(Check(**check) for check in entries["checks"])
            return cls(**{**entries, "checks": checks})
        except (TypeError, KeyError) as error:
            raise ValueError(f"this is no report of a conformance run ({error}); run `modelport check` again") from None

    @classmethod
    def from_json(cls, text: str) -> Report:
        """:raises ValueError: not JSON, or not a report."""
        entries = json.loads(text)
        if not isinstance(entries, dict):
            raise ValueError(f"this is no report of a conformance run but a {type(entries).__name__}")
        return cls.from_dict(entries)

    def summary(self) -> str:
        """One line: `31 passed, 2 not applicable, 5 not built yet in 4.1 s; level L1`."""
        skipped = [check for check in self.checks if check.status == "skipped"]
        unbuilt = sum(check.detail.startswith(NOT_BUILT) for check in skipped)
        counts = {status.replace("_", " "): self.count(status) for status in STATUSES if status != "skipped"}
        counts |= {"not applicable": len(skipped) - unbuilt, "not built yet": unbuilt}
        told = ", ".join(f"{number} {what}" for what, number in counts.items() if number)
        level = f"level {self.level}" if self.level else "no level: only some checks ran"
        return f"{told} in {self.seconds:.1f} s; {level}"


def level_of(checks: tuple[Check, ...], has_reference: bool) -> str:
    """The support level that these checks prove.

    L1: prompt logits and greedy tokens are the reference's, for every variant, and every other check passed or does
    not apply. L3: it runs, but there is no reference, or some check failed, as expected or not. L4: it does not run.
    """
    found = {check.name: check.status for check in checks}
    strict = all(status in ("passed", "skipped") for status in found.values())
    variants = {name.rpartition(":")[0] for name in found}
    parity = all(found.get(f"{v}:{p}" if v else p) == "passed" for v in variants for p in PARITY)
    if has_reference and strict and parity:
        return "L1"
    return "L3" if found.get(RUNS) == "passed" else "L4"
