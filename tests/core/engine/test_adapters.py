"""Slots and the shelf: who stays, who goes, and who waits."""

from collections import namedtuple
from pathlib import Path

import pytest

from modelport.engine.adapters import AdapterShelf, AdapterSlots
from modelport.engine.cache import BlockPool, Cache, Group
from modelport.engine.scheduler import Scheduler
from modelport.request import LoRARequest, Request
from modelport.sampling_params import SamplingParams

Adapter = namedtuple("Adapter", ["path", "digest"])
A, B, C = (Adapter(Path(name), name.encode()) for name in "abc")


def test_slots_are_kept_while_used_and_given_to_the_longest_idle():
    slots = AdapterSlots(2)
    assert (slots.take(A), slots.take(B), slots.take(A)) == (0, 1, 0)
    assert not slots.has_room(C)
    slots.release(A)
    assert not slots.has_room(C)
    slots.release(B)
    slots.release(A)
    assert slots.has_room(C)
    assert slots.take(C) == 1  # B went before A
    assert slots.take(A) == 0  # where it was


def scheduler(slots: int) -> Scheduler:
    cache = Cache([Group(BlockPool(64))], 4)
    return Scheduler(cache, 8, 64, adapters=AdapterSlots(slots))


def request(name: str, adapter: Adapter | None) -> Request:
    return Request(name, [1, 2, 3], 3, SamplingParams(), 0, (), 10, None, adapter=adapter)


def test_those_without_a_slot_are_passed_by():
    plans = scheduler(1)
    several = [request(*x) for x in (("1", A), ("2", B), ("3", None), ("4", A))]
    for one in several:
        plans.add(one)
    plan = plans.plan()
    assert [r.request_id for r in plan.requests] == ["1", "3", "4"]
    assert [r.adapter_slot for r in plan.requests] == [0, -1, 0]
    for one in plan.requests:
        plans.computed(one, 3)
        plans.finish(one)
    plan = plans.plan()
    assert [r.request_id for r in plan.requests] == ["2"]
    assert plan.requests[0].adapter_slot == 0


def test_nobody_is_passed_by_forever(monkeypatch):
    monkeypatch.setattr("modelport.engine.scheduler._PATIENCE", 3)
    plans = scheduler(1)
    plans.add(request("long", A))
    plans.plan()
    plans.add(request("waits", B))
    for number in range(6):
        plans.add(request(str(number), A))
    passed = [r.request_id for _ in range(4) for r in plans.plan().joined]
    assert passed == ["0", "1", "2"]


class Reads:
    def __init__(self):
        self.read_paths = []

    def read(self, path):
        if "bad" in str(path):
            raise ValueError("it is bad")
        self.read_paths.append(str(path))
        return Adapter(path, str(path).encode())


def test_the_shelf_reads_once_and_forgets_the_longest_unused():
    reads = Reads()
    shelf = AdapterShelf(reads, Path, 2, {})
    first, second, third = (LoRARequest(f"r{i}", i, f"p{i}") for i in (1, 2, 3))
    for wanted in (first, second, first, third, first):
        assert shelf.get(wanted)[1].path == Path(wanted.lora_path)
    assert reads.read_paths == ["p1", "p2", "p3"]
    assert shelf.ids() == {1, 3}
    shelf.get(second)
    assert reads.read_paths[-1] == "p2"
    assert shelf.remove(2)
    assert not shelf.remove(2)


def test_what_was_given_stays():
    reads = Reads()
    shelf = AdapterShelf(reads, Path, 1, {"x": "px", "y": "py"})
    for number in (7, 8, 9):
        shelf.get(LoRARequest(f"r{number}", number, f"p{number}"))
    assert {1, 2} <= shelf.ids()
    assert shelf.get("y")[0] == LoRARequest("y", 2, "py")
    with pytest.raises(ValueError, match="adapter 'z': it is bad"):
        AdapterShelf(reads, Path, 1, {"z": "bad"})
