"""Pipeline parallelism: a model's blocks are cut into stages, and a place keeps the blocks of its own.

Decisions: stages are runs of `model.blocks`, as equal in number as they can be, the first ones shorter where they
cannot, unless the user says how many: the last stage also has the head. A block that lies elsewhere is replaced by a
module that holds nothing; the first stage keeps the token embedding and what encodes media, the last one the head, and
the embedding too where they are tied. What else lies outside the blocks is small and stays everywhere, an encoder as
well: every stage runs it, since every stage's blocks read its states.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.modeling.adapters import begin
from modelport.modeling.decoder import Model, State, embed
from modelport.modeling.embedding import Embedding, LMHead
from modelport.parallel.groups import Place


class Elsewhere(nn.Module):
    """In place of what another place holds."""

    def forward(self, *args: object) -> None:
        raise AssertionError("this part of the model lies on another stage")


def stage_blocks(num_blocks: int, place: Place, counts: Sequence[int] = ()) -> range:
    """Which blocks are this place's.

    :param counts: how many each stage has, where the user has said so.
    :raises ValueError: fewer blocks than stages, or counts that do not fit.
    """
    if counts:
        if len(counts) != place.pp_size or sum(counts) != num_blocks or min(counts) < 1:
            raise ValueError(
                f"pipeline_blocks={tuple(counts)} has to be one number for each of {place.pp_size} stages, none of "
                f"them 0, and {num_blocks} in all"
            )
        start = sum(counts[: place.pp_rank])
        return range(start, start + counts[place.pp_rank])
    if num_blocks < place.pp_size:
        raise ValueError(
            f"pipeline_parallel_size={place.pp_size} stages cannot be made of {num_blocks} blocks; "
            f"use {num_blocks} or fewer"
        )
    start, end = (num_blocks * rank // place.pp_size for rank in (place.pp_rank, place.pp_rank + 1))
    return range(start, end)


def keep_stage(model: Model, place: Place, vocab_size: int, counts: Sequence[int] = ()) -> range:
    """Take away what lies on other stages; the numbers of the blocks that are left.

    :param counts: as in `stage_blocks`.
    :raises ValueError: as `stage_blocks`.
    """
    blocks = list(model.blocks)
    mine = stage_blocks(len(blocks), place, counts)
    if place.pp_size == 1:
        return mine
    kept = {id(part) for i in mine if isinstance(blocks[i], nn.Module) for part in blocks[i].modules()}
    gone = {id(block) for i, block in enumerate(blocks) if i not in mine and isinstance(block, nn.Module)} - kept
    head = model.lm_head
    tied = isinstance(head, LMHead) and head.is_tied
    if not place.is_last:
        gone.add(id(head))
    if not place.is_first and not (place.is_last and tied) and not hasattr(model, "encode"):
        tables = (m for m in model.modules() if isinstance(m, Embedding) and m.num_embeddings == vocab_size)
        gone |= {id(table) for table in tables} - kept
    if not place.is_first:
        gone |= {id(module) for module in getattr(model, "media_modules", ())}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if id(child) in gone:
                setattr(module, name, Elsewhere())
    return mine


def run_stage(model: Model, mine: range, place: Place, token_ids: Tensor, batch: Batch) -> State:
    """`forward` for one stage: (tokens,) ids, or the state of the stage before, through its blocks and onward."""
    begin(model, batch.adapters)
    state: State = embed(model, token_ids, batch) if place.is_first else place.receive()
    blocks = model.blocks
    for index in mine:
        state = blocks[index](state, batch)
    if not place.is_last:
        place.send(state)
    return state
