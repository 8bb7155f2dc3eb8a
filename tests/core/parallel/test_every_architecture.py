"""Four places, two stages of two, compute what one does, for every architecture; `modelport check` has two of each."""

import pytest

from modelport.plugin import load_plugins
from modelport.testing.places import divided
from modelport.testing.session import Session


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(load_plugins().architectures))
def test_two_stages_of_two(name: str) -> None:
    with Session(name) as session:
        found = divided(session._subject(""), tensor=2, pipeline=2)
    assert found.worst <= found.limit
