"""A decode step taken down once and done again without Python: on a processor what a CUDA graph is on a GPU.

Decisions: the model is watched from outside, so every family is served and none knows. Calls of compiled kernels go on
a native tape (`kernels/cpu/tape.h`), torch operations between them are kept with their arguments; what only allocates
or views memory needs nothing again. All tensors of a recording stay where they are, so it holds for one number of rows.
A model whose computation depends on numbers read out of tensors cannot be recorded and is left alone from then on. And
since not everything can be seen from outside, a recording is trusted only after a replay on other data gave, bit by
bit, what the model gave.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from modelport.batch import Batch
from modelport.engine.memory import zeros
from modelport.kernels import cpu

logger = logging.getLogger(__name__)
MOST_ROWS = 32
"""More rows are not recorded: the kernels take so long then that Python's part is small."""
MOST_BYTES = 64 << 20
"""Of memory for all that a step computes; steps that need more are not recorded."""
_MOST_RECORDINGS = 64  # the one that was not used for longest goes first
_MOST_SEEN = 256
_ALIGNMENT = 64
_ALLOCATIONS = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
_MEMORY_MOVES = {"resize_", "resize_as_", "set_"}
# They read a tensor, or let somebody read it, where no dispatcher sees it.
_READS = {"__array__", "__dlpack__", "data_ptr", "numpy", "storage", "tolist", "untyped_storage"}


class Recorder:
    """Runs a model's decode steps, from recordings where it can.

    :param function: (token_ids, batch) -> logits (rows, vocab); what is recorded.
    :param states: tensors (slots, ...) of recurrent layers, which a step reads and changes.
    :ivar num_replays: steps that were run from a recording.
    :ivar given_up: why this model is not recorded; None while it is.
    """

    def __init__(self, function: Callable[[Tensor, Batch], Tensor], states: Sequence[Tensor] = ()):
        self.function, self.states = function, states
        self.num_replays = 0
        self.given_up: str | None = None
        self._recordings: OrderedDict[tuple, _Recording] = OrderedDict()
        self._seen: OrderedDict[tuple, None] = OrderedDict()
        self._most_rows = MOST_ROWS
        self._memory = zeros((MOST_BYTES,), torch.uint8, torch.device("cpu"))  # not there until it is written

    def reset(self) -> None:
        """Forget all recordings. To be called when weights were replaced, or layers: recordings use the old ones."""
        self._recordings.clear()
        self._seen.clear()
        self.given_up = None

    def run(self, token_ids: Tensor, batch: Batch) -> Tensor | None:
        """The logits of a step of one token per sequence, every one of them wanted; None when the model is to be run.

        The result is overwritten by the next step.

        :raises ValueError: an index in `batch` leads outside its tensor, as the model's own kernels would say.
        """
        if self.given_up is not None or len(token_ids) > self._most_rows:
            return None
        leaves = [token_ids, *_leaves(batch)]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = (cpu.threads(), *(_kind(leaf) for leaf in leaves))
        recording = self._recordings.get(key)
        if recording is not None and recording.fits(tensors):
            self._recordings.move_to_end(key)
            if not recording.proved:
                return self._prove(recording, tensors, token_ids, batch)
            self.num_replays += 1
            return recording.replay(tensors)
        if key in self._seen:  # what comes once need not come again
            return self._record(key, tensors, token_ids, batch)
        self._seen[key] = None
        if len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)
        return None

    def _record(self, key: tuple, tensors: list[Tensor], token_ids: Tensor, batch: Batch) -> Tensor:
        inputs = [_with_room(tensor) for tensor in tensors]
        fixed = iter(inputs)
        static_ids, static_batch = next(fixed), rebuilt(batch, fixed)
        watch, tape = _Watch(self._memory), cpu.lib.record()
        try:
            with watch, _Guard(watch):
                output = self.function(static_ids, static_batch)
            parts = watch.parts(tape)
        finally:
            cpu.lib.stop()
        if watch.objection is not None:
            self._give_up(watch.objection)
        elif watch.is_full:
            self._most_rows = len(token_ids) - 1
        else:
            self._recordings[key] = _Recording(inputs, output, parts)
            self._recordings.move_to_end(key)
            if len(self._recordings) > _MOST_RECORDINGS:
                self._recordings.popitem(last=False)
        return output

    def _prove(self, recording: _Recording, tensors: list[Tensor], token_ids: Tensor, batch: Batch) -> Tensor:
        """Replay, then run the model on the same data: keys are written twice, recurrent states put back in between."""
        rows = batch.state_slots.long()
        saved = [state[rows] for state in self.states]
        difference = "a replay gave something else than the model"
        try:
            replayed = recording.replay(tensors).clone()
        except Exception as error:
            replayed, difference = None, f"a replay failed: {error}"
        for state, before in zip(self.states, saved, strict=True):
            state[rows] = before
        output = self.function(token_ids, batch)
        recording.proved = replayed is not None and _same_bits(replayed, output)
        if not recording.proved:
            self._give_up(difference)
        return output

    def _give_up(self, reason: str) -> None:
        logger.debug("decode steps of this model are not recorded: %s", reason)
        self._recordings.clear()
        self.given_up = reason


