"""Cross attention to media: who sees which keys, where they lie, when they are written, what the cache makes of it."""

import numpy as np
import torch

from modelport.engine.cache import BlockPool, Cache, Group
from modelport.engine.crossing import crossing
from modelport.engine.media import MediaCache
from modelport.engine.scheduler import Plan, Scheduler
from modelport.inputs.processor import MediaItem, PlacedItem
from modelport.request import Request, views
from modelport.sampling_params import SamplingParams

SIZE = 4


def image(name: str, keys: int) -> MediaItem:
    return MediaItem("image", [0], {"x": torch.zeros(1)}, is_row=[False], num_keys=keys, digest=name.encode())


def placed(*pairs: tuple[int, MediaItem]) -> tuple[PlacedItem, ...]:
    return tuple(PlacedItem(start, item) for start, item in pairs)


def request(length: int, media: tuple[PlacedItem, ...] = (), name: str = "r") -> Request:
    marks = tuple((p.start, p.end, p.item.digest) for p in media)
    made = Request(name, list(range(length)), length, SamplingParams(), 0, (), 10_000, None, media=media, marks=marks)
    made.blocks = [[], []]
    return made


A, B, C = image("a", 6), image("b", 3), image("c", 5)
MEDIA = placed((2, A), (3, B), (7, C))  # two neighbours, then another one


def test_neighbours_are_a_view_that_ends_where_the_next_begins():
    first, second = views(MEDIA)
    assert (first.start, first.end, first.num_keys) == (2, 7, 9)
    assert (second.start, second.num_keys) == (7, 5)
    assert second.end > 1 << 40
    assert views(placed((0, MediaItem("image", [0])))) == ()


def test_a_whole_prompt():
    r = request(10, MEDIA)
    r.blocks[1] = [5, 3, 8, 1, 0]  # three blocks for 9 keys, two for 5
    found = crossing(Plan([r], [10], [r]), [0, 10], 1, SIZE, {b"a", b"b", b"c"})
    assert found.rows.tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert found.ends.tolist() == [6, 9, 9, 9, 9, 5, 5, 5]
    assert found.query_starts.tolist() == [0, 5, 8]
    assert found.lens.tolist() == [9, 5]
    assert found.block_table.tolist() == [[5, 3, 8], [1, 0, 0]]
    assert found.slots.tolist() == [20, 21, 22, 23, 12, 13, *(14, 15, 32), *(4, 5, 6, 7, 0)]
    assert found.written == [b"a", b"b", b"c"]


def test_chunks_write_what_they_reach_and_new_tokens_nothing():
    r = request(10, MEDIA)
    r.blocks[1] = [0, 1, 2, 3, 4]
    text = request(4)
    seen = {b"a", b"b", b"c"}
    first = crossing(Plan([text, r], [4, 3], [text, r]), [0, 4, 7], 1, SIZE, seen)
    assert (first.rows.tolist(), first.ends.tolist(), first.lens.tolist(), first.written) == ([6], [6], [6], [b"a"])
    r.num_computed = 3
    second = crossing(Plan([r], [2]), [0, 2], 1, SIZE, seen)
    assert (second.rows.tolist(), second.ends.tolist(), second.written) == ([0, 1], [9, 9], [b"b"])
    assert second.slots.tolist() == [6, 7, 8]
    r.num_computed = 9
    last = crossing(Plan([r], [1]), [0, 1], 1, SIZE, seen)
    assert (last.rows.tolist(), last.ends.tolist(), last.written, len(last.slots)) == ([0], [5], [], 0)
    assert last.block_table.tolist() == [[3, 4]]


def test_who_joins_behind_media_writes_those_it_still_sees():
    r = request(10, MEDIA)
    r.blocks[1], r.num_computed = [0, 1, 2, 3, 4], 4
    assert crossing(Plan([r], [2], [r]), [0, 2], 1, SIZE, {b"a", b"b"}).written == [b"a", b"b"]
    r.num_computed = 8
    assert crossing(Plan([r], [2], [r]), [0, 2], 1, SIZE, {b"c"}).written == [b"c"]


