"""What the core asks of a model, and the decoder that most families are.

A model offers four things: `embed(token_ids)`, an ordered list of `blocks` whose state is a tensor or a tuple of
tensors, `finish(state)`, and `lm_head`. The loop over blocks lives in the core (`forward`), once: pipeline stages and
hidden-state capture then work for every family.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.config import TextConfig
from modelport.modeling.adapters import begin
from modelport.modeling.embedding import Embedding, LMHead

State = Tensor | tuple[Tensor, ...]


class Model(Protocol):
    """The four things that the core uses.

    An encoder-decoder model has a fifth, `encode(token_ids, starts)`: ids (encoder tokens,) of several sequences, side
    by side from the rows `starts` (seqs + 1,) on -> states (encoder tokens, hidden_size), which its blocks find in
    `batch.encoded` once.

    A model that takes media has `embed_media(modality, items)`: what its input processor made of several items
    (`MediaItem.tensors`, on the model's device) -> for each a tensor (rows, hidden_size), which takes the place of its
    tokens' embeddings; `media_modules`, the modules that only `embed_media` uses; `num_axes`, when rotary positions
    have several; and, where rows are more than embeddings, `merge_media(state, media)`: the embedded tokens and
    `Batch.media` (or None) -> the state of the first block. Rows that could not be made are NaN, and one wide when the
    step has no others: `expand` them.

    A model that takes adapters has `adapters` (`modeling.adapters`), which a plugin gives it.
    """

    lm_head: nn.Module

    def embed(self, token_ids: Tensor) -> Tensor:
        """(tokens,) int64 -> (tokens, hidden_size)."""

    @property
    def blocks(self) -> Sequence[Callable[[State, Batch], State]]:
        """In order; each takes and returns the state."""

    def finish(self, state: State) -> Tensor:
        """The last norm: state -> (rows, hidden_size)."""


def forward(model: Model, token_ids: Tensor, batch: Batch) -> State:
    """Run every block over (tokens,) ids; `finish` and `lm_head` follow for the rows that need logits."""
    begin(model, batch.adapters)
    state = embed(model, token_ids, batch)
    for block in model.blocks:
        state = block(state, batch)
    return state


def embed(model: Model, token_ids: Tensor, batch: Batch) -> State:
    """The state that the first block takes: embeddings of (tokens,) ids, and rows of media in their places."""
    state = model.embed(token_ids)
    merge = getattr(model, "merge_media", None)
    if merge is not None:
        return merge(state, batch.media)
    if batch.media is not None:  # rows that could not be made are NaN, and may be one wide
        states = batch.media.states.expand(-1, state.shape[1]).to(state.dtype)
        state = state.index_copy(0, batch.media.rows, states)
    return state


class CausalLM(nn.Module):
    """A decoder with the usual names: `model.embed_tokens`, `model.layers`, `model.norm`, `lm_head`.

    :param block: called with the configuration and the layer's index.
    :param norm: the final norm.
    :param embed_scale: factor on embeddings.
    :param head_bias: whether the head has one; `logit_scale` and `logit_softcap` are its `scale` and `softcap`.
    """

    def __init__(
        self,
        cfg: TextConfig,
        block: Callable[[TextConfig, int], nn.Module],
        norm: nn.Module,
        *,
        embed_scale: float = 1.0,
        head_bias: bool = False,
        logit_scale: float = 1.0,
        logit_softcap: float = 0.0,
    ):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size, embed_scale)
        self.model.layers = nn.ModuleList(block(cfg, i) for i in range(cfg.num_hidden_layers))
        self.model.norm = norm
        tied = self.model.embed_tokens if cfg.tie_word_embeddings else None
        self.lm_head = LMHead(
            cfg.hidden_size, cfg.vocab_size, tied=tied, bias=head_bias, scale=logit_scale, softcap=logit_softcap
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(token_ids)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    def finish(self, state: Tensor) -> Tensor:
        return self.model.norm(state)
