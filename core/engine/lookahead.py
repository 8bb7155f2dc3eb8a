"""The next step launched while this one runs, so that a device does not wait for the host between two of them.

Decisions: a step is planned as if the one under way were settled: for as long as it is planned and launched, requests
count the tokens that they will have, and those that nobody knows yet come from where the step under way leaves them on
the device. Where the host has to see a token first (a penalty, a bad word, a preemption) the next step waits, as ever.
What ends a request is noticed a step late; the token that it got meanwhile is dropped, and what was written for it lies
behind all that others may read. Everything is in the order of one stream, so blocks and slots that change hands are
written by their new owners later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from modelport.engine.runner import Flight, Runner, StepResult
from modelport.engine.scheduler import Plan, Scheduler
from modelport.request import Request

UNKNOWN = 0
"""In place of a token that is on the device only."""


class Lookahead:
    """Steps of a model in one place; as `Engine.step`, with the next step under way when a result comes back.

    :param settle: gives the result of a step to its requests.
    :ivar num_ahead: steps that were launched before the one before them was settled.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, settle: Callable[[Plan, StepResult], list[Request]]):
        self._scheduler, self._runner, self._settle = scheduler, runner, settle
        self._flight: Flight | None = None
        self.num_ahead = 0

    def step(self) -> list[Request]:
        """The requests that got a token or ended."""
        flight = self._flight
        if flight is None or all(request.finished for request in flight.plan.requests):  # aborted, or surplus
            plan = self._scheduler.plan()
            if not plan.requests:
                self._flight = None
                return []
            flight = self._flight = self._runner.launch(plan)
        self._flight = self._follow(flight)  # if it fails, `flight` is still the one to settle
        return self._settle(flight.plan, self._runner.land(flight))

    def _follow(self, flight: Flight) -> Flight | None:
        """Launch the step after `flight`; None when it has to wait for what `flight` finds, or there is none."""
        unknown = self._unknown(flight)
        if unknown is None:
            return None
        going = zip(flight.plan.requests, flight.plan.counts, strict=True)
        going = [(request, count, request in unknown) for request, count in going if not request.finished]
        ending = Plan([request for request in unknown if len(request.token_ids) + 1 >= request.max_total_tokens])
        self._scheduler.send_off(ending)  # the token under way is their last
        try:
            with _settled(going):
                if not self._has_room():
                    return None
                plan = self._scheduler.plan()
                if not plan.requests:
                    return None
                sources = np.fromiter((unknown.get(request, -1) for request in plan.requests), np.int64)
                following = self._runner.launch(plan, None if flight.choice is None else flight.choice.tokens, sources)
        finally:
            self._scheduler.back(ending)
        self.num_ahead += 1
        return following

    def _unknown(self, flight: Flight) -> dict[Request, int] | None:
        """The rows of `flight`'s tokens that the next step begins with; None when the next step cannot begin."""
        scheduler, runner, requests = self._scheduler, self._runner, flight.plan.requests
        # Checks want to see the steps of requests that go on, and no others.
        if scheduler.has_length_classes or runner.on_logits is not None:
            return None
        if flight.result.errors or flight.result.prompt_logprobs:
            return None
        rows = {requests[i]: row for row, i in enumerate(flight.done.tolist()) if not requests[i].finished}
        if rows and runner.sampler.looks_back(flight.choice.slots[list(rows.values())]):
            return None
        return rows

    def _has_room(self) -> bool:
        """Take the blocks that running requests need in the next step; False when somebody has to be preempted."""
        budget = self._scheduler.max_num_batched_tokens
        for request in self._scheduler.present():
            count = len(request.token_ids) - request.num_computed
            if not request.spans:  # those are not cut
                count = min(count, budget)
            if not self._scheduler.cache.grow(request, request.num_computed + count):
                return False
            if not request.media:  # else the step may stop before one of them
                budget = max(0, budget - count)
        return True


@contextmanager
def _settled(going: list[tuple[Request, int, bool]]) -> Iterator[None]:
    """Requests as they will be when so many of their tokens are computed, and the next one, if it is to come, known."""
    for request, count, gets_token in going:
        request.num_computed += count
        if gets_token:
            request.token_ids.append(UNKNOWN)
    try:
        yield
    finally:
        for request, count, gets_token in going:
            request.num_computed -= count
            if gets_token:
                request.token_ids.pop()
