"""Cross attention to media in one step: which rows see which keys, and which keys are written.

Decisions: rows of a request that see the same media are a run, which attention takes for a sequence; the keys of a view
(`Request.views`) begin with a block of their own, so that a run's table is a piece of the request's blocks. Keys are
written by the step that computes the media's tokens, and again where a request joins behind them: what it found in the
cache holds the keys of tokens only.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np

from modelport.engine.scheduler import Plan


@dataclass(frozen=True)
class Crossing:
    """Arrays of `Encoded` and of the group's `Pages`.

    :ivar written: digests of the media whose keys are written, in the order of `slots`.
    """

    rows: np.ndarray
    lens: np.ndarray
    ends: np.ndarray
    query_starts: np.ndarray
    block_table: np.ndarray
    slots: np.ndarray
    written: list[bytes]


def crossing(
    plan: Plan, starts: Sequence[int], group: int, block_size: int, encoded: Container[bytes]
) -> Crossing | None:
    """What the rows of a step see; None where none sees any media.

    :param starts: first row of each request.
    :param group: whose blocks hold the keys.
    :param encoded: digests of media that have rows; the others could not be encoded, and their requests end.
    """
    joined = {id(request) for request in plan.joined}
    rows, lens, ends, tables, slots, written = [], [], [], [], [], []
    for request, count, first in zip(plan.requests, plan.counts, starts, strict=False):
        begin, stop, used = request.num_computed, request.num_computed + count, 0
        for view in request.views:
            num_blocks = -(-view.num_keys // block_size)
            blocks = np.asarray(request.blocks[group][used : used + num_blocks], dtype=np.int32)
            used += num_blocks
            low, high = max(begin, view.start), min(stop, view.end)
            if low >= high:
                continue
            seen, known = np.zeros(high - low, dtype=np.int32), 0
            for placed in view.placed:
                if placed.start >= stop:
                    break
                seen[max(placed.start - low, 0) :] += placed.item.num_keys
                if (placed.start >= begin or id(request) in joined) and placed.item.digest in encoded:
                    places = np.arange(known, known + placed.item.num_keys)
                    slots.append(blocks[places // block_size].astype(np.int64) * block_size + places % block_size)
                    written.append(placed.item.digest)
                known += placed.item.num_keys
            rows.append(np.arange(low, high) - begin + first)
            ends.append(seen)
            lens.append(known)
            tables.append(blocks)
    if not rows:
        return None
    table = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
    for row, blocks in zip(table, tables, strict=True):
        row[: len(blocks)] = blocks
    return Crossing(
        np.concatenate(rows).astype(np.int64),
        np.asarray(lens, dtype=np.int32),
        np.concatenate(ends),
        np.cumsum([0, *map(len, rows)], dtype=np.int32),
        table,
        np.concatenate(slots) if slots else np.zeros(0, dtype=np.int64),
        written,
    )
