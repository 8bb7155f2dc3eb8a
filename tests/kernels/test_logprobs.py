"""Log-probabilities against torch, in every type, width and number of likeliest tokens."""

import pytest
import torch

from modelport.kernels import cpu, logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "k"), [(1, 0), (1, 3), (7, 7), (63, 5), (64, 0), (1000, 20), (49152, 5), (300, 200)])
def test_against_torch(dtype: torch.dtype, width: int, k: int) -> None:
    x = (torch.randn(9, width + 3) * 4).to(dtype)[:, :width]  # rows apart
    tokens = torch.randint(width, (9,))
    tokens[0] = x[0].argmax()
    own, ranks, ids, values = logprobs.logprobs(x, tokens, k)
    want = torch.log_softmax(x.double(), -1)
    torch.testing.assert_close(own.double(), want.gather(1, tokens[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    assert ranks.tolist() == ((x > x.gather(1, tokens[:, None])).sum(-1) + 1).tolist()
    assert ids.shape == values.shape == (9, min(k, width))
    for row in range(9):
        likeliest = sorted(range(width), key=lambda j: (-x[row, j].item(), j))[: min(k, width)]
        if k <= 128:  # of equals the first ones
            assert ids[row].tolist() == likeliest
        torch.testing.assert_close(values[row].double(), want[row, likeliest], rtol=1e-5, atol=1e-5)


def test_rows_that_are_ruled_out_and_rows_of_no_use() -> None:
    x = torch.randn(4, 100)
    x[0, 3:] = -torch.inf
    x[1] = -torch.inf
    x[2, 50] = torch.nan
    own, ranks, ids, values = logprobs.logprobs(x, torch.tensor([5, 0, 0, 0]), 5)
    assert own[0] == -torch.inf
    assert ranks[0] == 4
    assert sorted(ids[0, :3].tolist()) == [0, 1, 2]
    assert values[0, 3:].tolist() == [-torch.inf] * 2
    assert own[1].isnan()
    assert own[2].isnan()
    assert values[2].isnan().all()
    assert own[3].isfinite()
    assert all(0 <= one < 100 for one in ids.flatten().tolist())


def test_nothing_and_what_is_outside() -> None:
    assert [len(t) for t in logprobs.logprobs(torch.randn(0, 10), torch.zeros(0, dtype=torch.int64), 2)] == [0] * 4
    if cpu.lib is not None:
        with pytest.raises(ValueError, match="token 10 is outside the vocabulary of 10"):
            logprobs.logprobs(torch.randn(1, 10), torch.tensor([10]), 2)
