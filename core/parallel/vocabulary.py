"""Tensor parallelism of what is as large as the vocabulary: token embeddings and the head, divided by tokens.

Decisions: a place looks up the tokens that it has, and the sum over the stage brings every row, exactly, since all
others are zeros; every place of the last stage computes logits of its own tokens, and they are gathered before anybody
edits or samples. A head that does something of its own with all logits stays whole, and so does a table that it shares.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from modelport.modeling.cut import Cut, Piece, cut_of
from modelport.modeling.decoder import Model
from modelport.modeling.embedding import Embedding, LMHead
from modelport.parallel.groups import Place
from modelport.parallel.tensor import Note, _cut, share


def divide_vocabulary(model: Model, place: Place, vocab_size: int) -> list[Note]:
    """Keep of tables and head the part of `place`; one note for each."""
    if place.tp_size == 1:
        return []
    parts = list(model.named_modules())
    heads = [(path, m) for path, m in parts if isinstance(m, LMHead)]
    least = max(vocab_size, place.tp_size)
    whole = {path: why for path, head in heads if (why := _why_whole(head, model, least)) is not None}
    bound = {id(head.tied[0]): f"{path} {whole[path]}" for path, head in heads if head.is_tied and path in whole}
    notes = []
    for path, table in parts:
        if type(table) is not Embedding or table.num_embeddings < least:
            continue
        if id(table) in bound:
            notes.append(Note(path, False, bound[id(table)], is_layer=False))
        else:
            notes.append(Note(path, True, _divide_table(table, place), is_layer=False))
    for path, head in heads:
        how = whole.get(path) or _divide_head(head, place)
        notes.append(Note(path, path not in whole, how, is_layer=False))
    return notes


def is_head_divided(model: Model) -> bool:
    """Whether every place of the last stage has to compute logits."""
    head = model.lm_head
    return isinstance(head, LMHead) and cut_of(head, "weight") is not None


def _why_whole(head: LMHead, model: Model, least: int) -> str | None:
    rows = _rows(head)
    if type(head) is not LMHead or head.is_tied and type(head.tied[0]) is not Embedding:
        return "does something of its own"
    if head is not model.lm_head:
        return "is not the one that the engine asks"
    if head.bias is not None and head.bias.shape[-1] != rows:
        return "has a bias of another size"
    return f"has only {rows} tokens" if rows < least else None


def _rows(head: LMHead) -> int:
    return head.tied[0].num_embeddings if head.is_tied else head.weight.shape[0]


def _divide_table(table: Embedding, place: Place) -> str:
    piece = share(table.num_embeddings, place)
    _cut(table, "weight", -2, piece)
    look_up = table.forward

    def forward(token_ids: Tensor) -> Tensor:
        local = token_ids - piece.start
        elsewhere = (local < 0) | (local >= piece.size)
        rows = look_up(local.clamp(0, piece.size - 1))  # (tokens, size)
        return place.all_reduce(rows.masked_fill(elsewhere[:, None], 0))

    table.forward = forward
    return _how(piece)


def _divide_head(head: LMHead, place: Place) -> str:
    stage = (replace(place, tp_rank=rank) for rank in range(place.tp_size))
    pieces = [share(_rows(head), other) for other in stage]
    piece = pieces[place.tp_rank]
    if head.is_tied:  # the table is cut, and what adds to logits has to know it here
        head.cuts = {"weight": Cut(-2, (piece,))}
    else:
        _cut(head, "weight", -2, piece)
    _cut(head, "bias", -1, piece)
    widest, own = max(p.size for p in pieces), head.forward

    def forward(x: Tensor) -> Tensor:
        logits = nn.functional.pad(own(x), (0, widest - piece.size))  # what is gathered has one shape
        gathered = place.all_gather(logits)
        return torch.cat([part[:, : p.size] for part, p in zip(gathered, pieces, strict=True)], 1)

    head.forward = forward
    return _how(piece)


def _how(piece: Piece) -> str:
    return f"{piece.size} of {piece.whole} tokens"
