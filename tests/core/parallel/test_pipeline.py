"""Stages: which blocks lie where, what a stage keeps besides, and that nothing else of the checkpoint is read."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modelport.config import TextConfig
from modelport.modeling import CausalLM, RMSNorm
from modelport.parallel.groups import Place, ThreadHub
from modelport.parallel.pipeline import Elsewhere, keep_stage, run_stage, stage_blocks

NO_MEDIA = SimpleNamespace(media=None, adapters=None)
"""All that the model below reads of a batch."""


def place(stage: int, stages: int, hub: ThreadHub | None = None) -> Place:
    return Place.of(stage, 1, stages, (hub or ThreadHub()).links(stage))


class Block(nn.Module):
    """The state becomes a pair at the third block and stays one."""

    def __init__(self, cfg: TextConfig, layer: int):
        super().__init__()
        self.layer, self.table = layer, nn.Parameter(torch.full((4,), float(layer + 1)), requires_grad=False)

    def forward(self, state, batch):
        x, *kept = state if isinstance(state, tuple) else (state,)
        kept = [x] if self.layer == 2 else kept
        x = x * 1.5 + self.table + sum(kept)
        return (x, *kept) if kept else x


def model(tied: bool = False) -> CausalLM:
    cfg = TextConfig(vocab_size=7, hidden_size=4, num_hidden_layers=5, num_attention_heads=1, tie_word_embeddings=tied)
    made = CausalLM(cfg, Block, RMSNorm(4))
    torch.manual_seed(0)
    nn.init.normal_(made.model.embed_tokens.weight)
    made.model.embed_tokens.is_shared = False
    return made


@pytest.mark.parametrize(("blocks", "stages", "sizes"), [(5, 2, [2, 3]), (6, 3, [2, 2, 2]), (7, 4, [1, 2, 2, 2])])
def test_stages_hold_every_block_once(blocks: int, stages: int, sizes: list[int]) -> None:
    found = [stage_blocks(blocks, place(stage, stages)) for stage in range(stages)]
    assert [i for mine in found for i in mine] == list(range(blocks))
    assert [len(mine) for mine in found] == sizes


def test_more_stages_than_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pipeline_parallel_size=3 stages cannot be made of 2 blocks; use 2 or fewer"):
        stage_blocks(2, place(0, 3))


@pytest.mark.parametrize("tied", [False, True])
def test_a_stage_keeps_its_blocks_and_its_end(tied: bool) -> None:
    kept = []
    for stage in range(3):
        part = model(tied)
        keep_stage(part, place(stage, 3), 7)
        gone = {name for name, module in part.named_modules() if isinstance(module, Elsewhere)}
        kept.append(
            ({"lm_head", "model.embed_tokens"} - gone, {i for i in range(5) if f"model.layers.{i}" not in gone})
        )
    last = {"lm_head", "model.embed_tokens"} if tied else {"lm_head"}
    assert kept == [({"model.embed_tokens"}, {0}), (set(), {1, 2}), (last, {3, 4})]


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_stages_in_a_row_are_the_whole_model(stages: int) -> None:
    ids = torch.tensor([1, 5, 2])
    whole = run_stage(model(), range(5), place(0, 1), ids, NO_MEDIA)
    hub, found = ThreadHub(), None
    for stage in range(stages):  # one after the other: a sender does not wait
        part, here = model(), place(stage, stages, hub)
        hub.enter()
        found = run_stage(part, keep_stage(part, here, 7), here, ids, NO_MEDIA)
        hub.leave(failed=False)
    assert isinstance(found, tuple)
    for got, want in zip(found, whole, strict=True):
        assert torch.equal(got, want)


def test_a_block_that_is_used_twice_is_kept_where_it_is_used() -> None:
    class Twice(CausalLM):
        @property
        def blocks(self) -> list[nn.Module]:
            return [*self.model.layers, self.model.layers[0]]

    cfg = TextConfig(vocab_size=7, hidden_size=4, num_hidden_layers=3, num_attention_heads=1)
    part = Twice(cfg, Block, RMSNorm(4))
    keep_stage(part, place(1, 2), 7)
    assert [isinstance(layer, Elsewhere) for layer in part.model.layers] == [False, True, False]


def test_what_lies_elsewhere_cannot_be_used() -> None:
    part = model()
    keep_stage(part, place(0, 2), 7)
    with pytest.raises(AssertionError, match="another stage"):
        part.lm_head(torch.ones(1, 4))
