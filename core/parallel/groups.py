"""Where a part of a model lies (`Place`), and how parts exchange tensors: between threads, or by torch.distributed.

Decisions: a place knows its coordinates and nothing of its transport, so the same transforms run under both. Ranks run
over the tensor-parallel places of a stage first, which therefore are neighbours: they talk twice in every layer, stages
once in a step. Threads take turns under one lock and give it away while they wait, so exactly one computes at a time
and the sums of a step do not depend on chance.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from modelport.modeling.decoder import State


class Links(Protocol):
    """A transport, seen from one place; ranks are those of all places."""

    def all_gather(self, x: Tensor, ranks: Sequence[int]) -> list[Tensor]:
        """Everybody's `x`, in the order of `ranks`; all of them call it."""

    def all_reduce(self, x: Tensor, ranks: Sequence[int]) -> Tensor:
        """The sum of everybody's `x`, the same bits everywhere; all of `ranks` call it."""

    def send(self, state: State, to: int) -> None: ...

    def receive(self, source: int) -> State: ...


@dataclass(frozen=True)
class Place:
    """One of `tp_size * pp_size` places of a model: part `tp_rank` of the layers of stage `pp_rank`."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    links: Links

    @classmethod
    def of(cls, rank: int, tp_size: int, pp_size: int, links: Links) -> Place:
        """The place with this number among all of them."""
        return cls(rank % tp_size, tp_size, rank // tp_size, pp_size, links)

    @property
    def rank(self) -> int:
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def is_first(self) -> bool:
        """Whether it embeds tokens."""
        return self.pp_rank == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the head."""
        return self.pp_rank == self.pp_size - 1

    @property
    def samples(self) -> bool:
        """Whether it chooses tokens: one place does, so that no two ever choose differently."""
        return self.is_last and self.tp_rank == 0

    @property
    def stage(self) -> range:
        """Ranks of the places that divide the same layers."""
        return range(self.pp_rank * self.tp_size, (self.pp_rank + 1) * self.tp_size)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the stage."""
        return self.links.all_reduce(x, self.stage)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """What each place of the stage has, all of one shape."""
        return self.links.all_gather(x, self.stage)

    def send(self, state: State) -> None:
        """To the next stage."""
        self.links.send(state, self.rank + self.tp_size)

    def receive(self) -> State:
        """From the stage before."""
        return self.links.receive(self.rank - self.tp_size)

    def least(self, number: int) -> int:
        """The smallest `number` of all places; all of them call it, in the same order."""
        found = self.links.all_gather(torch.tensor([number]), range(self.tp_size * self.pp_size))
        return min(int(x) for x in found)

    def __str__(self) -> str:
        return f"tensor-parallel part {self.tp_rank} of {self.tp_size}, stage {self.pp_rank} of {self.pp_size}"


class BrokenLink(RuntimeError):
    """Another place has failed, so that what was waited for will not come."""


class ThreadHub:
    """What the threads of one process exchange tensors through; `links(rank)` is one's view.

    A thread works between `enter` and `leave`, alone.
    """

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._boxes: dict[tuple[Sequence[int], int], dict[int, Tensor]] = {}  # (ranks, round) -> what was given
        self._sent: dict[tuple[int, int], deque[State]] = {}
        self.broken = False

    def links(self, rank: int) -> ThreadLinks:
        return ThreadLinks(self, rank)

    def enter(self) -> None:
        """:raises BrokenLink: a place has failed before, and the others are in the middle of something."""
        self._turn.acquire()
        if self.broken:
            self._turn.release()
            raise BrokenLink("another place of the model has failed; make a new engine")

    def leave(self, failed: bool) -> None:
        self.broken |= failed
        self._turn.notify_all()
        self._turn.release()

    def exchange(self, key: tuple[Sequence[int], int], rank: int, x: Tensor) -> list[Tensor]:
        box = self._boxes.setdefault(key, {})
        box[rank] = x
        ranks = key[0]
        if len(box) == len(ranks):
            self._turn.notify_all()
        self._wait(lambda: len(box) == len(ranks))
        self._boxes.pop(key, None)
        return [box[r] for r in ranks]

    def send(self, state: State, source: int, to: int) -> None:
        self._sent.setdefault((source, to), deque()).append(state)
        self._turn.notify_all()

    def receive(self, source: int, to: int) -> State:
        queue = self._sent.setdefault((source, to), deque())
        self._wait(lambda: queue)
        return queue.popleft()

    def _wait(self, until) -> None:
        while not until():
            if self.broken:
                raise BrokenLink("another place of the model has failed")
            self._turn.wait()


class ThreadLinks:
    """A thread's view of its hub."""

    def __init__(self, hub: ThreadHub, rank: int):
        self._hub, self._rank = hub, rank
        self._rounds: dict[Sequence[int], int] = {}

    def all_gather(self, x: Tensor, ranks: Sequence[int]) -> list[Tensor]:
        """As `Links`; what comes back is shared and must not be changed."""
        number = self._rounds[ranks] = self._rounds.get(ranks, 0) + 1
        return self._hub.exchange((ranks, number), self._rank, x)

    def all_reduce(self, x: Tensor, ranks: Sequence[int]) -> Tensor:
        first, *others = self.all_gather(x, ranks)
        total = first.clone()
        for other in others:
            total += other
        return total

    def send(self, state: State, to: int) -> None:
        self._hub.send(state, self._rank, to)

    def receive(self, source: int) -> State:
        return self._hub.receive(source, self._rank)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)


