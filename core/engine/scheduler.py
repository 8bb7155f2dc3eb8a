"""Who runs in the next step: running requests first, then waiting ones, prompt chunks and single tokens together.

Decisions: a request only has tokens and a count of computed ones, so a prompt chunk, a new token and the recomputation
after a preemption are the same thing; when blocks run out the youngest running request gives its blocks back and waits
at the head of the queue. The cost of a step grows with the running requests, not with the queue or with history.
"""

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from modelport.engine.adapters import AdapterSlots
from modelport.engine.cache import Cache
from modelport.engine.media import MediaCache
from modelport.inputs.processor import MediaItem
from modelport.request import Request

_LOOKS = 64
"""How many waiting requests are looked at for one whose adapter has a slot."""
_PATIENCE = 256
"""How often the first of them is passed by before nobody passes it any more."""


@dataclass
class Plan:
    """One step: requests, how many tokens each computes, and what changed in the set of rows since the last step.

    :ivar encode: media whose rows this step needs and the runner lacks.
    :ivar forget: digests of media whose rows the runner drops.
    """

    requests: list[Request] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    joined: list[Request] = field(default_factory=list)
    left: list[int] = field(default_factory=list)  # slots given back
    encode: list[MediaItem] = field(default_factory=list)
    forget: list[bytes] = field(default_factory=list)


