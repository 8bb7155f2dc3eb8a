"""Shared by all tests: nothing here reaches for a network, and no test sees another one's plugin settings."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub, which reads it once
if os.environ.get("MODELPORT_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before any import of triton, which other tests bring about


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODELPORT_PLUGINS", raising=False)
    monkeypatch.delenv("MODELPORT_TRACEBACK", raising=False)
