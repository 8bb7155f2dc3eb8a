"""`Batch`: everything one forward pass needs besides the token ids; a frozen record of tensors.

Legend: tokens = rows of this step over all sequences; seqs = sequences in this step; blocks = most blocks of one.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pages:
    """Where a group of layers finds its paged keys and values; layers that forget alike share one.

    :ivar block_table: (seqs, blocks) int32, cache blocks of each sequence in order; anything where they were given
        back because a sliding window has passed them.
    :ivar slots: where new keys and values go, block * block_size + offset: (tokens,) int64; in cross attention
        (encoder tokens of this step,).
    """

    block_table: Tensor
    slots: Tensor


@dataclass(frozen=True)
class Encoded:
    """What cross attention reads.

    :ivar states: (encoder tokens of this step, hidden_size) of the sequences that start in this step; None when none
        does. Their keys and values are to be written.
    :ivar lens: (seqs,) int32, keys of each sequence.
    :ivar ends: (tokens,) int32, the same for each row.
    """

    states: Tensor | None
    lens: Tensor
    ends: Tensor


@dataclass(frozen=True)
class Batch:
    """One step: sequences side by side, each with the rows it computes now (a prompt chunk, or one new token).

    :ivar positions: (tokens,) int64, position of each row in its own sequence.
    :ivar query_starts: (seqs + 1,) int32, first row of each sequence; the last entry is the number of rows.
    :ivar seq_lens: (seqs,) int32, keys of each sequence once this step is done (its rows are the last of them).
    :ivar pages: one for each group of layers with a paged cache, by the number that a layer got when it was attached.
    :ivar state_slots: (seqs,) int32, row of each sequence in recurrent states.
    :ivar max_query_len: most rows of one sequence.
    :ivar encoded: of encoder-decoder models only.
    :ivar length_classes: (seqs,) int32, `Rope.length_class` of each sequence; None for a model whose angles do not
        depend on length.
    """

    positions: Tensor
    query_starts: Tensor
    seq_lens: Tensor
    pages: tuple[Pages, ...]
    state_slots: Tensor
    max_query_len: int
    encoded: Encoded | None = None
    length_classes: Tensor | None = None
