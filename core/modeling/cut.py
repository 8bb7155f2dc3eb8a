"""What of a checkpoint's tensor one place keeps, when several divide a layer.

Decisions: whoever divides a module leaves `module.cuts`, a `Cut` for each parameter of which only a part is here; the
loader reads it and copies that part alone; of a file mapped into memory it touches no other. Dimensions are counted
from the end, since a part of a stacked layer lacks the first ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn


class Piece(NamedTuple):
    """`size` rows from `start` on, of `whole`."""

    start: int
    size: int
    whole: int


@dataclass(frozen=True)
class Cut:
    """The pieces of a parameter that are here.

    :ivar dim: which dimension is divided; negative.
    :ivar whole_parts: a part is here as a whole or not at all, as with experts that lie on different places.
    :ivar pieces: of each of the parameter's parts in order, in turn where there are more parts than pieces (experts).
    """

    dim: int
    pieces: tuple[Piece, ...]
    whole_parts: bool = False

    def of(self, part: int | None) -> tuple[Piece, ...]:
        """Pieces of the tensor that is one part, or of the one that is all of them, one behind the other."""
        if part is not None:
            return (self.pieces[part % len(self.pieces)],)
        found, before, whole = [], 0, sum(piece.whole for piece in self.pieces)
        for piece in self.pieces:
            found.append(Piece(before + piece.start, piece.size, whole))
            before += piece.whole
        return tuple(found)

    def full(self, shape: tuple[int, ...], part: int | None) -> tuple[int, ...]:
        """The shape that a tensor has in the checkpoint whose `shape` it is here."""
        sizes = list(shape)
        sizes[self.dim] = self.of(part)[0].whole
        return tuple(sizes)

    def views(self, here: Tensor, tensor: Tensor, part: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of views, where to copy to and from: of what is `here`, and of the checkpoint's whole tensor."""
        at = 0
        for start, size, _ in self.of(part):
            yield here.narrow(self.dim, at, size), tensor.narrow(self.dim, start, size)
            at += size


def cut_of(module: nn.Module, parameter: str) -> Cut | None:
    """None: all of it is here."""
    cuts: dict[str, Cut] = getattr(module, "cuts", {})
    return cuts.get(parameter)
