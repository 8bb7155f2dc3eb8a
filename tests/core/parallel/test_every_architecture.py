"""Four places, two stages of two, compute what one does, for every architecture; `modelport check` has two of each."""

from pathlib import Path

import pytest

from modelport.plugin import load_plugins
from modelport.testing.places import divided
from modelport.testing.reference import LOGITS_LIMIT, GoldenReference
from modelport.testing.session import Session
from modelport.testing.subject import difference

GOLDENS = Path(__file__).parents[2] / "goldens"


def golden(name: str) -> Path | None:
    """Recorded outputs, for an architecture of which there is nothing else."""
    if load_plugins().architectures[name].tiny:
        return None
    folders = (file.parent for file in sorted(GOLDENS.glob("*/golden.json")))
    return next(f for f in folders if name in GoldenReference(f).architectures(load_plugins()))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(load_plugins().architectures))
def test_two_stages_of_two(name: str) -> None:
    with Session(name, golden=golden(name)) as session:
        found = divided(session._subject(""), tensor=2, pipeline=2)
    assert found.worst <= found.limit


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, a in sorted(load_plugins().architectures.items()) if "expert" in str(a.tiny)]
)
def test_experts_on_different_places(name: str) -> None:
    with Session(name) as session:
        subject = session._subject("")
        settings = {"tensor_parallel_size": 2, "enable_expert_parallel": True, "executor": "inproc"}
        notes = subject.llm(**settings)._front.engine.runner.describe()
        assert any(note.divided and note.how.endswith(" experts") for note in notes)
        base = subject.baseline[-2:]
        found = subject.alone([c.prompt for c in base], **settings)
        assert max(difference(c, f) for c, f in zip(base, found, strict=True)) <= LOGITS_LIMIT