def test_text_sees_nothing_and_what_could_not_be_encoded_is_not_written():
    text, r = request(4), request(10, MEDIA)
    assert crossing(Plan([text], [4], [text]), [0, 4], 1, SIZE, set()) is None
    r.blocks[1] = [0, 1, 2, 3, 4]
    found = crossing(Plan([r], [10], [r]), [0, 10], 1, SIZE, {b"b"})
    assert found.written == [b"b"]
    assert found.slots.tolist() == [6, 7, 8]
    assert found.slots.dtype == np.int64


def scheduler(cross_blocks: int = 20, capacity: int = 100) -> Scheduler:
    groups = [Group(BlockPool(20)), Group(BlockPool(cross_blocks), cross=True)]
    return Scheduler(Cache(groups, SIZE), 4, 100, media=MediaCache(capacity, 6))


def run(s: Scheduler) -> tuple[dict[str, int], list[bytes]]:
    plan = s.plan()
    for r, count in zip(plan.requests, plan.counts, strict=True):
        s.computed(r, count)
        r.token_ids.append(0)
    counts = dict(zip((r.request_id for r in plan.requests), plan.counts, strict=True))
    return counts, [item.digest for item in plan.encode]


def waiting(name: str, media=MEDIA, length: int = 14) -> Request:
    made = request(length, media, name)
    made.blocks = []
    return made


def test_a_known_beginning_holds_keys_of_tokens_only_and_media_behind_it_are_held_again():
    s = scheduler()
    first = waiting("first")
    s.add(first)
    counts, encoded = run(s)
    assert (counts, encoded) == ({"first": 3}, [b"a"])  # rows for 6 in a step
    assert [len(blocks) for blocks in first.blocks] == [1, 5]
    while first.num_computed < 14:
        run(s)
    s.finish(first)
    assert all(group.pool.num_free == group.pool.num_blocks for group in s.cache.groups)
    second = waiting("second")
    s.add(second)
    plan = s.plan()
    assert plan.requests == [second]
    assert (second.num_computed, plan.counts, plan.encode) == (12, [2], [])  # the runner still has c's rows
    assert [len(blocks) for blocks in second.blocks] == [4, 5]
    assert b"c" in s.media._users
    s.computed(second, 2)
    assert not s.media._users


def test_all_that_a_joining_request_sees_is_encoded_at_once():
    s = scheduler(capacity=9)
    both = placed((2, A), (3, B))
    first, other = waiting("first", both), waiting("other", placed((0, image("d", 9))), 3)
    s.add(first)
    while first.num_computed < 14:
        run(s)
    s.finish(first)
    s.add(other)
    assert run(s) == ({"other": 3}, [b"d"])  # takes all the room there is for rows
    s.finish(other)
    s.add(waiting("second", both))
    counts, encoded = run(s)
    assert (counts, encoded) == ({"second": 2}, [b"a", b"b"])  # more than the 6 of a step


def test_room_is_wanted_for_all_keys():
    s = scheduler(cross_blocks=4)
    assert not s.cache.room_for_media(waiting("r"))
    assert s.cache.room_for_media(waiting("r", placed((0, A), (5, C))))
    s = scheduler(cross_blocks=7)
    s.add(waiting("one"))
    s.add(waiting("two"))
    assert set(run(s)[0]) == {"one"}  # five blocks each


def test_what_a_step_without_requests_would_have_encoded_is_told_with_a_later_one(monkeypatch):
    s = scheduler()
    only = waiting("only")
    s.add(only)
    told = run(s)[1]
    with monkeypatch.context() as patch:  # blocks are taken by requests whose steps are under way
        patch.setattr(s.cache, "grow", lambda *_: False)
        plan = s.plan(2)
        assert (plan.requests, plan.encode) == ([], [])
    while only.num_computed < 14:
        told += run(s)[1]
    assert sorted(told) == [b"a", b"b", b"c"]


def test_what_is_forgotten_before_it_is_told_is_neither_encoded_nor_forgotten():
    media = MediaCache(9, 100)
    first, second = waiting("first", placed((0, A)), 3), waiting("second", placed((0, image("d", 9))), 3)
    media.begin()
    assert media.reach(first, 0, 3) == 3
    media.release(first)
    media.begin()
    assert media.reach(second, 0, 3) == 3
    encoded, forgotten = media.told()
    assert ([item.digest for item in encoded], forgotten) == ([b"d"], [])
    assert media.told() == ([], [])
