"""The cache against a plain model of what it must do."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelport.engine.cache import GONE, BlockPool, Cache, Group
from modelport.request import Request
from modelport.sampling_params import SamplingParams


def request(tokens: list[int]) -> Request:
    return Request("r", list(tokens), len(tokens), SamplingParams(), 0, (), 10_000, None)


def cache(num_blocks: int, block_size: int, prefix_caching: bool = True, window: int = 0) -> Cache:
    return Cache([Group(BlockPool(num_blocks), window)], block_size, prefix_caching)


def compute(pool: Cache, r: Request) -> None:
    if not r.blocks:
        pool.share(r, pool.no_hit)
    assert pool.grow(r, len(r.token_ids))
    r.num_computed = len(r.token_ids)
    pool.computed(r)


def known(pool: Cache, tokens: list[int]) -> list[int]:
    (blocks,) = pool.lookup(request(tokens)).blocks
    return blocks


def num_free(pool: Cache) -> list[int]:
    return [group.pool.num_free for group in pool.groups]


def test_equal_beginnings_share_full_blocks_only():
    pool = cache(8, 4)
    first = request([1, 2, 3, 4, 5, 6, 7, 8, 9])
    compute(pool, first)
    assert known(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == first.blocks[0][:2]
    assert known(pool, [1, 2, 3, 4, 5, 6, 0, 8, 9]) == first.blocks[0][:1]
    assert known(pool, [0, 2, 3, 4, 5, 6, 7, 8, 9]) == []  # equal later blocks do not count


def test_the_last_token_is_always_computed():
    pool = cache(8, 4)
    first = request([1, 2, 3, 4, 5, 6, 7, 8])
    compute(pool, first)
    assert known(pool, [1, 2, 3, 4, 5, 6, 7, 8]) == first.blocks[0][:1]
    assert known(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == first.blocks[0]


def test_freed_blocks_stay_known_until_reused_least_recently_used_first():
    pool = cache(4, 2)
    old, new = request([1, 2, 3]), request([5, 6, 7])
    compute(pool, old)
    compute(pool, new)
    pool.release(old)
    pool.release(new)
    assert num_free(pool) == [4]
    assert len(known(pool, [1, 2, 9])) == len(known(pool, [5, 6, 9])) == 1
    compute(pool, request([7, 7, 7, 7, 7]))  # takes the two unknown halves and the older known block
    assert known(pool, [1, 2, 9]) == []
    assert len(known(pool, [5, 6, 9])) == 1


@pytest.mark.parametrize("sizes", [(2,), (8, 2), (2, 8)])
def test_a_pool_that_is_too_small_changes_nothing(sizes):
    pool = Cache([Group(BlockPool(n)) for n in sizes], 4)
    big = request(list(range(9)))
    pool.share(big, pool.no_hit)
    assert not pool.grow(big, 9)
    assert big.blocks == [[] for _ in sizes]
    assert num_free(pool) == list(sizes)


def test_without_prefix_caching_nothing_is_found():
    pool = cache(4, 2, prefix_caching=False)
    compute(pool, request([1, 2, 3]))
    assert known(pool, [1, 2, 3]) == []


def test_blocks_behind_a_window_are_given_back_and_stay_known():
    pool = cache(8, 2, window=3)
    r = request(list(range(9)))
    compute(pool, r)  # the next token, at 9, sees 7, 8 and itself
    assert [block == GONE for block in r.blocks[0]] == [True, True, True, False, False]
    assert num_free(pool) == [6]
    found = pool.lookup(request([*range(8), 99]))  # its last token, at 8, sees 6 and 7 in the cache
    assert found.num_tokens == 8
    assert [block == GONE for block in found.blocks[0]] == [True, True, True, False]
    pool.release(r)
    assert num_free(pool) == [8]


def test_a_hole_in_a_window_shortens_the_known_beginning_for_every_group():
    pool = Cache([Group(BlockPool(16)), Group(BlockPool(5), window=2)], 2)
    compute(pool, request(list(range(8))))
    other = request([50, 51, 52, 53, 54, 55])
    compute(pool, other)  # takes blocks of the window's group that were behind the first request's window
    hit = pool.lookup(request(list(range(9))))
    assert hit.num_tokens == 8  # needs only the last block in the second group
    assert [len(blocks) for blocks in hit.blocks] == [4, 4]
    shorter = pool.lookup(request([0, 1, 2, 3, 99]))  # known to the first group; the second lost tokens 2 and 3
    assert shorter.num_tokens == 2
    assert [len(blocks) for blocks in shorter.blocks] == [1, 1]


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from([(0,), (3,), (0, 3), (4, 1)]))
def test_blocks_are_never_lost_shared_wrongly_or_handed_out_twice(data, windows):
    pool = Cache([Group(BlockPool(12), window) for window in windows], 2)
    live: list[Request] = []
    contents: list[dict[int, tuple[int, ...]]] = [{} for _ in windows]  # block -> all tokens up to its end
    for _ in range(data.draw(st.integers(1, 25))):
        if live and data.draw(st.booleans()):
            pool.release(live.pop(data.draw(st.integers(0, len(live) - 1))))
        else:
            r = request(data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=9)))
            hit = pool.lookup(r)
            for window, blocks, holds in zip(windows, hit.blocks, contents, strict=True):
                assert len(blocks) * 2 == hit.num_tokens < len(r.token_ids)
                for index, block in enumerate(blocks):
                    seen = not window or 2 * index + 2 > hit.num_tokens + 1 - window  # by the next token
                    assert seen == (block != GONE)
                    assert not seen or holds[block] == tuple(r.token_ids[: 2 * index + 2])
            pool.share(r, hit)
            r.num_computed = hit.num_tokens
            chunk = data.draw(st.integers(1, 9))
            while r.num_computed < len(r.token_ids):
                before = [len(blocks) for blocks in r.blocks]
                if not pool.grow(r, min(len(r.token_ids), r.num_computed + chunk)):
                    break
                for group, (blocks, holds) in enumerate(zip(r.blocks, contents, strict=True)):
                    for index in range(before[group], len(blocks)):
                        assert not any(blocks[index] in other.blocks[group] for other in live)
                        holds[blocks[index]] = tuple(r.token_ids[: 2 * index + 2])
                r.num_computed = min(len(r.token_ids), r.num_computed + chunk)
                pool.computed(r)
            if r.num_computed < len(r.token_ids):
                pool.release(r)
            else:
                live.append(r)
        used = [{block for r in live for block in r.blocks[g]} - {GONE} for g in range(len(windows))]
        assert num_free(pool) == [12 - len(blocks) for blocks in used]


def test_publishing_costs_the_new_blocks_only(monkeypatch):
    pool = cache(600, 1)
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
    pool = cache(4, 2)
    compute(pool, request(tokens))
    assert known(pool, tokens) == []
