"""Four places, two stages of two, compute what one does, for every architecture; `modelport check` has two of each."""

from pathlib import Path

import pytest

from modelport.plugin import load_plugins
from modelport.testing.places import divided
from modelport.testing.reference import GoldenReference
from modelport.testing.session import Session

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
