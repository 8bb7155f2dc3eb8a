"""What tests of worker processes look at."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelport import LLM
from modelport.llm import AsyncLLM


class Processes:
    """Of this machine."""

    def gone(self, pids: list[int], seconds: float = 5.0) -> bool:
        """Whether none of them runs, at the end of so many seconds."""
        until = time.monotonic() + seconds
        while any(_runs(pid) for pid in pids):
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        return True

    def parent(self, pid: int) -> int:
        return int(_stat(pid)[1])

    def workers(self, llm: LLM | AsyncLLM) -> list[int]:
        return llm._front.engine.runner.worker_pids

    def agent(self, llm: LLM | AsyncLLM) -> int:
        return self.parent(self.workers(llm)[0])

    def left(self) -> set[str]:
        """Folders of engines that this test and its processes made."""
        here = tempfile.gettempdir()
        return {f for f in os.listdir(here) if os.path.exists(f"{here}/{f}/engine")}


def _runs(pid: int) -> bool:
    return _stat(pid)[0] not in ("", "Z")


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return [""]


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Processes]:
    """Temporary files go to a folder of the test's own, whose name is short enough for a socket's."""
    with tempfile.TemporaryDirectory(prefix="mp-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Processes()
