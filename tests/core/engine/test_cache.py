"""The block pool against a plain model of what it must do."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelport.engine.cache import BlockPool
from modelport.request import Request
from modelport.sampling_params import SamplingParams


def request(tokens: list[int]) -> Request:
    return Request("r", list(tokens), len(tokens), SamplingParams(), 0, (), 10_000, None)


def compute(pool: BlockPool, r: Request) -> None:
    assert pool.grow(r, len(r.token_ids))
    r.num_computed = len(r.token_ids)
    pool.publish(r)


def test_equal_beginnings_share_full_blocks_only():
    pool = BlockPool(8, 4)
    first = request([1, 2, 3, 4, 5, 6, 7, 8, 9])
    compute(pool, first)
    twin = request([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert pool.lookup(twin) == first.blocks[:2]
    assert pool.lookup(request([1, 2, 3, 4, 5, 6, 0, 8, 9])) == first.blocks[:1]
    assert pool.lookup(request([0, 2, 3, 4, 5, 6, 7, 8, 9])) == []  # equal later blocks do not count


def test_the_last_token_is_always_computed():
    pool = BlockPool(8, 4)
    first = request([1, 2, 3, 4, 5, 6, 7, 8])
    compute(pool, first)
    assert pool.lookup(request([1, 2, 3, 4, 5, 6, 7, 8])) == first.blocks[:1]
    assert pool.lookup(request([1, 2, 3, 4, 5, 6, 7, 8, 9])) == first.blocks


def test_freed_blocks_stay_known_until_reused_least_recently_used_first():
    pool = BlockPool(4, 2)
    old, new = request([1, 2, 3]), request([5, 6, 7])
    compute(pool, old)
    compute(pool, new)
    pool.release(old)
    pool.release(new)
    assert pool.num_free == 4
    assert len(pool.lookup(request([1, 2, 9]))) == len(pool.lookup(request([5, 6, 9]))) == 1
    compute(pool, request([7, 7, 7, 7, 7]))  # takes the two unknown halves and the older known block
    assert pool.lookup(request([1, 2, 9])) == []
    assert len(pool.lookup(request([5, 6, 9]))) == 1


def test_a_pool_that_is_too_small_changes_nothing():
    pool = BlockPool(2, 4)
    big = request(list(range(9)))
    assert not pool.grow(big, 9)
    assert big.blocks == []
    assert pool.num_free == 2


def test_without_prefix_caching_nothing_is_found():
    pool = BlockPool(4, 2, prefix_caching=False)
    compute(pool, request([1, 2, 3]))
    assert pool.lookup(request([1, 2, 3])) == []


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_blocks_are_never_lost_shared_wrongly_or_handed_out_twice(data):
    pool = BlockPool(12, 2)
    live: list[Request] = []
    contents: dict[int, tuple[int, ...]] = {}  # block -> the tokens from the beginning whose keys it holds
    for _ in range(data.draw(st.integers(1, 25))):
        if live and data.draw(st.booleans()):
            pool.release(live.pop(data.draw(st.integers(0, len(live) - 1))))
        else:
            r = request(data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=9)))
            known = pool.lookup(r)
            for index, block in enumerate(known):
                assert contents[block] == tuple(r.token_ids[: 2 * index + 2])
            pool.share(r, known)
            if not pool.grow(r, len(r.token_ids)):
                pool.release(r)
                continue
            for index, block in enumerate(r.blocks[len(known) :], start=len(known)):
                assert not any(block in other.blocks for other in live)
                contents[block] = tuple(r.token_ids[: 2 * index + 2])
            r.num_computed = len(r.token_ids)
            pool.publish(r)
            live.append(r)
        assert pool.num_free == 12 - len({block for r in live for block in r.blocks})


def test_publishing_costs_the_new_blocks_only(monkeypatch):
    pool = BlockPool(600, 1)
    r = request(list(range(500)))
    compute(pool, r)
    calls = []
    original = pool._extend_hashes
    monkeypatch.setattr(pool, "_extend_hashes", lambda *a: calls.append(len(r.block_hashes)) or original(*a))
    r.token_ids.append(1)
    compute(pool, r)
    assert calls == [500]
    assert len(r.block_hashes) == 501
    assert r.num_published == 501


@pytest.mark.parametrize("tokens", [[1], [1, 2]])
def test_short_prompts_find_nothing(tokens):
    pool = BlockPool(4, 2)
    compute(pool, request(tokens))
    assert pool.lookup(request(tokens)) == []