class DistributedLinks:
    """torch.distributed between processes: gloo on CPUs, NCCL on GPUs; its default group has to be there.

    Every place makes one with the same sizes, since making groups is a matter of all.

    :ivar waits_for: while another place has to do something first: what, in words.
    """

    def __init__(self, tp_size: int, pp_size: int, device: torch.device):
        import torch.distributed as dist

        self._dist, self._device = dist, device
        self.waits_for: str | None = None
        world = range(tp_size * pp_size)
        self._groups = {world: None}
        for stage in range(pp_size):
            ranks = range(stage * tp_size, (stage + 1) * tp_size)
            if ranks != world:
                self._groups[ranks] = dist.new_group(list(ranks))

    def all_gather(self, x: Tensor, ranks: Sequence[int]) -> list[Tensor]:
        x = x.to(self._device).contiguous()
        found = [torch.empty_like(x) for _ in ranks]
        self.waits_for = "waits for what others gather"
        self._dist.all_gather(found, x, group=self._groups[ranks])
        self.waits_for = None
        return found

    def all_reduce(self, x: Tensor, ranks: Sequence[int]) -> Tensor:
        x = x.contiguous()
        self.waits_for = "waits for the sum over its stage"
        self._dist.all_reduce(x, group=self._groups[ranks])
        self.waits_for = None
        return x

    def send(self, state: State, to: int) -> None:
        """A header of sizes first: (1 + 4 * parts,) int64, for each its type, its number of dimensions and those."""
        parts = (state,) if isinstance(state, Tensor) else state
        header = [0 if isinstance(state, Tensor) else len(parts)]
        for part in parts:
            assert part.dim() <= 2, part.shape
            header += [_DTYPES.index(part.dtype), part.dim(), *part.shape, *[0] * (2 - part.dim())]
        self.waits_for = f"sends to worker {to}"
        size = torch.tensor([len(header)], device=self._device)
        self._dist.send(size, to)
        self._dist.send(torch.tensor(header, device=self._device), to)
        for part in parts:
            self._dist.send(part.contiguous(), to)
        self.waits_for = None

    def receive(self, source: int) -> State:
        self.waits_for = f"waits for worker {source}"
        size = torch.empty(1, dtype=torch.int64, device=self._device)
        self._dist.recv(size, source)
        header = torch.empty(int(size), dtype=torch.int64, device=self._device)
        self._dist.recv(header, source)
        count, *rest = header.tolist()
        parts = []
        for kind, dims, *shape in (rest[i : i + 4] for i in range(0, len(rest), 4)):
            part = torch.empty(shape[:dims], dtype=_DTYPES[kind], device=self._device)
            self._dist.recv(part, source)
            parts.append(part)
        self.waits_for = None
        return tuple(parts) if count else parts[0]
