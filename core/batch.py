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
        (rows of `Encoded.states`,), and there the table has a row for each run of `Encoded`.
    """

    block_table: Tensor
    slots: Tensor


@dataclass(frozen=True)
class Encoded:
    """What cross attention reads: an encoder's tokens, the same for all rows of a sequence, or media.

    Media are seen by some rows only, and by rows of one sequence in turn; rows that see the same media are a run.

    :ivar states: (encoder tokens or media rows, hidden_size) of which this step is to write the keys and values; None
        when there are none.
    :ivar lens: (runs,) int32, keys of each run; a run of an encoder is a sequence.
    :ivar ends: (rows,) int32, keys that each row sees.
    :ivar query_starts: (runs + 1,) int32, first row of each run; the last entry is the number of rows.
    :ivar max_query_len: most rows of one run.
    :ivar rows: (rows,) int64, rows of the step that see media; None where all rows read an encoder.
    """

    states: Tensor | None
    lens: Tensor
    ends: Tensor
    query_starts: Tensor
    max_query_len: int
    rows: Tensor | None = None


@dataclass(frozen=True)
class Media:
    """What encoders of images, videos and sounds made, in place of token embeddings.

    :ivar rows: (media rows,) int64: which rows of this step.
    :ivar states: (media rows, width): hidden_size wide unless the model says otherwise (`merge_media`).
    """

    rows: Tensor
    states: Tensor


@dataclass(frozen=True)
class Adapted:
    """Which adapter each row is computed with: its slot, -1 for none; all int32.

    :ivar slots: (rows,) of the step's rows, or of those whose logits are computed.
    :ivar states: (rows of `Encoded.states`,) of those; None where there are none.
    :ivar seen: (rows of `Encoded.rows`,) of those; None where there are none.
    """

    slots: Tensor
    states: Tensor | None = None
    seen: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """One step: sequences side by side, each with the rows it computes now (a prompt chunk, or one new token).

    :ivar positions: (tokens,) int64, position of each row in its own sequence.
    :ivar query_starts: (seqs + 1,) int32, first row of each sequence; the last entry is the number of rows.
    :ivar seq_lens: (seqs,) int32, keys of each sequence once this step is done (its rows are the last of them).
    :ivar pages: one for each group of layers with a paged cache, by the number that a layer got when it was attached.
    :ivar state_slots: (seqs,) int32, row of each sequence in recurrent states.
    :ivar max_query_len: most rows of one sequence.
    :ivar encoded: of models with cross attention only; None where no row sees any media.
    :ivar media: rows of this step that media take; None when there are none.
    :ivar ends: (tokens,) int32, how many keys of its sequence each row sees, where some see later ones, as tokens of
        one image may; None when every row sees those up to its own.
    :ivar axes: positions for rotary embeddings with several axes (time, height, width), each (tokens,) int64; None for
        a model that has one.
    :ivar adapters: whose rows these are, where some request uses an adapter.
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
    media: Media | None = None
    ends: Tensor | None = None
    axes: tuple[Tensor, ...] | None = None
    adapters: Adapted | None = None
