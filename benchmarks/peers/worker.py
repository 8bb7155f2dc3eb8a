"""The loop that every engine's script runs: load once, then one job per line of stdin, one answer per line of stdout.

Decisions: standard library only, since each engine has an interpreter of its own; whatever an engine prints goes to
stderr, so that answers stay readable. A worker that waits for a line computes nothing.

First line in: settings. Answer: `{"ready": {what the engine says about itself}}`.
Further lines: `{"requests": [{"arrival", "prompt", "max_tokens"}]}`.
Answers: `{"times", "tokens", "peak_memory_bytes"}`, times being seconds from the job's start for each token of each
request; or `{"unsupported": why}`; or `{"error": text}`.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

BEGAN = time.monotonic()


class Unsupported(Exception):
    """This engine cannot do such a job; it is left out, which is no failure."""


class Request(NamedTuple):
    arrival: float  # seconds after the job's start
    prompt: list[int]
    max_tokens: int


class Engine(Protocol):
    about: dict[str, Any]

    def run(self, requests: list[Request]) -> tuple[list[list[float]], list[list[int]]]:
        """Token times and token ids of each request; greedy, exactly `max_tokens` of them."""
        ...


def serve(load: Callable[[dict[str, Any]], Engine]) -> None:
    """:param load: imports the engine and loads the model that `settings["model"]` names."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(what: dict[str, Any]) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    settings = json.loads(sys.stdin.readline())
    try:
        engine = load(settings)
    except Exception as error:
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    answer({"ready": {**engine.about, "import_and_load_s": time.monotonic() - BEGAN}})
    for line in sys.stdin:
        requests = [Request(**one) for one in json.loads(line)["requests"]]
        try:
            times, tokens = engine.run(requests)
            answer({"times": times, "tokens": tokens, "peak_memory_bytes": peak_memory()})
        except Unsupported as why:
            answer({"unsupported": str(why)})
        except Exception as error:
            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {error}"})


def at_once(requests: list[Request], who: str) -> None:
    """:raises Unsupported: `requests` come one after another, or differ in length."""
    if any(one.arrival for one in requests) or len({(len(one.prompt), one.max_tokens) for one in requests}) > 1:
        raise Unsupported(f"{who} runs one batch of equal lengths at a time")


def peak_memory() -> int:
    """The most bytes that this process and its children ever held, added up; 0 where the system does not say."""
    task = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    pids = [os.getpid(), *(int(pid) for pid in (task.read_text().split() if task.exists() else ()))]
    total = 0
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    return total
