"""The list of checks, and how a check tells what it found.

A check is a function of a `Subject`. It returns a `Measured` (or None) when it passed, and raises `Failure`, or `Skip`
when it does not apply; any other exception is a failure too. Each theme has a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelport.testing.subject import Subject

THEMES = ("parity", "weights", "invariants", "faults", "configuration", "places", "items", "adapters")
"""The modules that hold checks, in the order in which they run."""


@dataclass(frozen=True)
class Measured:
    """What a passed check measured.

    :ivar worst: the largest difference found; a check that finds more than `limit` has failed.
    """

    worst: float | None = None
    limit: float | None = None
    detail: str = ""


class Failure(AssertionError):
    """The architecture is wrong, and this says how."""

    def __init__(self, detail: str, worst: float | None = None, limit: float | None = None):
        super().__init__(detail)
        self.worst, self.limit = worst, limit


class Skip(Exception):
    """The check does not apply; the message begins with `NOT_APPLICABLE` or `NOT_BUILT` and says why."""


CheckFunction = Callable[["Subject"], Measured | None]


@dataclass(frozen=True)
class Entry:
    """One check.

    :ivar every_variant: it runs for every variant, not for the main instance alone.
    """

    name: str
    theme: str
    function: CheckFunction
    every_variant: bool

    @property
    def summary(self) -> str:
        """What it proves: the first sentence of its docstring."""
        return (self.function.__doc__ or "").strip().split("\n")[0]


_CHECKS: dict[str, Entry] = {}


def conformance_check(*, every_variant: bool = False) -> Callable[[CheckFunction], CheckFunction]:
    """Add a function to the list, under its own name."""

    def add(function: CheckFunction) -> CheckFunction:
        assert function.__doc__, f"{function.__name__} needs a docstring: `modelport check --list` shows it"
        assert function.__name__ not in _CHECKS, function.__name__
        theme = function.__module__.rpartition(".")[2]
        _CHECKS[function.__name__] = Entry(function.__name__, theme, function, every_variant)
        return function

    return add


def all_checks() -> dict[str, Entry]:
    """Every check by name, in the order in which they run."""
    for theme in THEMES:
        import_module(f"modelport.testing.{theme}")
    return dict(sorted(_CHECKS.items(), key=lambda item: THEMES.index(item[1].theme)))
