"""Blocks of the key-value cache: which are free, which are shared, and which hold a known beginning of a prompt.

Decisions: a full block is known by a hash chained over all tokens before it, so that equal beginnings, and only they,
share blocks; a free block keeps its contents until it is needed, least recently used first. Each operation costs time
in the blocks that it touches.
"""

from array import array
from collections import OrderedDict
from hashlib import blake2b

from modelport.request import Request


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, handed out by reference count.

    :param prefix_caching: look full blocks up by their tokens; without it every request computes its whole prompt.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True):
        self.num_blocks, self.block_size, self.prefix_caching = num_blocks, block_size, prefix_caching
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # least recently used first

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def lookup(self, request: Request) -> list[int]:
        """The longest chain of known blocks at the beginning of `request`, at least one token short of its end."""
        if not self.prefix_caching:
            return []
        known: list[int] = []
        self._extend_hashes(request, len(request.token_ids) - 1)  # the last token is computed, for its logits
        for digest in request.block_hashes[: (len(request.token_ids) - 1) // self.block_size]:
            block = self._block_of.get(digest)
            if block is None:
                break
            known.append(block)
        return known

    def share(self, request: Request, known: list[int]) -> None:
        """Give `request`, which holds no blocks, those that `lookup` found."""
        assert not request.blocks
        for block in known:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1
        request.blocks.extend(known)
        request.num_published = len(known)

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Give `request` blocks for `num_tokens` in all; False, and nothing changed, when there are too few."""
        wanted = self.blocks_for(num_tokens) - len(request.blocks)
        if wanted > len(self._free):
            return False
        for _ in range(wanted):
            block, _ = self._free.popitem(last=False)
            digest = self._hash_of[block]
            if digest is not None:  # its old contents are lost now
                del self._block_of[digest]
                self._hash_of[block] = None
            self._references[block] = 1
            request.blocks.append(block)
        return True

    def publish(self, request: Request) -> None:
        """Make the blocks that `request` has filled known to others; called after their keys are written."""
        if not self.prefix_caching:
            return
        self._extend_hashes(request, request.num_computed)
        full = request.num_computed // self.block_size
        for index in range(request.num_published, full):
            digest, block = request.block_hashes[index], request.blocks[index]
            if digest not in self._block_of:  # else a twin was computed at the same time; the first one stays known
                self._block_of[digest] = block
                self._hash_of[block] = digest
        request.num_published = full

    def release(self, request: Request) -> None:
        """Take back all blocks; the end of the sequence is forgotten before its beginning."""
        for block in reversed(request.blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._hash_of[block] is None:  # nothing to remember: first to be reused
                    self._free.move_to_end(block, last=False)
        request.blocks.clear()
        request.num_published = 0

    def _extend_hashes(self, request: Request, num_tokens: int) -> None:
        size, hashes = self.block_size, request.block_hashes
        for index in range(len(hashes), num_tokens // size):
            tokens = array("q", request.token_ids[index * size : (index + 1) * size])
            parent = hashes[-1] if hashes else b""
            hashes.append(blake2b(parent + tokens.tobytes(), digest_size=16).digest())
