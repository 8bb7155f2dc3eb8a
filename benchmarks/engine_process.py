"""One engine in a process and an interpreter of its own, asked over pipes; the other end is `peers/worker.py`."""

import json
import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelport.cli import measure


@dataclass
class EngineProcess:
    """An engine and how to start it. `start` may be called again after `stop`, to measure starting."""

    name: str
    python: str
    script: Path
    settings: dict[str, Any]
    environment: dict[str, str]
    log: Path
    about: dict[str, Any] = field(default_factory=dict)
    process: subprocess.Popen | None = None

    def start(self, work: list[measure.Work]) -> dict[str, float]:
        """Seconds from a new process to a loaded model, and to the first token of `work`.

        :raises RuntimeError: the engine does not start; its log says more.
        """
        began = time.monotonic()
        self.process = subprocess.Popen(
            [self.python, str(self.script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=self.log.open("a"), env={**os.environ, **self.environment},
        )  # fmt: skip
        self.about = self._ask(self.settings)["ready"]
        loaded = time.monotonic() - began
        times, _ = self.run(work)
        asked = max(stamps[-1] for stamps in times)
        return {"load_s": loaded, "first_token_s": loaded + asked, "total_s": time.monotonic() - began}

    def run(self, work: list[measure.Work]) -> tuple[list[list[float]], list[list[int]]]:
        answer = self._ask({"requests": [vars(one) for one in work]})
        self.about["peak_memory_bytes"] = answer["peak_memory_bytes"]
        return answer["times"], answer["tokens"]

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": "its process ended"}
        if "unsupported" in answer:
            raise NotImplementedError(answer["unsupported"])
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def stop(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None
