"""The kit in pytest: `test_acme = conformance_tests("AcmeForCausalLM")` becomes one test for each check.

Decisions: this module is loaded by every run of pytest wherever modelport is installed, so it imports nothing but
pytest; what a test needs is imported when tests are collected, and built when the first of them runs; reports are
written as JSON on request (`--conformance-reports FOLDER`), for the table of supported models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from modelport.plugin import Architecture
    from modelport.testing.report import Check
    from modelport.testing.session import Session

OPTION = "--conformance-reports"
FIXTURE = "conformance_check"
MARKER = "conformance"


@dataclass(frozen=True, eq=False)
class Wish:
    """What one call of `conformance_tests` asked for."""

    architecture: Architecture | str | None
    golden: str | Path | None
    only: str | Sequence[str] | None
    device: str
    plugins: tuple[str, ...]

    def session(self) -> Session:
        from modelport.testing.session import Session

        return Session(self.architecture, golden=self.golden, device=self.device, plugins=self.plugins)


def conformance_tests(
    architecture: Architecture | str | None = None,
    *,
    golden: str | Path | None = None,
    only: str | Sequence[str] | None = None,
    device: str = "cpu",
    plugins: Sequence[str] = (),
) -> Callable[..., None]:
    """A test function with one case for each check; bind it to a name that begins with `test`.

    The parameters are those of `modelport.testing.check`. An expected failure is reported as `xfail`, a check that
    does not apply or is not built yet as skipped, with the reason.
    """

    @pytest.mark.conformance(Wish(architecture, golden, only, device, tuple(plugins)))
    def test(conformance_check: Callable[[], Check]) -> None:
        found = conformance_check()
        if found.status == "skipped":
            pytest.skip(found.detail)
        if found.status == "expected_failure":
            pytest.xfail(found.detail)
        if not found.ok:
            measured = f" (worst {found.worst:.3g}, limit {found.limit:.3g})" if found.worst is not None else ""
            pytest.fail(f"{found.name}: {found.detail}{measured}", pytrace=False)

    return test


class Runs:
    """The sessions that are open, and what they found; one object for each run of pytest."""

    def __init__(self, folder: str | None):
        self.folder = folder
        self.found: dict[Wish, list[Check]] = {}
        self._open: dict[Wish, Session] = {}

    def session(self, wish: Wish) -> Session:
        if wish not in self._open:
            self._open[wish] = wish.session()
        return self._open[wish]

    def run(self, wish: Wish, name: str) -> Check:
        check = self.session(wish).run_check(name)
        self.found.setdefault(wish, []).append(check)
        return check

    def lines(self) -> Iterator[str]:
        """One line for each architecture; its report is written on the way."""
        for wish, checks in self.found.items():
            session = self.session(wish)
            complete = wish.only is None and [check.name for check in checks] == session.checks()
            report = session.report(checks, complete)
            yield f"{report.name}: {report.summary()}"
            if self.folder is not None:
                folder = Path(self.folder)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{report.name}.json").write_text(report.to_json())

    def close(self) -> None:
        for session in self._open.values():
            session.close()
        self._open.clear()


RUNS = pytest.StashKey[Runs]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("modelport")
    group.addoption(OPTION, metavar="FOLDER", help="write a report of each conformance run to FOLDER, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{MARKER}(wish): a test made by modelport.testing.conformance_tests")
    config.stash[RUNS] = Runs(config.getoption(OPTION))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker(MARKER)
    if marker is not None and FIXTURE in metafunc.fixturenames:
        (wish,) = marker.args
        session = metafunc.config.stash[RUNS].session(wish)
        metafunc.parametrize(FIXTURE, session.checks(wish.only), indirect=True)


@pytest.fixture
def conformance_check(request: pytest.FixtureRequest) -> Callable[[], Check]:
    """Runs one check and gives its outcome."""
    (wish,) = request.node.get_closest_marker(MARKER).args
    runs = request.config.stash[RUNS]
    return lambda: runs.run(wish, request.param)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    lines = list(terminalreporter.config.stash[RUNS].lines())
    if lines:
        terminalreporter.section("conformance")
        for line in lines:
            terminalreporter.write_line(line)


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[RUNS].close()
