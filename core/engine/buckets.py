"""The inputs of a step that is taken down once and done again: tensors that stay where they are, for several steps.

Decisions: what is taken down holds for a number of rows, of sequences and of columns of block tables, its bucket. A
step that has fewer is filled up with rows and sequences of nobody, which write nothing and whose results are cut off,
so that few recordings serve all batches. A row of nobody costs as much as any other, so buckets of new tokens are close
together; a sequence without rows costs nothing, but steps with prompts have their own number of rows each, and only
those that are full come again: what a step may have is a round number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from modelport.batch import Batch

_FILL = {"slots": -1}  # of rows of no sequence; 0 for all others


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Ascending numbers each.

    :ivar rows: of steps of one token per sequence.
    :ivar columns: of the narrowest tables; wider ones have twice as many, and so on.
    :ivar seqs: sequences of other steps.
    :ivar full: the rows of these are a multiple of it.
    """

    rows: tuple[int, ...]
    columns: int
    seqs: tuple[int, ...] = ()
    full: int = 1

    def of(self, token_ids: Tensor, batch: Batch) -> Step | None:
        """A step as its bucket sees it; None when there is none."""
        rows, seqs = len(token_ids), len(batch.seq_lens)
        crosses = batch.encoded is not None and batch.encoded.rows is not None
        sees_media = crosses or batch.media is not None  # such rows cannot be filled up
        given_batch, widths = batch, self.rows if rows == seqs else self.seqs
        if not widths or seqs > widths[-1]:
            return None
        if rows != seqs:
            if rows % self.full or sees_media or batch.encoded is not None or batch.ends is not None:
                return None
            batch = dataclasses.replace(batch, max_query_len=rows)  # at most; another number would be another bucket
        wide = seqs if sees_media else next(n for n in widths if n >= seqs)
        given = [("token_ids", token_ids), *_leaves("", batch)]
        key = tuple(_kind(name, leaf, seqs, wide, self.columns) for name, leaf in given)
        tensors = tuple((name, leaf) for name, leaf in given if isinstance(leaf, Tensor))
        return Step(key, batch, tensors, rows, seqs, sees_media, wide == seqs and batch is given_batch)


@dataclasses.dataclass(frozen=True)
class Step:
    """:ivar key: all that a recording depends on. :ivar tensors: with the names of their fields.

    :ivar rows: without those of nobody. :ivar seqs: likewise.
    :ivar is_whole: nothing was added or changed.
    """

    key: tuple
    batch: Batch
    tensors: tuple[tuple[str, Tensor], ...]
    rows: int
    seqs: int
    sees_media: bool
    is_whole: bool


class Inputs:
    """A bucket's own tensors, with the numbers of the step that was put in last."""

    def __init__(self, step: Step):
        shapes = (kind[1] for kind in step.key if len(kind) == 3)
        self._tensors = [
            torch.full(shape, _FILL.get(name, 0), dtype=leaf.dtype, device=leaf.device)
            for (name, leaf), shape in zip(step.tensors, shapes, strict=True)
        ]
        self._batch, self._seqs = _rebuilt(step.batch, iter(self._tensors[1:])), 0
        self.fill(step)

    def record(self) -> tuple[Tensor, Batch]:
        """A new record of the tensors: what layers keep for a step is computed anew."""
        return self._tensors[0], dataclasses.replace(self._batch)

    def fill(self, step: Step) -> None:
        """Put a step's numbers in; behind them, rows and sequences of nobody."""
        for mine, (name, new) in zip(self._tensors, step.tensors, strict=True):
            if step.seqs != self._seqs and mine.shape[0] > new.shape[0]:
                mine[new.shape[0] :] = step.rows if name == "query_starts" else _FILL.get(name, 0)
            place = mine[: new.shape[0]]
            (place[:, : new.shape[1]] if new.dim() == 2 else place).copy_(new, non_blocking=True)
        self._seqs = step.seqs


Saved = tuple[Tensor, list[Tensor]]


def save_states(states: Sequence[Tensor], batch: Batch) -> Saved:
    """What the sequences of `batch` have in tensors (slots, ...), for doing a step twice."""
    slots = batch.state_slots.long()
    return slots, [state[slots] for state in states]


def put_states(states: Sequence[Tensor], saved: Saved) -> None:
    """Put back what was saved."""
    for state, values in zip(states, saved[1], strict=True):
        state[saved[0]] = values


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What the batch is made of, in order, with the names of the fields."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _leaves(field.name, getattr(value, field.name))
    elif isinstance(value, tuple):
        for part in value:
            yield from _leaves(name, part)
    else:
        yield name, value


def _rebuilt(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same with other tensors."""
    if isinstance(value, Tensor):
        return next(tensors)
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return type(value)(**{name: _rebuilt(getattr(value, name), tensors) for name in names})
    if isinstance(value, tuple):
        return tuple(_rebuilt(part, tensors) for part in value)
    return value


def _kind(name: str, leaf: Any, seqs: int, wide: int, columns: int) -> tuple:
    """What of an input a recording depends on: for tensors the bucket's shape and the type."""
    if not isinstance(leaf, Tensor):
        return name, leaf
    shape = tuple(leaf.shape)
    if leaf.dim() == 2 and not leaf.is_floating_point():  # a block table, whose rows are read as far as they are filled
        shape = (shape[0], columns << max(0, (shape[1] - 1) // columns).bit_length())
    if name == "query_starts" and shape[0] == seqs + 1:
        shape = (wide + 1,)
    elif shape[0] == seqs:
        shape = (wide, *shape[1:])
    return name, shape, leaf.dtype
