"""Log-probabilities of tokens, their ranks, and the likeliest tokens, from rows of logits."""

import torch
from torch import Tensor

from modelport.kernels import cpu


def logprobs_reference(x: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plain torch version of `logprobs`; of equals at the end of the k likeliest it may take others."""
    found = torch.log_softmax(x.float(), dim=-1)
    own = found.gather(1, token_ids[:, None])
    ranks = (found > own).sum(-1, dtype=torch.int32) + 1  # a third of the time that int64 takes
    # By id first: the stable sort then leaves ties in the order of their ids.
    ids = found.topk(min(k, x.shape[1]), dim=-1).indices.sort(-1).values
    values, order = found.gather(1, ids).sort(stable=True, dim=-1, descending=True)
    return own[:, 0], ranks, ids.gather(1, order), values


def logprobs(x: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability of one token of each row, its rank (1 is the likeliest), and the k likeliest tokens with theirs.

    x: (rows, vocab) of any floating type, token_ids: (rows,) int64 -> (rows,) float32, (rows,) int32, (rows, k) int64,
    (rows, k) float32, best first and of equals the lower id; less than k where the vocabulary has less. Sums are
    float32 or wider. A row with a NaN has NaN everywhere.
    """
    if cpu.lib is not None and x.is_cpu and x.dim() == 2:
        rows, k = x.shape[0], min(k, x.shape[1])
        own, ranks = torch.empty(rows), torch.empty(rows, dtype=torch.int32)
        ids, values = torch.empty((rows, k), dtype=torch.int64), torch.empty((rows, k))
        if cpu.lib.logprobs(x, token_ids, own, ranks, ids, values, cpu.threads()):
            return own, ranks, ids, values
    return logprobs_reference(x, token_ids, k)
