"""The adapters of one layer, stacked, and what they add to its result.

Decisions: a layer that no adapter has changed holds nothing and adds nothing; room is made when the first one comes,
for its rank, and grows with the largest. Of a layer that several places divide, a place cuts its part out of an adapter
as the loader cut it out of the weight (`module.cuts`), which makes what it adds its part of the sum.

Legend: rows = rows of the layer's input; rank = room for ranks; part = of a fused layer.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from modelport.batch import Adapted
from modelport.kernels.lora import LowRank, lora_
from modelport.modeling.cut import Cut, Piece
from modelport.modeling.embedding import Embedding
from modelport.modeling.latent import UpProjection
from modelport.modeling.moe import Experts, Router

Pair = tuple[Tensor, Tensor]
"""(rank, in) and (out, rank) float32; the adapter's scale is in the second."""


class Rows:
    """Whose the rows are that layers compute now; one for all layers of a model.

    :ivar now: None where no row uses an adapter.
    """

    def __init__(self) -> None:
        self.now: Adapted | int | None = None

    def of(self, count: int, device: torch.device) -> Tensor:
        """(count,) int32 slots of a layer's rows; there are several kinds in one step, of different numbers."""
        now = self.now
        if isinstance(now, int):
            return torch.full((count,), now, dtype=torch.int32, device=device)
        if len(now.slots) == count:
            return now.slots
        assert now.seen is not None, count
        assert len(now.seen) == count, (count, len(now.slots))
        return now.seen

    def of_states(self) -> Tensor:
        """(rows,) of what cross attention reads."""
        return self.now.states


class Layer:
    """A linear layer, or any that is one for its adapters.

    :param widths: outputs of each part of the whole layer, as the checkpoint has it.
    :param in_features: of the whole layer.
    :param reads_states: its rows are those of `Encoded.states`.
    """

    def __init__(
        self, module: nn.Module, rows: Rows, slots: int, in_features: int, widths: Sequence[int], dtype: torch.dtype,
        reads_states: bool = False,
    ):  # fmt: skip
        self.module, self.rows, self.slots, self.dtype = module, rows, slots, dtype
        self.in_features, self.widths, self.reads_states = in_features, tuple(widths), reads_states
        self.low_rank: LowRank | None = None
        module.update = self.update

    def update(self, x: Tensor, out: Tensor) -> Tensor:
        if self.rows.now is not None and self.low_rank is not None:
            slots = self.rows.of_states() if self.reads_states else self.rows.of(len(x), x.device)
            lora_(out, x, slots, self.low_rank)
        return out

    def place(self, slot: int, pairs: Mapping[int, Pair], device: torch.device) -> bool:
        """Put the pair of each part into a slot, or nothing; whether anything else has moved."""
        if not pairs and self.low_rank is None:
            return False
        made = {part: self._cut(part, *pair) for part, pair in pairs.items()}
        edges = self._edges()
        moved = self._make_room(max((len(a) for a, _ in made.values()), default=0), edges, device)
        _fill(self.low_rank, slot, made)
        return moved

    def _cut(self, part: int, a: Tensor, b: Tensor) -> Pair:
        """This place's part of a pair."""
        cut = _cut_of(self.module)
        if cut is None:
            return a, b
        pieces = cut.of(part if len(self.widths) > 1 else None)
        if cut.dim == -1:
            return _narrowed(a, 1, pieces), b
        return a, _narrowed(b, 0, pieces)

    def _edges(self) -> tuple[int, ...]:
        cut = _cut_of(self.module)
        if cut is None or cut.dim == -1:
            return (0, *itertools.accumulate(self.widths))
        sizes = [piece.size for piece in cut.pieces]
        return (0, *itertools.accumulate(sizes if len(self.widths) > 1 else [sum(sizes)]))

    def _inputs(self) -> int:
        cut = _cut_of(self.module)
        return self.in_features if cut is None or cut.dim != -1 else cut.pieces[0].size

    def _make_room(self, rank: int, edges: tuple[int, ...], device: torch.device) -> bool:
        if self.low_rank is not None and self.low_rank.b.shape[1] >= rank:
            return False
        self.low_rank = _roomier(self.low_rank, self.slots, rank, self._inputs(), edges, self.dtype, device)
        return True


