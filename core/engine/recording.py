"""A decode step taken down once and done again without Python: on a processor what a CUDA graph is on a GPU.

Decisions: the model is watched from outside, so every family is served and none knows. Calls of compiled kernels go on
a native tape (`kernels/cpu/tape.h`), torch operations between them are kept with their arguments; what only allocates
or views memory needs nothing again. Results lie in one piece of memory, where a place is free for others as soon as
the model lets go of what is there: a replay does everything in the same order, so it holds then as well. A model whose
computation depends on numbers read out of tensors cannot be recorded and is left alone from then on. And since not
everything can be seen from outside, a recording is trusted only after a replay on other data gave, bit by bit, what the
model gave.
"""

from __future__ import annotations

import bisect
import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from modelport.batch import Batch
from modelport.engine.buckets import Buckets, Inputs, Step, put_states, save_states
from modelport.engine.memory import zeros
from modelport.kernels import cpu

logger = logging.getLogger(__name__)
State = Tensor | tuple[Tensor, ...]
BUCKETS = Buckets((*range(1, 9), *range(10, 16, 2), *range(16, 64, 4), *range(64, 129, 8)), columns=256)
"""For steps of one token per sequence. With more than 128 the kernels take so long that Python's part is small."""
PROMPTS = Buckets((), columns=256, seqs=(8, 64, 256), full=128)
"""For all others."""
LONG = 0.5
"""Seconds of a step that is not worth a recording, since a proof costs as much and Python's part is small."""
MOST_BYTES = 64 << 20
"""Of memory for all that a step has at one time; steps that need more are not recorded."""
_MOST_RECORDINGS = 64  # the one that was not used for longest goes first
_MOST_SEEN = 256
_NO_BOUND = 2**62
_ALIGNMENT = 64
_ALLOCATIONS = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
_MEMORY_MOVES = {"resize_", "resize_as_", "set_"}
# They read a tensor, or let somebody read it, where no dispatcher sees it.
_READS = {"__array__", "__dlpack__", "data_ptr", "numpy", "storage", "tolist", "untyped_storage"}


