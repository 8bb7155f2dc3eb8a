"""Names of the form "organisation/model", from the Hugging Face hub or its local cache.

Decisions: what the cache holds completely is used without asking the network; the hub is asked once, with a deadline
of a few seconds, before a download starts, so that a machine without network hears so at once; only configuration,
tokenizer and safetensors files are fetched.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from threading import Thread
from typing import NoReturn

from modelport.plugin import hookimpl

modelport_api = 1

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer*", "tokenization_*.py", "*.model", "*.tiktoken", "*.txt"]
_NOT_FILES = ["onnx/*", "original/*", "consolidated*", "*.bin.index.json"]
_DEADLINE = 5.0  # seconds for the hub's first answer


@hookimpl
def resolve_checkpoint(model: str, revision: str | None) -> Path | None:
    if not _NAME.fullmatch(model):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    cached = _cached(model, revision)
    if cached is not None and _missing(cached) is None:
        return cached
    state = "it is not in the local cache" if cached is None else f"the local cache lacks {_missing(cached)}"
    if HF_HUB_OFFLINE:
        _fail(model, revision, f"{state}, and HF_HUB_OFFLINE is set", "unset it")
    _ask(model, revision, state)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_FILES, ignore_patterns=_NOT_FILES))
    except Exception as error:  # the hub's own errors, the network's, a full disk
        _fail(model, revision, f"the download broke off ({_line(error)})", "try again: it goes on where it stopped")


def _cached(model: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model, revision=revision, local_files_only=True, allow_patterns=_FILES, ignore_patterns=_NOT_FILES
            )
        )
    except Exception:  # not there, or, in newer versions, known to be incomplete
        return None


def _missing(folder: Path) -> str | None:
    """A snapshot holds what was once asked for, perhaps the configuration alone."""
    index = folder / "model.safetensors.index.json"
    if not (folder / "config.json").is_file():
        return "config.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        files = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        return next((file for file in sorted(files) if not (folder / file).is_file()), None)
    return None if any(folder.glob("*.safetensors")) else "its weights"


def _ask(model: str, revision: str | None, state: str) -> None:
    """Ask the hub for this model, and raise unless it says yes within the deadline."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(model, revision=revision, timeout=_DEADLINE)
            answer.append(None)
        except Exception as error:
            answer.append(error)

    # A thread, because looking up a host name has no timeout; a daemon, so that it never holds up the exit.
    thread = Thread(target=ask, name="modelport-hub", daemon=True)
    thread.start()
    thread.join(_DEADLINE)
    error = answer[0] if answer else TimeoutError(f"no answer within {_DEADLINE:g} seconds")
    match error:
        case None:
            return
        case GatedRepoError():
            _fail(model, revision, "its owner grants access on request", "request it there, and set HF_TOKEN")
        case RevisionNotFoundError():
            _fail(model, revision, "the hub knows the model but not this revision", "leave it out for the default one")
        case RepositoryNotFoundError():
            _fail(
                model, revision, "the hub knows no such model", "check the spelling, or set HF_TOKEN if it is private"
            )
        case _:
            _fail(model, revision, f"{state}, and asking the hub failed ({_line(error)})", "connect to the network")


def _fail(model: str, revision: str | None, reason: str, cure: str) -> NoReturn:
    at = "" if revision is None else f" at revision {revision!r}"
    raise FileNotFoundError(
        f"model {model!r}{at}: there is no such folder here, and as a name on the Hugging Face hub: {reason}; "
        f"{cure}, or give the path of a local checkpoint"
    ) from None


def _line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