class _Recording:
    """One step: where its inputs go, the calls, and where its output will be.

    :ivar proved: whether a replay was seen to give what the model gives.
    """

    def __init__(self, inputs: list[Tensor], output: Tensor, parts: list[Callable[[], None]]):
        self.inputs, self.output, self._parts = inputs, output, parts
        self.proved = False

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether there is room for as many columns."""
        return all(
            mine.dim() != 2 or mine.shape[1] >= new.shape[1] for mine, new in zip(self.inputs, tensors, strict=True)
        )

    def replay(self, tensors: Sequence[Tensor]) -> Tensor:
        for mine, new in zip(self.inputs, tensors, strict=True):
            (mine[:, : new.shape[1]] if _is_table(new) else mine).copy_(new)
        for part in self._parts:
            part()
        return self.output


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
        self._memory, self._used = memory, 0
        self._operations: list[tuple[int, Callable[[], None]]] = []  # and how many kernels were called before

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else the first recording imports torch's compiler, which takes seconds."""
        return False

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # operations that consist of others may hide what cannot be replayed
            result = operation.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = operation(*args, **kwargs)
        if self.objection is not None or self.is_full:
            return result
        return self._take(operation, args, kwargs, result)

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
        if name in _ALLOCATIONS:
            return self._placed(result)
        for i in fresh:
            results[i] = self._placed(results[i]).copy_(results[i])
        if fresh or any(a.alias_info is not None and a.alias_info.is_write for a in operation._schema.arguments):
            again = partial(_again, partial(operation, *args, **kwargs), [(i, results[i]) for i in fresh])
            self._operations.append((cpu.lib.recorded(), again))
        return tree_unflatten(results, form) if fresh else result

    def _placed(self, tensor: Tensor) -> Tensor:
        """One like it in the recording's memory."""
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        nbytes = extent * tensor.itemsize if tensor.numel() else 0
        if start + nbytes > len(self._memory):
            self.is_full = True
            return tensor
        self._used = start + nbytes
        room = self._memory[start : start + nbytes].view(tensor.dtype)
        return room.as_strided(tensor.shape, tensor.stride(), room.storage_offset())


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


def _is_table(value: Any) -> bool:
    """Whether columns may be added: they are, to block tables, whose rows are read as far as they are filled."""
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()


def _kind(leaf: Any) -> Any:
    """What of an input a recording depends on."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.dtype, leaf.shape[0] if _is_table(leaf) else leaf.shape


def _with_room(tensor: Tensor) -> Tensor:
    """A copy for a recording; a table gets columns for what its requests will grow to."""
    if not _is_table(tensor):
        return tensor.clone()
    rows, columns = tensor.shape
    roomy = tensor.new_zeros(rows, max(64, 2 * columns))
    roomy[:, :columns] = tensor
    return roomy


def _leaves(value: Any) -> Iterator[Any]:
    """What records and tuples are made of, in order."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name))
    elif isinstance(value, tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def rebuilt(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same with other tensors."""
    if isinstance(value, Tensor):
        return next(tensors)
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return type(value)(**{name: rebuilt(getattr(value, name), tensors) for name in names})
    if isinstance(value, tuple):
        return tuple(rebuilt(part, tensors) for part in value)
    return value


def _same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = a.contiguous(), b.contiguous()
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