class Recorder:
    """Runs steps of a model, from recordings where it can.

    :param function: what is recorded: (token_ids, batch) -> a tensor with a row for each row, or a tuple of such.
    :param states: tensors (slots, ...) of recurrent layers, which a step reads and changes.
    :param buckets: the steps that are recorded.
    :param memory: of another recorder, to be shared: a result is then overwritten by that one's next step as well.
    :ivar num_replays: steps that were run from a recording.
    :ivar given_up: why this model is not recorded; None while it is.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Batch], State],
        states: Sequence[Tensor] = (),
        buckets: Buckets | None = None,
        memory: Tensor | None = None,
    ):
        self.function, self.states, self._buckets = function, states, buckets or BUCKETS
        self.num_replays = 0
        self.given_up: str | None = None
        self._recordings: OrderedDict[tuple, _Recording] = OrderedDict()
        self._seen: OrderedDict[tuple, None] = OrderedDict()
        self._most_rows = _NO_BOUND
        self.memory = _room() if memory is None else memory

    def reset(self) -> None:
        """Forget all recordings. To be called when weights were replaced, or layers: recordings use the old ones."""
        self._recordings.clear()
        self._seen.clear()
        self.given_up = None

    def run(self, token_ids: Tensor, batch: Batch) -> State | None:
        """What the function gives; None when it is to be called.

        The result is overwritten by the next step.

        :raises ValueError: an index in `batch` leads outside its tensor, as the model's own kernels would say.
        """
        if self.given_up is not None or len(token_ids) > self._most_rows:
            return None
        step = self._buckets.of(token_ids, batch)
        if step is None:
            return None
        key = (cpu.threads(), step.key)
        recording = self._recordings.get(key)
        if recording is not None:
            self._recordings.move_to_end(key)
            if not recording.proved:
                return self._prove(recording, step)
            self.num_replays += 1
            return recording.replay(step)
        if key in self._seen:  # what comes once need not come again
            return self._record(key, step)
        self._seen[key] = None
        if len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        if step.is_whole:
            return None
        # What a layer makes once for these sizes and keeps has to be there before: others use a recording's memory.
        began = time.monotonic()
        output = _first(self.function(*Inputs(step).record()), step.rows)
        if time.monotonic() - began > LONG:
            del self._seen[key]
        return output

    def _record(self, key: tuple, step: Step) -> State:
        inputs = Inputs(step)
        record = inputs.record()
        watch, tape = _Watch(self.memory), cpu.lib.record(self.memory)
        try:
            with watch, _Guard(watch):
                output = self.function(*record)
            parts = watch.parts(tape)
        finally:
            cpu.lib.stop()
        if watch.objection is not None:
            self._give_up(watch.objection)
        elif watch.is_full:
            self._most_rows = step.rows - 1
        else:
            self._recordings[key] = _Recording(inputs, tree_map(watch.unowned, output), parts)
            if len(self._recordings) > _MOST_RECORDINGS:
                self._recordings.popitem(last=False)
        return _first(output, step.rows)

    def _prove(self, recording: _Recording, step: Step) -> State:
        """Replay, then run the model on the same data: keys are written twice, recurrent states put back in between."""
        saved, difference = save_states(self.states, step.batch), "a replay gave something else than the model"
        try:
            replayed = tree_map(torch.clone, recording.replay(step))
        except Exception as error:
            replayed, difference = None, f"a replay failed: {error}"
        put_states(self.states, saved)
        output = _first(self.function(*recording.inputs.record()), step.rows)
        recording.proved = replayed is not None and _same_bits(replayed, output)
        if not recording.proved:
            self._give_up(difference)
        return output

    def _give_up(self, reason: str) -> None:
        logger.debug("steps of this model are not recorded: %s", reason)
        self._recordings.clear()
        self.given_up = reason


class _Recording:
    """One step: its inputs, the calls, and where its output will be.

    :ivar proved: whether a replay was seen to give what the model gives.
    """

    def __init__(self, inputs: Inputs, output: State, parts: list[Callable[[], None]]):
        self.inputs, self._output, self._parts = inputs, output, parts
        self.proved = False

    def replay(self, step: Step) -> State:
        self.inputs.fill(step)
        for part in self._parts:
            part()
        return _first(self._output, step.rows)


class _Slot(np.ndarray):
    """A piece of memory that a tensor owns: it dies with the last one that looks at it."""


class _Room:
    """Which places of a piece of memory are free: the lowest that is large enough is taken."""

    def __init__(self, memory: Tensor):
        self._bytes = memory.numpy()
        self._holes = [(0, len(memory))]  # start and end, in order, never touching

    def take(self, nbytes: int) -> _Slot | None:
        """None when there is no room."""
        size = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        for i, (start, end) in enumerate(self._holes):
            if end - start >= size:
                self._holes[i : i + 1] = [(start + size, end)] if start + size < end else []
                slot = self._bytes[start : start + nbytes].view(_Slot)
                weakref.finalize(slot, self._give, start, start + size).atexit = False
                return slot
        return None

    def _give(self, start: int, end: int) -> None:
        i = bisect.bisect(self._holes, (start, end))
        if i < len(self._holes) and self._holes[i][0] == end:
            end = self._holes.pop(i)[1]
        if i and self._holes[i - 1][1] == start:
            i -= 1
            start = self._holes.pop(i)[0]
        self._holes.insert(i, (start, end))


class _Watch(TorchDispatchMode):
    """Takes down torch operations as they happen.

    :param memory: (bytes,) uint8, where results go.
    :ivar objection: why this cannot be replayed.
    :ivar is_full: whether the memory was too small; the step was done right, but cannot be replayed either.
    """

    def __init__(self, memory: Tensor):
        super().__init__()
        self.objection: str | None = None
        self.is_full = False
        self._memory, self._room = memory, _Room(memory)
        self._operations: list[tuple[int, Callable[[], None]]] = []  # and how many kernels were called before

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else the first recording imports torch's compiler, which takes seconds."""
        return False

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        records = self.objection is None and not self.is_full
        if records and operation.overloadpacket.__name__ in _ALLOCATIONS:  # by far the most
            return self._placed(operation(*args, **kwargs))
        with self:  # operations that consist of others may hide what cannot be replayed
            result = operation.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = operation(*args, **kwargs)
        return self._take(operation, args, kwargs, result) if records else result

    def parts(self, tape: object) -> list[Callable[[], None]]:
        """All there is to do at a replay, in order; called before the tape is stopped."""
        made, done = [], 0
        for before, again in [*self._operations, (cpu.lib.recorded(), None)]:
            if before > done:
                made.append(partial(cpu.lib.replay, tape, done, before))
            if again is not None:
                made.append(again)
            done = before
        return made

    def _take(self, operation: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any], result: Any) -> Any:
        """Note what is to be done again; the result, moved to where it stays."""
        name = operation.overloadpacket.__name__
        if name == "detach_":  # part of torch.tensor(); there is nothing to detach from
            return result
        results, form = tree_flatten(result)
        self.objection = _objection(operation, args, results)
        if self.objection is not None:
            return result
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        fresh = [i for i, leaf in enumerate(results) if leaf is not None and _storage(leaf) not in given]
        for i in fresh:
            results[i] = self._placed(results[i]).copy_(results[i])
        if fresh or any(a.alias_info is not None and a.alias_info.is_write for a in operation._schema.arguments):
            args, kwargs = tree_map(self.unowned, (args, kwargs))
            again = partial(_again, partial(operation, *args, **kwargs), [(i, self.unowned(results[i])) for i in fresh])
            self._operations.append((cpu.lib.recorded(), again))
        return tree_unflatten(results, form) if fresh else result

    def unowned(self, value: Any) -> Any:
        """A tensor of the recording's memory as one that does not keep its place; anything else as it is."""
        if not isinstance(value, Tensor) or not value.numel():
            return value
        start = value.data_ptr() - self._memory.data_ptr()
        return self._view(self._memory[start:], value) if 0 <= start < len(self._memory) else value

    def _placed(self, tensor: Tensor) -> Tensor:
        """One like it in the recording's memory."""
        if not tensor.numel():
            return tensor
        slot = self._room.take(_extent(tensor))
        if slot is None:
            self.is_full = True
            return tensor
        return self._view(torch.from_numpy(slot), tensor)

    def _view(self, memory: Tensor, like: Tensor) -> Tensor:
        """The beginning of `memory` as a tensor like another one."""
        room = memory[: _extent(like)].view(like.dtype)
        return room.as_strided(like.shape, like.stride(), room.storage_offset())


