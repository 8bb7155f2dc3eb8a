"""A decode step as a CUDA graph: one launch instead of hundreds, with nothing read back.

Decisions: graphs hold for a bucket (`buckets`), are captured when it comes for the second time, which costs about two
steps, and share one pool of memory. Before a graph is trusted its first replay has to give what the model gave, as in
`recording`; a model that cannot be captured, because it reads numbers from the device, is left alone from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from modelport.batch import Batch
from modelport.engine.buckets import Buckets, Inputs, Step, put_states, save_states

logger = logging.getLogger(__name__)
BUCKETS = Buckets((*range(1, 9), *range(12, 32, 4), *range(32, 128, 16), *range(128, 513, 64)), columns=64)
"""Numbers of rows: close together where a row more is a good part of the step."""
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
        self._graphs: dict[tuple, tuple[Inputs, Callable[[], Tensor]]] = {}
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
        step = None if self.given_up is not None else BUCKETS.of(token_ids, batch)
        if step is None or step.sees_media:
            return None
        if step.key in self._graphs:
            inputs, again = self._graphs[step.key]
            inputs.fill(step)
            self.num_replays += 1
            return again()[: step.rows]
        if step.key in self._seen:  # what comes once need not come again
            return self._record(step)
        self._seen.add(step.key)
        return None

    def _record(self, step: Step) -> Tensor:
        inputs = Inputs(step)
        before = save_states(self.states, step.batch)
        output = self.function(*inputs.record())[: step.rows].clone()
        after = save_states(self.states, step.batch)
        try:
            again = self._capture(lambda: self.function(*inputs.record()))
            put_states(self.states, before)
            replayed = again()[: step.rows]
            reason = None if _close(replayed, output) else "a replay gave something else than the model"
        except (RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        put_states(self.states, after)
        if reason is None:
            self._graphs[step.key] = inputs, again
        else:
            logger.warning("decode steps of this model are not captured in CUDA graphs: %s", reason)
            self._graphs.clear()
            self.given_up = reason
        return output


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


def _close(a: Tensor, b: Tensor) -> bool:
    a, b = a.float(), b.float()
    return bool(((a - b).abs().max() <= _CLOSE * b.abs().max()) & torch.isfinite(b).all())
