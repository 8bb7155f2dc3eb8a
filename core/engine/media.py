"""Which media are encoded in a step, and which rows stay with the runner: decided before the step, for every place.

Decisions: rows of an item are kept while a running request still has tokens of it to compute, afterwards as long as
there is room, least recently used first; a step encodes at least one item and no more than its budget of rows, and a
prompt is cut before an item that must wait.
"""

from collections import OrderedDict

from modelport.inputs.processor import MediaItem
from modelport.request import Request


class MediaCache:
    """The items whose rows the runner holds.

    :param capacity: rows that it holds at most; the longest item of a prompt fits.
    :param rows_per_step: rows that a step encodes at most, unless its first item has more.
    """

    def __init__(self, capacity: int, rows_per_step: int):
        self.capacity, self.rows_per_step = capacity, rows_per_step
        self._encode: dict[bytes, MediaItem] = {}  # what the runner has not been told yet
        self._forget: list[bytes] = []
        self._rows: dict[bytes, int] = {}
        self._users: dict[bytes, int] = {}
        self._free: OrderedDict[bytes, None] = OrderedDict()
        self._held: dict[int, set[bytes]] = {}  # id of a request -> what is kept for it
        self._used = self._spent = 0

    def begin(self) -> None:
        """A new step."""
        self._spent = 0

    def told(self) -> tuple[list[MediaItem], list[bytes]]:
        """Items that this step encodes, and digests whose rows the runner drops before it does so.

        What a step without requests would have done is left to the next one: it is not run.
        """
        found = list(self._encode.values()), self._forget
        self._encode, self._forget = {}, []
        return found

    def reach(self, request: Request, start: int, count: int, joins: bool = False) -> int:
        """How many of `count` tokens from `start` on this step can compute; their media are held for it.

        :param joins: the request has nothing in the runner yet, so what cross attention reads of the media before
            `start` is written as well.
        """
        held = self._held.setdefault(id(request), set())
        again = {p.item.digest for v in request.views if v.start < start < v.end for p in v.placed} if joins else ()
        for placed in request.media:
            digest = placed.item.digest
            if digest in held or placed.end <= start and digest not in again:
                continue
            if placed.start >= start + count:
                break
            if digest in self._rows:
                self._free.pop(digest, None)
            elif not self._take(placed.item, placed.end <= start):
                return max(0, placed.start - start)
            held.add(digest)
            self._users[digest] = self._users.get(digest, 0) + 1
        return count

    def computed(self, request: Request) -> None:
        """Let go of the media that `request` has passed."""
        held = self._held.get(id(request))
        if held:
            needed = {placed.item.digest for placed in request.media if placed.end > request.num_computed}
            self._release(held - needed)
            held &= needed

    def release(self, request: Request) -> None:
        """Let go of all that is held for `request`."""
        self._release(self._held.pop(id(request), set()))

    def _take(self, item: MediaItem, at_once: bool = False) -> bool:
        if not at_once and self._spent and self._spent + item.num_rows > self.rows_per_step:
            return False
        excess = self._used + item.num_rows - self.capacity
        if excess > sum(self._rows[digest] for digest in self._free):
            return False
        while excess > 0:
            digest, _ = self._free.popitem(last=False)
            excess -= self._rows[digest]
            self._used -= self._rows.pop(digest)
            if self._encode.pop(digest, None) is None:
                self._forget.append(digest)
        self._rows[item.digest] = item.num_rows
        self._used += item.num_rows
        self._spent += item.num_rows
        self._encode[item.digest] = item
        return True

    def _release(self, digests: set[bytes]) -> None:
        for digest in sorted(digests):
            self._users[digest] -= 1
            if not self._users[digest]:
                del self._users[digest]
                self._free[digest] = None
