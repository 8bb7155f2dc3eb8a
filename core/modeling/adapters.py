"""Adapters: small changes to a model that each request may choose for itself, and what serves them.

Decisions: a plugin serves them. In `transform_model` it sets the `update` of layers and leaves an `Adapters` as
`model.adapters`; the core says which adapter lies in which slot and which slot each row of a computation has, and knows
nothing of what an adapter is. Rows are told at the few places where a computation begins, so that no layer and no
family hands anything on.
"""

from pathlib import Path
from typing import Protocol

from torch import nn

from modelport.batch import Adapted


class Adapter(Protocol):
    """One that was read.

    :ivar path: where its files lie.
    :ivar digest: of all that it changes; cached keys are told apart by it.
    """

    path: Path
    digest: bytes


class Adapters(Protocol):
    """What a plugin leaves as `model.adapters`; it has as many slots as the engine's `max_loras` says."""

    def read(self, path: Path) -> Adapter:
        """Read an adapter and check that it fits the model; nothing else changes. Called by any thread.

        :raises FileNotFoundError: there is none.
        :raises ValueError: it does not fit, or cannot be served.
        """

    def place(self, slot: int, adapter: Adapter) -> bool:
        """Put it into a slot, in place of what was there; called between steps.

        :return: whether something else has moved in memory than what is in the slot, so that no recorded step holds.
        """

    def begin(self, rows: Adapted | int | None) -> None:
        """Whose the rows are of all computations until the next call: a slot for each, one for all, or none."""


def begin(model: object, rows: Adapted | int | None) -> None:
    """Tell the adapters of `model`, if it takes any."""
    adapters = adapters_of(model)
    if adapters is not None:
        adapters.begin(rows)


def adapters_of(model: nn.Module | object) -> Adapters | None:
    """None: the model takes none."""
    return getattr(model, "adapters", None)
