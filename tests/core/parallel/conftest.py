"""What tests of worker processes look at."""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
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

    def listening(self, pids: list[int]) -> set[str]:
        """Ports of this machine, as the system writes them, on which any of these processes listens."""
        sockets = set()
        for pid in pids:
            for link in Path(f"/proc/{pid}/fd").glob("*"):
                with suppress(OSError):
                    sockets.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
        return {port for inode, port in _listening() if inode in sockets}

    def are_free(self, ports: set[str]) -> bool:
        return not ports & {port for _, port in _listening()}

    def shared_memory(self, pids: list[int]) -> set[str]:
        """Files of shared memory that any of these processes has mapped."""
        lines = (line for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
        return {line[line.index("/dev/shm/") :] for line in lines if "/dev/shm/" in line}


def _listening() -> Iterator[tuple[str, str]]:
    for version in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{version}").read_text().splitlines()[1:]:
            _, here, _, state, *rest = line.split()
            if state == "0A":
                yield rest[5], here


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
