import pytest
import torch
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from modelport.batch import Batch
from modelport.modeling import Embedding, LearnedPositions, LMHead

EMPTY = torch.empty(0)


def test_positions_behind_an_offset() -> None:
    theirs = OPTLearnedPositionalEmbedding(10, 6)
    mine = LearnedPositions(10, 6, offset=2)
    assert mine.weight.shape == theirs.weight.shape
    mine.weight.data = theirs.weight.data
    positions, x = torch.tensor([0, 1, 2, 9]), torch.randn(4, 6)
    batch = Batch(positions, EMPTY, EMPTY, EMPTY, EMPTY, 1, 1)
    want = theirs(None, position_ids=positions)
    torch.testing.assert_close(mine(x, batch), x + want)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_logits_are_scaled_after_the_bias_and_before_the_cap(softcap: float) -> None:
    head = LMHead(8, 5, bias=True, scale=0.25, softcap=softcap)
    weight, x = torch.randn(5, 8), torch.randn(3, 8)
    head.weight.data, head.bias.data = weight, torch.arange(5.0)
    head.pack()
    want = (x @ weight.T + torch.arange(5.0)) * 0.25
    torch.testing.assert_close(head(x), 2.0 * torch.tanh(want / 2.0) if softcap else want)


def test_a_tied_head_may_have_a_bias() -> None:
    embedding = Embedding(5, 8)
    head = LMHead(8, 5, tied=embedding, bias=True)
    weight, x = torch.randn(5, 8), torch.randn(3, 8)
    embedding.weight.data, head.bias.data = weight, torch.arange(5.0)
    embedding.pack()
    torch.testing.assert_close(head(x), x @ weight.T + torch.arange(5.0))
