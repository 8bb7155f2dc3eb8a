"""The paged cache: blocks that are free, shared, or hold a known beginning of a prompt, for every group of layers.

Decisions: layers that forget alike (everything kept, one sliding window, an encoder's keys) form a group with a pool of
blocks and a row of block numbers per request; a full block is known by a hash chained over all tokens before it, so
that equal beginnings, and only they, share blocks; a free block keeps its contents until it is needed, least recently
used first. Each operation costs time in the blocks that it touches.
"""

from array import array
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b

from modelport.request import Request

GONE = -1
"""In place of a block that a sliding window has passed."""


class BlockPool:
    """`num_blocks` blocks, handed out by reference count, known by a hash of what they hold."""

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # least recently used first

    @property
    def num_free(self) -> int:
        return len(self._free)

    def find(self, digest: bytes) -> int | None:
        return self._block_of.get(digest)

    def take(self) -> int:
        """The free block that was used longest ago; what it held is lost."""
        block, _ = self._free.popitem(last=False)
        digest = self._hash_of[block]
        if digest is not None:
            del self._block_of[digest]
            self._hash_of[block] = None
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1

    def publish(self, block: int, digest: bytes) -> None:
        if digest not in self._block_of:  # else a twin was computed at the same time; the first one stays known
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def release(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block] == 0:
            self._free[block] = None
            if self._hash_of[block] is None:  # nothing to remember: first to be reused
                self._free.move_to_end(block, last=False)


@dataclass(frozen=True)
class Group:
    """Layers whose blocks come and go together.

    :ivar window: keys closer than this are read; 0 for all.
    :ivar cross: holds the encoder's tokens, or media, which every request writes for itself.
    """

    pool: BlockPool
    window: int = 0
    cross: bool = False


def most_blocks(window: int, chunk: int, block_size: int) -> int:
    """Blocks that a request of any length holds at most in a group, computing up to `chunk` tokens in a step."""
    return (window + chunk) // block_size + 2 if window else 1 << 62


@dataclass(frozen=True)
class Hit:
    """A known beginning of a request: its length in tokens, and its blocks in each group."""

    num_tokens: int
    blocks: list[list[int]]


