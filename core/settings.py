"""What a user set, checked: the one way from keyword arguments to an `EngineConfig`. Imports no torch."""

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from modelport.config import EngineConfig


def engine_config(model: str, settings: Mapping[str, Any]) -> EngineConfig:
    """:raises ValueError: an unknown setting (with its near misses) or a value that does not fit."""
    for name in settings:
        if name not in EngineConfig.model_fields:
            close = difflib.get_close_matches(name, EngineConfig.model_fields, n=1)
            raise ValueError(f"unknown setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    try:
        return EngineConfig(model=model, **settings)
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors())
        raise ValueError(f"bad setting: {details}") from None
