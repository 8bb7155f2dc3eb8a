import torch
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from modelport.batch import Batch
from modelport.modeling import LearnedPositions

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
