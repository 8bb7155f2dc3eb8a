"""Token embeddings, learned positions, and the head that turns hidden states into logits."""

import torch
from torch import Tensor, nn

from modelport.batch import Batch
from modelport.kernels import linear as kernel
from modelport.modeling.linear import Update


class Embedding(nn.Module):
    """One row per token id; weight: (num_embeddings, size). `scale` multiplies the rows.

    Shared with a tied `LMHead`, the weight is kept once, in the form that the head's product reads fastest.

    :ivar update: takes the ids and their rows (tokens, size), before `scale`, and gives the rows to go on with.
    """

    def __init__(self, num_embeddings: int, size: int, scale: float = 1.0):
        super().__init__()
        self.num_embeddings, self.size, self.scale = num_embeddings, size, scale
        self.weight = nn.Parameter(torch.empty(num_embeddings, size), requires_grad=False)
        self.is_shared = False
        self.packed: kernel.PackedWeight | None = None
        self.packer = kernel.pack
        self.update: Update | None = None

    def pack(self) -> None:
        """Swap the loaded weight for its packed form, when a head shares it; called once by the core."""
        if self.is_shared:
            self.dtype, self.packed = self.weight.dtype, self.packer(self.weight.data)
            self.weight = None

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: (tokens,) int64 -> (tokens, size)."""
        if self.packed is None:
            rows = nn.functional.embedding(token_ids, self.weight)
        else:
            rows = self.packed.rows(token_ids).to(self.dtype)
        if self.update is not None:
            rows = self.update(token_ids, rows)
        # The factor is rounded to the weights' type first, as published implementations do.
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=rows.dtype)


class LearnedPositions(nn.Module):
    """A block that adds a learned row per position; weight: (max_position_embeddings + offset, size).

    :param offset: rows of the checkpoint's table that come before position 0; 2 for OPT and BART.
    """

    def __init__(self, max_position_embeddings: int, size: int, offset: int = 0):
        super().__init__()
        self.offset = offset
        self.weight = nn.Parameter(torch.empty(max_position_embeddings + offset, size), requires_grad=False)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        return x + nn.functional.embedding(batch.positions, self.weight[self.offset :])


class LMHead(nn.Module):
    """Hidden states to logits over the vocabulary, (rows, hidden_size) -> (rows, vocab_size).

    :param tied: the embedding whose weight is also the head's; the checkpoint then needs none of its own.
    :param scale: factor on logits.
    :param softcap: logits, scaled, become `softcap * tanh(logits / softcap)`; 0 for none.
    :ivar update: as `Linear.update`, before `scale`.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        tied: Embedding | None = None,
        bias: bool = False,
        scale: float = 1.0,
        softcap: float = 0.0,
    ):
        super().__init__()
        self.hidden_size, self.scale, self.softcap = hidden_size, scale, softcap
        self.tied = (tied,)  # in a tuple, so that the weight is registered once
        if tied is not None:
            tied.is_shared = True
        self.weight = (
            None if tied is not None else nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)
        )
        self.bias = nn.Parameter(torch.empty(vocab_size), requires_grad=False) if bias else None
        self.packed: kernel.PackedWeight | None = None
        self.packer = kernel.pack
        self.update: Update | None = None

    @property
    def is_tied(self) -> bool:
        return self.tied[0] is not None

    def pack(self) -> None:
        """Swap the loaded weight for its packed form; called once by the core."""
        if not self.is_tied:
            self.packed = self.packer(self.weight.data)
            self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        logits = kernel.linear(x, self.tied[0].packed if self.is_tied else self.packed, self.bias)
        if self.update is not None:
            logits = self.update(x, logits)
        if self.scale != 1.0:
            logits = logits * self.scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits
