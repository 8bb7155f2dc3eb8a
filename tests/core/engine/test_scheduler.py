"""Who runs: chunks, admission, preemption, followers; with a runner that only counts."""

import pytest

from modelport.engine.cache import BlockPool, Cache, Group
from modelport.engine.scheduler import Scheduler
from modelport.request import Request
from modelport.sampling_params import SamplingParams


def cache(num_blocks: int, block_size: int, prefix_caching: bool = True) -> Cache:
    return Cache([Group(BlockPool(num_blocks))], block_size, prefix_caching)


def request(name: str, length: int, leader: Request | None = None, **params) -> Request:
    ids = [hash(name) % 97 + i for i in range(length)] if leader is None else list(leader.token_ids)
    return Request(name, ids, len(ids), SamplingParams(**params), 0, (), 10_000, None, leader=leader)


def run(scheduler: Scheduler) -> dict[str, int]:
    """One step: everybody computes what was planned and, at the end of its tokens, gets one more."""
    plan = scheduler.plan()
    for r, count in zip(plan.requests, plan.counts, strict=True):
        assert len(r.blocks[0]) * scheduler.cache.block_size >= r.num_computed + count
        scheduler.computed(r, count)
        if r.num_computed == len(r.token_ids):
            r.token_ids.append(0)
    return dict(zip((r.request_id for r in plan.requests), plan.counts, strict=True))


def test_prompts_are_cut_into_chunks_and_run_beside_new_tokens():
    scheduler = Scheduler(cache(64, 4), 8, 10)
    scheduler.add(request("a", 4))
    scheduler.add(request("b", 15))
    assert run(scheduler) == {"a": 4, "b": 6}
    assert run(scheduler) == {"a": 1, "b": 9}
    assert run(scheduler) == {"a": 1, "b": 1}


def test_steps_are_longer_while_nobody_waits_for_a_next_token():
    scheduler = Scheduler(cache(64, 4), 8, 10, while_decoding=4)
    scheduler.add(request("a", 15))
    scheduler.add(request("b", 12))
    assert run(scheduler) == {"a": 10}
    assert run(scheduler) == {"a": 5, "b": 5}
    assert run(scheduler) == {"a": 1, "b": 3}
    assert run(scheduler) == {"a": 1, "b": 3}
    assert run(scheduler) == {"a": 1, "b": 1}


def test_no_more_requests_than_slots_run():
    scheduler = Scheduler(cache(64, 4), 2, 100)
    for name in "abc":
        scheduler.add(request(name, 3))
    assert set(run(scheduler)) == {"a", "b"}
    scheduler.finish(scheduler.running[0])
    assert set(run(scheduler)) == {"b", "c"}


def test_the_youngest_gives_way_when_blocks_run_out_and_comes_back_first():
    scheduler = Scheduler(cache(4, 2, prefix_caching=False), 4, 100)
    a, b, c = request("a", 3), request("b", 4), request("c", 3)
    for r in (a, b, c):
        scheduler.add(r)
    assert set(run(scheduler)) == {"a", "b"}  # c finds no room
    assert set(run(scheduler)) == {"a"}  # b wants a third block: it is the youngest, so it gives way itself
    assert list(scheduler.waiting) == [b, c]
    assert b.num_computed == 0
    assert b.blocks == []
    assert b.metrics.num_preemptions == 1
    scheduler.finish(a)
    assert run(scheduler) == {"b": 5}


def test_a_request_is_only_admitted_when_all_of_it_fits():
    scheduler = Scheduler(cache(4, 2), 4, 2)
    scheduler.add(request("a", 3))
    scheduler.add(request("b", 6))
    for _ in range(3):
        assert "b" not in run(scheduler)


def test_followers_wait_for_the_prompt_and_then_share_it():
    scheduler = Scheduler(cache(64, 2), 8, 4)
    leader = request("lead", 7)
    followers = [request(f"f{i}", 0, leader=leader) for i in range(2)]
    for r in (leader, *followers):
        scheduler.add(r)
    assert run(scheduler) == {"lead": 4}
    assert run(scheduler) == {"lead": 3}
    assert scheduler.num_waiting == 2
    assert run(scheduler) == {"lead": 1, "f0": 1, "f1": 1}
    assert followers[0].metrics.num_cached_tokens == 6
    assert followers[0].blocks[0][:3] == leader.blocks[0][:3]


@pytest.mark.parametrize("when", ["waiting", "running", "follower", "leader"])
def test_finishing_takes_a_request_out_wherever_it_is(when):
    scheduler = Scheduler(cache(64, 2), 1, 100)
    leader = request("lead", 7)
    follower = request("f", 0, leader=leader)
    waiting = request("w", 3)
    for r in (leader, follower, waiting):
        scheduler.add(r)
    if when in ("running", "leader"):
        run(scheduler) if when == "running" else None
        scheduler.finish(leader)
        assert set(run(scheduler)) == {"f"}  # nobody waits for a leader that is gone
    else:
        scheduler.finish(waiting if when == "waiting" else follower)
        run(scheduler)
        scheduler.finish(leader)
        assert set(run(scheduler)) == ({"f"} if when == "waiting" else {"w"})


def test_slots_given_back_are_told_before_they_are_used_again():
    scheduler = Scheduler(cache(64, 2), 1, 100)
    a, b = request("a", 3), request("b", 3)
    scheduler.add(a)
    scheduler.add(b)
    first = scheduler.plan()
    assert (first.joined, first.left) == ([a], [])
    slot = a.slot
    scheduler.computed(a, 3)
    scheduler.finish(a)
    second = scheduler.plan()
    assert (second.joined, second.left, b.slot) == ([b], [slot], slot)


def test_the_cost_of_a_step_does_not_grow_with_the_queue():
    """Counted, not timed: planning looks at the head of the queue only."""
    scheduler = Scheduler(cache(64, 2), 1, 100)
    for i in range(200):
        scheduler.add(request(f"r{i}", 3))
    looked = []
    lookup = scheduler.cache.lookup
    scheduler.cache.lookup = lambda r: looked.append(r) or lookup(r)
    for _ in range(5):
        run(scheduler)
    assert len(looked) == 1
