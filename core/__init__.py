"""modelport: run any transformer model fast; every model is a plugin.

Names are resolved on first use, so that `import modelport` imports neither torch nor anything else heavy.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
API_VERSION = 1
"""Major version of the plugin contract; a plugin module declares the one it was written for as `modelport_api`."""

# torch's OpenMP threads spin for milliseconds after each of its operations, on processors that our kernels' threads
# need; a short spin costs torch next to nothing. Read once, when torch is imported; a value that is set stays.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:
    from modelport.config import EngineConfig as EngineConfig
    from modelport.llm import LLM as LLM
    from modelport.llm import AsyncLLM as AsyncLLM
    from modelport.plugin import Architecture as Architecture
    from modelport.plugin import hookimpl as hookimpl
    from modelport.request import LoRARequest as LoRARequest
    from modelport.request import RequestOutput as RequestOutput
    from modelport.sampling_params import SamplingParams as SamplingParams

_HOMES = {
    "LLM": "modelport.llm",
    "AsyncLLM": "modelport.llm",
    "EngineConfig": "modelport.config",
    "SamplingParams": "modelport.sampling_params",
    "RequestOutput": "modelport.request",
    "LoRARequest": "modelport.request",
    "Architecture": "modelport.plugin",
    "hookimpl": "modelport.plugin",
}
__all__ = ["API_VERSION", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'modelport' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
