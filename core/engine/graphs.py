"""A decode step as a CUDA graph: one launch instead of hundreds, with nothing read back.

Decisions: a graph holds for a number of rows and columns of block tables, its bucket; a step that has fewer is filled
up with rows of no sequence, which write nothing and whose logits are cut off. Buckets are captured when they come for
the second time, which costs about two steps, and share one pool of memory. Before a graph is trusted its first replay
has to give what the model gave, as in `recording`; a model that cannot be captured, because it reads numbers from the
device, is left alone from then on.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from modelport.batch import Batch
from modelport.engine.recording import rebuilt

logger = logging.getLogger(__name__)
BUCKETS = (*range(1, 9), *range(12, 32, 4), *range(32, 128, 16), *range(128, 513, 64))
"""Numbers of rows: close together where a row more is a good part of the step."""
LEAST_COLUMNS = 64
_FILL = {"slots": -1}  # of rows of no sequence; 0 for all others
_CLOSE = 2e-2  # of the greatest logit: rounding may differ between a library's first call and its later ones

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


class GraphRecorder:
    """Runs a model's decode steps from graphs where it can; the interface of `recording.Recorder`.

    :param function: (token_ids, batch) -> logits (rows, vocab).
    :param states: tensors (slots, ...) of recurrent layers, which a step reads and changes.
    :param capture: takes a step down and returns what runs it again, into the same output; tests give another one.
    :ivar num_replays: steps that were run from a graph.
    :ivar given_up: why this model is not captured; None while it is.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Batch], Tensor],
        states: Sequence[Tensor] = (),
        capture: Capture | None = None,
    ):
        self.function, self.states = function, states
        self.num_replays = 0
        self.given_up: str | None = None
        self._capture = capture or _Capture()
        self._graphs: dict[tuple, _Graph] = {}
        self._seen: set[tuple] = set()

    def reset(self) -> None:
        """Forget all graphs. To be called when weights were replaced, or layers: graphs use the old ones."""
        self._graphs.clear()
        self._seen.clear()
        self.given_up = None

    def run(self, token_ids: Tensor, batch: Batch) -> Tensor | None:
        """The logits of a step of one token per sequence, every one of them wanted; None when the model is to be run.

        The result is overwritten by the next step.
        """
        rows = len(token_ids)
        if self.given_up is not None or rows > BUCKETS[-1]:
            return None
        given = [("token_ids", token_ids), *_leaves("", batch)]
        key = tuple(_kind(name, leaf, rows) for name, leaf in given)
        tensors = [(name, leaf) for name, leaf in given if isinstance(leaf, Tensor)]
        graph = self._graphs.get(key)
        if graph is not None:
            self.num_replays += 1
            return graph.replay(tensors, rows)
        if key in self._seen:  # what comes once need not come again
            return self._record(key, tensors, batch, rows)
        self._seen.add(key)
        return None

    def _record(self, key: tuple, tensors: list[tuple[str, Tensor]], batch: Batch, rows: int) -> Tensor:
        graph = _Graph(key, tensors)
        graph.fill(tensors, rows)
        slots = batch.state_slots.long()
        before = [state[slots] for state in self.states]
        output = self.function(*graph.step(batch))[:rows].clone()
        after = [state[slots] for state in self.states]
        try:
            # Another record of the same tensors: what layers keep for a step they compute anew, within the graph.
            graph.again = self._capture(lambda: self.function(*graph.step(batch)))
            self._put(slots, before)
            replayed = graph.replay(tensors, rows)
            reason = None if _close(replayed, output) else "a replay gave something else than the model"
        except (RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        self._put(slots, after)
        if reason is None:
            self._graphs[key] = graph
        else:
            logger.warning("decode steps of this model are not captured in CUDA graphs: %s", reason)
            self._graphs.clear()
            self.given_up = reason
        return output

    def _put(self, slots: Tensor, saved: list[Tensor]) -> None:
        for state, values in zip(self.states, saved, strict=True):
            state[slots] = values


class _Capture:
    """Captures on the GPU, all into one pool of memory: graphs never run at the same time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._pool):
            output = function()

        def again() -> Tensor:
            graph.replay()
            return output

        return again


class _Graph:
    """The inputs of a bucket, which stay where they are.

    :ivar again: runs the step on them; returns its logits.
    """

    def __init__(self, key: tuple, tensors: list[tuple[str, Tensor]]):
        shapes = (kind[1] for kind in key if len(kind) == 3)
        self._inputs = [
            torch.full(shape, _FILL.get(name, 0), dtype=leaf.dtype, device=leaf.device)
            for (name, leaf), shape in zip(tensors, shapes, strict=True)
        ]
        self._rows = 0
        self.again: Callable[[], Tensor] | None = None

    def step(self, batch: Batch) -> tuple[Tensor, Batch]:
        """A new record of the inputs."""
        inputs = iter(self._inputs)
        return next(inputs), rebuilt(batch, inputs)

    def fill(self, tensors: list[tuple[str, Tensor]], rows: int) -> None:
        """Put a step's numbers in; behind them, rows of no sequence."""
        for mine, (name, new) in zip(self._inputs, tensors, strict=True):
            if rows != self._rows and mine.shape[0] > new.shape[0]:
                mine[new.shape[0] :] = rows if name == "query_starts" else _FILL.get(name, 0)
            place = mine[: new.shape[0]]
            (place[:, : new.shape[1]] if new.dim() == 2 else place).copy_(new, non_blocking=True)
        self._rows = rows

    def replay(self, tensors: list[tuple[str, Tensor]], rows: int) -> Tensor:
        self.fill(tensors, rows)
        return self.again()[:rows]


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


def _kind(name: str, leaf: Any, rows: int) -> Any:
    """What of an input a graph depends on: for tensors the type and the bucket's shape."""
    if not isinstance(leaf, Tensor):
        return name, leaf
    wide = next(bucket for bucket in BUCKETS if bucket >= rows)
    if leaf.shape[0] == rows + 1 and name == "query_starts":
        shape = (wide + 1,)
    elif leaf.shape[0] == rows:
        columns = [LEAST_COLUMNS << max(0, (n - 1).bit_length() - 6) for n in leaf.shape[1:]]
        shape = (wide, *columns)
    else:
        shape = tuple(leaf.shape)
    return name, shape, leaf.dtype


def _close(a: Tensor, b: Tensor) -> bool:
    a, b = a.float(), b.float()
    return bool(((a - b).abs().max() <= _CLOSE * b.abs().max()) & torch.isfinite(b).all())