class EmbeddingLayer(Layer):
    """A table of rows: an adapter's `a` is one too, (rank, num_embeddings)."""

    def __init__(self, module: Embedding, rows: Rows, slots: int, dtype: torch.dtype):
        super().__init__(module, rows, slots, module.num_embeddings, (module.size,), dtype)
        self.tables: Tensor | None = None  # (slots, embeddings of this place, rank)

    def update(self, token_ids: Tensor, out: Tensor) -> Tensor:
        if self.rows.now is None or self.low_rank is None:
            return out
        slots = self.rows.of(len(token_ids), token_ids.device)
        low = self.tables[slots.clamp(min=0).long(), token_ids]  # (tokens, rank)
        lora_(out, low, slots, self.low_rank)
        return out

    def place(self, slot: int, pairs: Mapping[int, Pair], device: torch.device) -> bool:
        if not pairs and self.low_rank is None:
            return False
        cut = _cut_of(self.module)  # of a divided table, which is asked for its own rows
        count = self.in_features if cut is None else sum(piece.size for piece in cut.pieces)
        rank = max((len(a) for a, _ in pairs.values()), default=0)
        known = 0 if self.low_rank is None else self.low_rank.b.shape[1]
        if rank > known:
            tables = torch.zeros(self.slots, count, rank, dtype=self.dtype, device=device)
            if known:
                tables[:, :, :known] = self.tables
            self.tables = tables
            self.low_rank = _roomier(self.low_rank, self.slots, rank, rank, (0, *self.widths), self.dtype, device)
        self.tables[slot] = 0
        made = {}
        for part, (a, b) in pairs.items():
            mine = a if cut is None else _narrowed(a, 1, cut.of(None))
            self.tables[slot, :, : len(a)] = mine.T
            made[part] = torch.eye(len(a), max(rank, known)), b  # rows that were looked up are as `a` leaves them
        _fill(self.low_rank, slot, made)
        return rank > known


class RouterLayer(Layer):
    """Logits of experts, which may be computed in float32 whatever the model's type."""

    def __init__(self, module: Router, rows: Rows, slots: int, in_features: int, dtype: torch.dtype):
        dtype = torch.float32 if module.exact else dtype
        super().__init__(module, rows, slots, in_features, (module.num_experts,), dtype)


class LatentLayer:
    """`kv_b_proj` of latent attention, multiplied from both sides; every head has a low-rank product of its own.

    A key is `(up_k + b_k @ a) @ latent`, so a query of it gains `(q @ b_k) @ a`; a value gains `b_v @ (a @ mixed)`.
    """

    def __init__(self, module: UpProjection, rows: Rows, slots: int, dtype: torch.dtype):
        self.module, self.rows, self.slots, self.dtype = module, rows, slots, dtype
        self.in_features, self.widths = module.in_features, (module.out_features,)
        self.keys: LowRank | None = None
        self.values: LowRank | None = None
        module.update_k, module.update_v = self.update_k, self.update_v

    def update_k(self, q: Tensor, out: Tensor) -> Tensor:
        return self._add(q, out, self.keys)

    def update_v(self, mixed: Tensor, out: Tensor) -> Tensor:
        return self._add(mixed, out, self.values)

    def _add(self, x: Tensor, out: Tensor, low_rank: LowRank | None) -> Tensor:
        """x: (tokens, heads, size), out: (tokens, heads, size of the result)."""
        if self.rows.now is None or low_rank is None:
            return out
        slots, heads = self.rows.of(len(x), x.device)[:, None], x.shape[1]
        each = torch.where(slots >= 0, slots * heads + torch.arange(heads, dtype=torch.int32, device=x.device), -1)
        added = torch.zeros(x.shape[0] * heads, out.shape[2], dtype=x.dtype, device=x.device)
        lora_(added, x.reshape(-1, x.shape[2]), each.flatten().to(torch.int32), low_rank)
        return out + added.view(out.shape)

    def place(self, slot: int, pairs: Mapping[int, Pair], device: torch.device) -> bool:
        if not pairs and self.keys is None:
            return False
        heads, nope, wide = self.module.sizes  # of this place
        rank = max((len(a) for a, _ in pairs.values()), default=0)
        moved = self.keys is None or self.keys.b.shape[1] < rank
        if moved:
            count = self.slots * heads
            self.keys = _roomier(self.keys, count, rank, nope, (0, self.in_features), self.dtype, device)
            self.values = _roomier(self.values, count, rank, self.in_features, (0, wide), self.dtype, device)
        mine = slice(slot * heads, (slot + 1) * heads)
        for low_rank in (self.keys, self.values):
            for part in (low_rank.a, low_rank.b, low_rank.ranks):
                part[mine] = 0
        for a, b in pairs.values():
            cut = _cut_of(self.module)
            b = b if cut is None else _narrowed(b, 0, cut.of(None))
            keys, values = b.view(heads, nope + wide, -1).transpose(1, 2).split((nope, wide), dim=2)
            self.keys.a[mine, : len(a)], self.keys.b[mine, : len(a)] = keys, a
            self.values.a[mine, : len(a)], self.values.b[mine, : len(a)] = a, values
            self.keys.ranks[mine] = self.values.ranks[mine] = len(a)
        return moved


