"""Adapters on their way to a step: those that were read, and which of them lie in a model's slots.

Decisions: files are read and checked by whoever brings a request, so that a bad adapter is refused there and no step
waits for a disk; what was read stays in memory, least recently used first to go. Which slot an adapter takes is decided
before a step, for every place: it stays there while a running request uses it, and afterwards until somebody needs the
room, so requests of many adapters share few slots without placing anything twice in a row.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from modelport.modeling.adapters import Adapter, Adapters
from modelport.request import LoRARequest


@dataclass(frozen=True)
class _Read:
    request: LoRARequest
    adapter: Adapter


class AdapterShelf:
    """The adapters that were read, by `lora_int_id`.

    :param adapters: what reads them.
    :param find: turns a `lora_path` into a folder.
    :param capacity: how many are kept.
    :param given: path of each that is read now and stays, by name.
    :raises FileNotFoundError, ValueError: one of `given` cannot be read; the message names it.
    """

    def __init__(
        self, adapters: Adapters, find: Callable[[str], Path], capacity: int, given: Mapping[str, str]
    ) -> None:
        self._adapters, self._find, self._capacity = adapters, find, max(capacity, len(given))
        self._read: OrderedDict[int, _Read] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()
        self.given = {name: LoRARequest(name, i, path) for i, (name, path) in enumerate(given.items(), start=1)}
        for request in self.given.values():
            self.get(request)

    def holds(self, wanted: LoRARequest | str) -> bool:
        """Whether `get` has it without reading a file."""
        return isinstance(wanted, str) or wanted.lora_int_id in self._read

    def get(self, wanted: LoRARequest | str) -> tuple[LoRARequest, Adapter]:
        """Read it, if nobody has before; a name is one of `given`.

        :raises FileNotFoundError: there are no such files.
        :raises ValueError: it cannot be served, its id is another one's, or nobody gave the name.
        """
        request = self._named(wanted) if isinstance(wanted, str) else wanted
        with self._lock:
            known = self._read.get(request.lora_int_id)
            if known is not None:
                self._read.move_to_end(request.lora_int_id)
        if known is None:
            try:
                known = _Read(request, self._adapters.read(self._find(request.lora_path)))
            except (FileNotFoundError, ValueError) as error:
                raise type(error)(f"adapter {request.lora_name!r}: {error}") from None
            with self._lock:
                known = self._read.setdefault(request.lora_int_id, known)
                self._drop()
        if (known.request.lora_name, known.request.lora_path) != (request.lora_name, request.lora_path):
            raise ValueError(
                f"lora_int_id={request.lora_int_id} is {known.request.lora_name!r} from {known.request.lora_path!r}, "
                f"not {request.lora_name!r} from {request.lora_path!r}; take another id, or remove_lora first"
            )
        return known.request, known.adapter

    def remove(self, lora_int_id: int) -> bool:
        """Forget one; requests that use it go on. Whether it was there."""
        with self._lock:
            found = self._read.pop(lora_int_id, None)
        if found is not None:
            self.given.pop(found.request.lora_name, None)
        return found is not None

    def ids(self) -> set[int]:
        return set(self._read)

    def _named(self, name: str) -> LoRARequest:
        if name not in self.given:
            known = ", ".join(self.given) or "none"
            raise ValueError(f"there is no adapter named {name!r} among lora_modules ({known}); bring a LoRARequest")
        return self.given[name]

    def _drop(self) -> None:
        stays = {request.lora_int_id for request in self.given.values()}
        for number in [number for number in self._read if number not in stays]:
            if len(self._read) <= self._capacity:
                break
            del self._read[number]


class AdapterSlots:
    """The slots of a model, and who uses them; a runner sees from requests what has to be placed.

    :param count: slots.
    """

    def __init__(self, count: int):
        self._empty = list(range(count - 1, -1, -1))
        self._slot_of: dict[bytes, int] = {}
        self._users: dict[bytes, int] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()  # in slots that nobody uses

    def has_room(self, adapter: Adapter) -> bool:
        """Whether `take` succeeds."""
        return adapter.digest in self._slot_of or bool(self._empty or self._idle)

    def take(self, adapter: Adapter) -> int:
        """Its slot, which it keeps until all that took it have released it."""
        digest = adapter.digest
        if digest not in self._slot_of:
            self._slot_of[digest] = self._empty.pop() if self._empty else self._evict()
        self._idle.pop(digest, None)
        self._users[digest] = self._users.get(digest, 0) + 1
        return self._slot_of[digest]

    def release(self, adapter: Adapter) -> None:
        digest = adapter.digest
        self._users[digest] -= 1
        if not self._users[digest]:
            del self._users[digest]
            self._idle[digest] = None

    def _evict(self) -> int:
        digest, _ = self._idle.popitem(last=False)
        return self._slot_of.pop(digest)
