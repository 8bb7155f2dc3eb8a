"""`Batch`: everything one forward pass needs besides the token ids; a frozen record of tensors.

Legend: tokens = rows of this step over all sequences; seqs = sequences in this step; blocks = most blocks of one.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One step: sequences side by side, each with the rows it computes now (a prompt chunk, or one new token).

    :ivar positions: (tokens,) int64, position of each row in its own sequence.
    :ivar query_starts: (seqs + 1,) int32, first row of each sequence; the last entry is the number of rows.
    :ivar seq_lens: (seqs,) int32, keys of each sequence once this step is done (its rows are the last of them).
    :ivar block_table: (seqs, blocks) int32, cache blocks of each sequence in order.
    :ivar slots: (tokens,) int64, where each row's key and value go: block * block_size + offset.
    :ivar max_query_len: most rows of one sequence.
    :ivar max_seq_len: most keys of one sequence.
    :ivar length_classes: (seqs,) int32, `Rope.length_class` of each sequence; None for a model whose angles do not
        depend on length.
    """

    positions: Tensor
    query_starts: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slots: Tensor
    max_query_len: int
    max_seq_len: int
    length_classes: Tensor | None = None