class _Guard(TorchFunctionMode):
    """Objects to what reads tensors behind the dispatcher's back."""

    def __init__(self, watch: _Watch):
        super().__init__()
        self._watch = watch

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in _READS:
            self._watch.objection = self._watch.objection or f"{name} reads a tensor"
        return function(*args, **(kwargs or {}))


def _objection(operation: torch._ops.OpOverload, args: tuple, results: list) -> str | None:
    """Why the operation's effect may be another one, or elsewhere, next time."""
    name, tags = operation.overloadpacket.__name__, operation.tags
    if any(leaf is not None and not isinstance(leaf, Tensor) for leaf in results):
        return f"{operation} makes a number of a tensor"
    if torch.Tag.data_dependent_output in tags:
        return f"{operation} makes a number of a tensor"
    if torch.Tag.nondeterministic_seeded in tags:
        return f"{operation} is random"
    if torch.Tag.inplace_view in tags or name in _MEMORY_MOVES:
        return f"{operation} changes a tensor's shape or memory"
    if torch.Tag.dynamic_output_shape in tags:
        masks = [leaf for leaf in tree_leaves(args[1:]) if isinstance(leaf, Tensor) and leaf.dtype.itemsize == 1]
        if name != "index" or masks:  # places are fine
            return f"{operation} gives as many elements as the data wants"
    return None


def _again(operation: Callable[[], Any], places: list[tuple[int, Tensor]]) -> None:
    """Do it, and put what is new where it was."""
    results = tree_leaves(operation())
    for i, place in places:
        assert results[i].shape == place.shape, (operation, results[i].shape, place.shape)
        place.copy_(results[i])


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _extent(tensor: Tensor) -> int:
    """Bytes from its first element to its last."""
    places = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return places * tensor.itemsize


def _room() -> Tensor:
    """Memory for recordings: (MOST_BYTES,) uint8, which is not there until it is written."""
    memory = zeros((MOST_BYTES + _ALIGNMENT,), torch.uint8, torch.device("cpu"))
    return memory[-memory.data_ptr() % _ALIGNMENT :][:MOST_BYTES]


def _first(state: State, rows: int) -> State:
    return tree_map(lambda part: part[:rows], state)


def _same_bits(a: State, b: State) -> bool:
    pairs = list(zip(tree_leaves(a), tree_leaves(b), strict=True))
    return all(x.shape == y.shape and x.dtype == y.dtype for x, y in pairs) and all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)) for x, y in pairs
    )