class Cache:
    """The groups of a model, and the requests' share in them.

    :param prefix_caching: look full blocks up by their tokens; without it every request computes its whole prompt.
    """

    def __init__(self, groups: list[Group], block_size: int, prefix_caching: bool = True):
        self.groups, self.block_size, self.prefix_caching = groups, block_size, prefix_caching

    @property
    def no_hit(self) -> Hit:
        return Hit(0, [[] for _ in self.groups])

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def lookup(self, request: Request) -> Hit:
        """The longest beginning of `request` that every group knows, at least one token short of its end."""
        if not self.prefix_caching:
            return self.no_hit
        most = (len(request.token_ids) - 1) // self.block_size  # the last token is computed, for its logits
        self._extend_hashes(request, most * self.block_size)
        known: list[list[int]] = [[] for _ in self.groups]
        shared = [(g, blocks) for g, blocks in zip(self.groups, known, strict=True) if not g.cross]
        for group, blocks in shared:
            for digest in request.block_hashes[:most]:
                block = group.pool.find(digest)
                if block is None and not group.window:
                    break
                blocks.append(GONE if block is None else block)
            most = min(most, len(blocks))
        shorter = True
        while shorter:  # a block that one window misses can shorten what another one needs
            shorter = False
            for group, blocks in shared:
                for index in range(most - 1, self._first_needed(group, most * self.block_size) - 1, -1):
                    if blocks[index] == GONE:  # missed by every beginning that is longer than this
                        most, shorter = index, True
                        break
        for group, blocks in shared:
            first = self._first_needed(group, most * self.block_size)
            blocks[:] = [GONE] * first + blocks[first:most]
        return Hit(most * self.block_size, known)

    def room_for_media(self, request: Request) -> bool:
        """Whether what cross attention reads of `request` fits, were it alone."""
        return all(self._blocks(g, request, 0) <= g.pool.num_blocks for g in self.groups if g.cross)

    def missing(self, request: Request, chunk: int) -> bool:
        """Whether blocks are short for all tokens of `request`, when it computes up to `chunk` of them in a step."""
        return any(
            min(self._blocks(group, request, len(request.token_ids)), most_blocks(group.window, chunk, self.block_size))
            - sum(block != GONE for block in blocks)
            > group.pool.num_free
            for group, blocks in zip(self.groups, request.blocks, strict=True)
        )

    def share(self, request: Request, hit: Hit) -> None:
        """Give `request`, which holds no blocks, those that `lookup` found."""
        assert not request.blocks
        for group, known in zip(self.groups, hit.blocks, strict=True):
            for block in known:
                if block != GONE:
                    group.pool.share(block)
        request.blocks = [list(known) for known in hit.blocks]
        request.num_published = hit.num_tokens // self.block_size

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Give `request` blocks for `num_tokens` in all; False, and nothing changed, when a group has too few."""
        wanted = [
            self._blocks(group, request, num_tokens) - len(blocks)
            for group, blocks in zip(self.groups, request.blocks, strict=True)
        ]
        if any(count > group.pool.num_free for group, count in zip(self.groups, wanted, strict=True)):
            return False
        for group, blocks, count in zip(self.groups, request.blocks, wanted, strict=True):
            for _ in range(count):
                blocks.append(group.pool.take())
        return True

    def computed(self, request: Request) -> None:
        """Make the blocks that `request` has filled known to others, and give back those behind a sliding window."""
        full = request.num_computed // self.block_size
        if self.prefix_caching and full > request.num_published:
            self._extend_hashes(request, full * self.block_size)
            for group, blocks in zip(self.groups, request.blocks, strict=True):
                for index in range(request.num_published, full) if not group.cross else ():
                    if blocks[index] != GONE:
                        group.pool.publish(blocks[index], request.block_hashes[index])
            request.num_published = full
        for group, blocks in zip(self.groups, request.blocks, strict=True):
            if group.window:
                index = self._first_needed(group, request.num_computed) - 1
                while index >= 0 and blocks[index] != GONE:
                    group.pool.release(blocks[index])
                    blocks[index] = GONE
                    index -= 1

    def release(self, request: Request) -> None:
        """Take back all blocks; the end of the sequence is forgotten before its beginning."""
        for group, blocks in zip(self.groups, request.blocks, strict=True):
            for block in reversed(blocks):
                if block != GONE:
                    group.pool.release(block)
        request.blocks = []
        request.num_published = 0

    def _blocks(self, group: Group, request: Request, num_tokens: int) -> int:
        if not group.cross:
            return self.blocks_for(num_tokens)
        # Every view begins with a block, so that it can be read by itself.
        return self.blocks_for(len(request.encoder_token_ids)) + sum(
            self.blocks_for(view.num_keys) for view in request.views
        )

    def _first_needed(self, group: Group, num_tokens: int) -> int:
        """First block that the token after `num_tokens` reads."""
        return max(0, num_tokens - group.window + 1) // self.block_size if group.window else 0

    def _extend_hashes(self, request: Request, num_tokens: int) -> None:
        size, hashes = self.block_size, request.block_hashes
        root = b"%d" % request.length_class  # keys of other rotary angles are other keys, and those of other adapters
        if request.adapter is not None:
            root += request.adapter.digest
        for index in range(len(hashes), num_tokens // size):
            tokens = array("q", request.token_ids[index * size : (index + 1) * size])
            parent = hashes[-1] if hashes else root
            marks = _marks(request, index * size, (index + 1) * size) if request.marks else b""
            hashes.append(blake2b(parent + tokens.tobytes() + marks, digest_size=16).digest())


def _marks(request: Request, start: int, end: int) -> bytes:
    """What else the keys of these tokens depend on, and where it lies among them."""
    found = ((first - start, digest) for first, last, digest in request.marks if first < end and last > start)
    return b"".join(b"%d:" % offset + digest for offset, digest in found)