class ExpertsLayer:
    """All experts of a mixture: adapters of two layers each, in slots of their own for every expert."""

    def __init__(self, module: Experts, rows: Rows, slots: int, dtype: torch.dtype):
        self.module, self.rows, self.slots, self.dtype = module, rows, slots, dtype
        self.stacks: dict[str, LowRank] = {}
        module.update = self.update

    def update(self, module: Experts, x: Tensor, shares: Tensor, ids: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.rows.now is None or not self.stacks:
            return module.compute(x, shares, ids, residual)
        (tokens, chosen), count = ids.shape, len(self._local())
        slots = self.rows.of(tokens, x.device)[:, None]
        each = torch.where((slots >= 0) & (ids >= 0), slots * count + ids, -1).to(torch.int32).flatten()
        width = module.down_proj.packed.in_features
        extra = torch.zeros(tokens, chosen, 2, width, dtype=x.dtype, device=x.device)
        if "gate_up_proj" in self.stacks:
            spread = x[:, None].expand(-1, chosen, -1).reshape(tokens * chosen, -1)
            lora_(extra.view(tokens * chosen, 2 * width), spread, each, self.stacks["gate_up_proj"])
        if "down_proj" not in self.stacks:
            return module.compute(x, shares, ids, residual, extra)
        inner = torch.zeros(tokens, chosen, width, dtype=x.dtype, device=x.device)
        out = module.compute(x, shares, ids, residual, extra, inner)
        added = torch.zeros(tokens * chosen, out.shape[1], dtype=x.dtype, device=x.device)
        lora_(added, inner.view(tokens * chosen, width), each, self.stacks["down_proj"])
        return (out.float() + (added.view(tokens, chosen, -1).float() * shares[..., None]).sum(1)).to(out.dtype)

    def place(self, slot: int, pairs: Mapping[tuple[str, int, int], Pair], device: torch.device) -> bool:
        """Pairs by the layer ("gate_up_proj", "down_proj"), the expert and the part."""
        local, moved = self._local(), False
        for name in ("gate_up_proj", "down_proj"):
            mine = {(expert, part): pair for (layer, expert, part), pair in pairs.items() if layer == name}
            if not mine and name not in self.stacks:
                continue
            linear, known = getattr(self.module, name), self.stacks.get(name)
            rank = max((len(a) for a, _ in mine.values()), default=0)
            if known is None or known.b.shape[1] < rank:
                widths = [linear.packed.out_features] * len(linear.names)
                self.stacks[name] = _roomier(
                    known, self.slots * len(local), rank, linear.packed.in_features,
                    (0, *itertools.accumulate(widths)), self.dtype, device,
                )  # fmt: skip
                moved = True
            for index, expert in enumerate(local):
                of_expert = {
                    part: self._cut(linear, part, *mine[expert, part])
                    for part in range(len(linear.names))
                    if (expert, part) in mine
                }
                _fill(self.stacks[name], slot * len(local) + index, of_expert)
        return moved

    def _local(self) -> range:
        """The experts of this place."""
        cut = _cut_of(self.module.down_proj)
        if cut is not None and cut.whole_parts:
            return range(cut.pieces[0].start, cut.pieces[0].start + cut.pieces[0].size)
        return range(len(self.module.down_proj.packed.data))

    def _cut(self, linear: nn.Module, part: int, a: Tensor, b: Tensor) -> Pair:
        cut = _cut_of(linear)
        if cut is None or cut.whole_parts:
            return a, b
        pieces = cut.of(part)
        return (_narrowed(a, 1, pieces), b) if cut.dim == -1 else (a, _narrowed(b, 0, pieces))


def _narrowed(tensor: Tensor, dim: int, pieces: Iterable[Piece]) -> Tensor:
    """What of it is on this place."""
    return torch.cat([tensor.narrow(dim, piece.start, piece.size) for piece in pieces], dim)


def _cut_of(module: nn.Module) -> Cut | None:
    """What of the weight is on this place; None when all is."""
    return getattr(module, "cuts", {}).get("weight")


def _roomier(
    known: LowRank | None, slots: int, rank: int, size: int, edges: tuple[int, ...], dtype: torch.dtype,
    device: torch.device,
) -> LowRank:  # fmt: skip
    """One with room for a larger rank, with all that is known."""
    parts = len(edges) - 1
    a = torch.zeros(slots, parts, rank, size, dtype=dtype, device=device)
    b = torch.zeros(slots, rank, edges[-1], dtype=dtype, device=device)
    ranks = torch.zeros(slots, dtype=torch.int32, device=device)
    if known is not None:
        before = known.b.shape[1]
        a[:, :, :before, : known.a.shape[2]] = known.a.unflatten(1, (parts, before))
        b[:, :before], ranks = known.b, known.ranks
    return LowRank(a.flatten(1, 2), b, ranks, edges)


def _fill(low_rank: LowRank, slot: int, pairs: Mapping[int, Pair]) -> None:
    """Put the pair of each part into a slot, and zeros everywhere else in it."""
    rank = low_rank.b.shape[1]
    if low_rank.ranks[slot]:
        low_rank.a[slot] = 0
        low_rank.b[slot] = 0
    low_rank.ranks[slot] = max((len(a) for a, _ in pairs.values()), default=0)
    for part, (a, b) in pairs.items():
        low_rank.a[slot, part * rank : part * rank + len(a)] = a
        low_rank.b[slot, : len(a), low_rank.edges[part] : low_rank.edges[part + 1]] = b.T
