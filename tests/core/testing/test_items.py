"""The checks of media pass for a sound model, and each finds the fault that it is there for."""

import importlib.util
import sys
from pathlib import Path

import pytest

from modelport.testing import check

spec = importlib.util.spec_from_file_location("hearing", Path(__file__).with_name("hearing.py"))
hearing = importlib.util.module_from_spec(spec)
sys.modules["hearing"] = hearing
spec.loader.exec_module(hearing)

CHECKS = ("media", "several_items", "embedded_items", "kept_items", "refused_items")


def test_a_model_that_hears_passes() -> None:
    report = check(hearing.hearing(), only=CHECKS)
    assert {found.name: found.status for found in report.checks} == dict.fromkeys(CHECKS, "passed"), report
    assert "audio" in report["media"].detail


@pytest.mark.parametrize(
    ("changes", "fails", "said"),
    [
        ({"model": hearing.Tired}, "kept_items", ""),
        ({"inputs": hearing.Short}, "embedded_items", ""),
        ({"inputs": hearing.Lenient}, "refused_items", "two for one placeholder: it was not refused"),
        ({"inputs": hearing.Unsorted}, "several_items", ""),
        ({"inputs": hearing.Restless}, "kept_items", "encoded again"),
    ],
    ids=lambda value: next(iter(value.values())).__name__ if isinstance(value, dict) else "",
)
def test_the_check_that_is_meant_for_a_fault_fails(changes: dict, fails: str, said: str) -> None:
    found = check(hearing.hearing(**changes), only=fails)[fails]
    assert found.status == "failed", found
    assert said in found.detail
