"""The conformance kit: what proves an architecture right, as a library call, a pytest plugin and `modelport check`.

Decision: names are resolved on first use, so that neither `import modelport.testing` nor a run of pytest that does not
use the kit imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelport.testing.prompts import Prompt as Prompt
    from modelport.testing.pytest_plugin import conformance_tests as conformance_tests
    from modelport.testing.reference import ModuleReference as ModuleReference
    from modelport.testing.report import Check as Check
    from modelport.testing.report import Report as Report
    from modelport.testing.session import check as check

_HOMES = {
    "check": "session",
    "conformance_tests": "pytest_plugin",
    "Check": "report",
    "Report": "report",
    "Prompt": "prompts",
    "ModuleReference": "reference",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'modelport.testing' has no attribute {name!r}")
    return getattr(import_module(f"modelport.testing.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