class Scheduler:
    """Queues, the cache, and the slots (rows of the runner's tables).

    :param max_num_seqs: most running requests; also the number of slots.
    :param max_num_batched_tokens: most tokens in one step.
    :param while_decoding: most tokens in one step while some request waits for its next one; as many when not given.
    :param length_class: `Rope.length_class` of a model whose rotary angles depend on length.
    :param media: of a model that takes media.
    :param adapters: of a model that takes adapters.
    """

    def __init__(
        self,
        cache: Cache,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        length_class: Callable[[int, int], int] | None = None,
        media: MediaCache | None = None,
        adapters: AdapterSlots | None = None,
        while_decoding: int | None = None,
    ):
        self._length_class, self.media, self.adapters = length_class, media, adapters
        self._passed: tuple[Request | None, int] = (None, 0)  # who was first in the queue, and how often passed by
        self.cache, self.max_num_batched_tokens = cache, max_num_batched_tokens
        self._while_decoding = while_decoding or max_num_batched_tokens
        self.waiting: OrderedDict[Request, None] = OrderedDict()  # a queue that anybody can leave
        self.running: list[Request] = []
        self._followers: dict[int, list[Request]] = {}  # id of a leader -> those that wait for its prompt
        self._slots = list(range(max_num_seqs - 1, -1, -1))
        self._left: list[int] = []
        self._away: set[Request] = set()  # in steps whose results are not back

    @property
    def has_length_classes(self) -> bool:
        """Whether a new token may void the keys of those before it."""
        return self._length_class is not None

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + sum(map(len, self._followers.values()))

    def all_waiting(self) -> list[Request]:
        return [*self.waiting, *(follower for several in self._followers.values() for follower in several)]

    def add(self, request: Request) -> None:
        if request.leader is not None and self.cache.prefix_caching:
            self._followers.setdefault(id(request.leader), []).append(request)
        else:
            self.waiting[request] = None

    def plan(self, parts: int = 1) -> Plan:
        """Choose the next step; blocks for it are taken. Empty when nothing can run.

        :param parts: how many steps are under way at once; each gets so much of the requests.
        """
        most = -(-(len(self.running) + min(len(self.waiting), len(self._slots))) // parts)
        decodes = any(request.num_output_tokens for request in self.running)
        plan, budget = Plan(), self._while_decoding if decodes else self.max_num_batched_tokens
        if self._length_class is not None:
            self._recompute_outgrown()
        if self.media is not None:
            self.media.begin()
        index, preempted = 0, False
        while index < len(self.running) and budget > 0 and len(plan.requests) < most:
            request = self.running[index]
            if request in self._away:
                index += 1
                continue
            count = min(len(request.token_ids) - request.num_computed, budget)
            if request.media or request.spans:
                count = self._reach(request, request.num_computed, count)
                if not count:  # its media wait for the next step
                    index += 1
                    continue
            while not self.cache.grow(request, request.num_computed + count):
                preempted = True
                victim = next(r for r in reversed(self.running) if r not in self._away)
                self.running.remove(victim)
                self._preempt(victim)
                if victim is request:
                    break
            else:
                plan.requests.append(request)
                plan.counts.append(count)
                budget -= count
                index += 1
                continue
            break
        while self.waiting and self._slots and budget > 0 and not preempted and len(plan.requests) < most:
            request = next(iter(self.waiting)) if self.adapters is None else self._next_with_adapter()
            if request is None:
                break
            count = self._admit(request, budget)
            if not count:
                break
            del self.waiting[request]
            self.running.append(request)
            plan.requests.append(request)
            plan.counts.append(count)
            plan.joined.append(request)
            budget -= count
        if plan.requests:
            plan.left, self._left = self._left, []
            if self.media is not None:
                plan.encode, plan.forget = self.media.told()
        return plan

    def present(self) -> list[Request]:
        """Running requests that a plan may hold."""
        return [request for request in self.running if request not in self._away]

    def send_off(self, plan: Plan) -> None:
        """Its requests are in no other plan until they are `back`."""
        self._away.update(plan.requests)

    def back(self, plan: Plan) -> None:
        self._away.difference_update(plan.requests)

    def computed(self, request: Request, count: int) -> None:
        """Note that a step wrote the keys of `count` more tokens of `request`."""
        request.num_computed += count
        self.cache.computed(request)
        if request.media:
            self.media.computed(request)
        if self._followers and request.num_computed >= request.num_prompt_tokens:
            self._release_followers(request)

    def finish(self, request: Request) -> None:
        """Take `request` out, wherever it is; its blocks stay known until somebody needs their room."""
        if request.slot >= 0:
            self.running.remove(request)
            self._give_back(request)
        elif request in self.waiting:
            del self.waiting[request]
        elif request.leader is not None and request in (followers := self._followers.get(id(request.leader), [])):
            followers.remove(request)
            if not followers:
                del self._followers[id(request.leader)]
        self._release_followers(request)

    def _next_with_adapter(self) -> Request | None:
        """The first waiting request whose adapter has a slot or can have one; others wait for running ones to end."""
        first = next(iter(self.waiting))
        known, times = self._passed
        if known is not first:
            times = 0
        for request in itertools.islice(self.waiting, _LOOKS if times < _PATIENCE else 1):
            if request.adapter is None or self.adapters.has_room(request.adapter):
                self._passed = (first, times + (request is not first))
                return request
        return None

    def _admit(self, request: Request, budget: int) -> int:
        """Blocks and a slot for a waiting request; the number of tokens that it computes now, 0 when it must wait."""
        # Prompt log-probabilities need logits of every prompt row, so nothing of it may come from the cache.
        if self._length_class is not None and (found := self._class_of(request)) != request.length_class:
            request.length_class = found
            request.block_hashes.clear()
        scored = request.params.prompt_logprobs is not None
        hit = self.cache.no_hit if scored else self.cache.lookup(request)
        # All of it must fit, not just the first chunk: else admission and preemption would take turns. Known blocks
        # that nobody uses count as free, so they are taken first.
        self.cache.share(request, hit)
        if self.cache.missing(request, self.max_num_batched_tokens):
            self.cache.release(request)
            return 0
        count = min(len(request.token_ids) - hit.num_tokens, budget)
        if request.media or request.spans:
            count = self._reach(request, hit.num_tokens, count, joins=True)
            if not count:
                self._let_go(request)
                return 0
        grown = self.cache.grow(request, hit.num_tokens + count)
        assert grown or request.spans
        if not grown:
            self._let_go(request)
            return 0
        request.num_computed = hit.num_tokens
        request.slot = self._slots.pop()
        if request.adapter is not None:
            request.adapter_slot = self.adapters.take(request.adapter)
        metrics = request.metrics
        if metrics.first_scheduled_time is None:
            metrics.first_scheduled_time = time.monotonic()
            metrics.num_cached_tokens = hit.num_tokens
        return count

    def _reach(self, request: Request, start: int, count: int, joins: bool = False) -> int:
        """How many of `count` tokens this step computes, its media and the tokens that see each other considered."""
        count = _whole_spans(request, start, count)
        if request.media and count:
            fewer = self.media.reach(request, start, count, joins)
            if fewer < count:
                count = _whole_spans(request, start, fewer, longer=False)
        return count

    def _let_go(self, request: Request) -> None:
        self.cache.release(request)
        if request.media:
            self.media.release(request)

    def _recompute_outgrown(self) -> None:
        """Keys are void once a sequence has grown into another class: it starts again, at the head of the queue."""
        for request in [r for r in self.running if self._class_of(r) != r.length_class]:
            self.running.remove(request)
            self._preempt(request)
            request.metrics.num_preemptions -= 1  # not for want of blocks

    def _class_of(self, request: Request) -> int:
        return self._length_class(request.num_prompt_tokens, len(request.token_ids))

    def _preempt(self, request: Request) -> None:
        self._give_back(request)
        request.num_computed = 0
        request.metrics.num_preemptions += 1
        self._put_first(request)

    def _give_back(self, request: Request) -> None:
        self._let_go(request)
        self._left.append(request.slot)
        self._slots.append(request.slot)
        request.slot = -1
        if request.adapter is not None:
            self.adapters.release(request.adapter)
            request.adapter_slot = -1

    def _release_followers(self, leader: Request) -> None:
        for request in reversed(self._followers.pop(id(leader), [])):
            self._put_first(request)

    def _put_first(self, request: Request) -> None:
        self.waiting[request] = None
        self.waiting.move_to_end(request, last=False)


def _whole_spans(request: Request, start: int, count: int, longer: bool = True) -> int:
    """`count` changed so that no span is cut: to its beginning, or, where that is no progress, to its end.

    :param longer: it may go to the end, past what was asked for.
    """
    for first, end in request.spans:
        if first < start + count < end:
            return first - start if first > start else (end - start if longer else 0)
    return count
