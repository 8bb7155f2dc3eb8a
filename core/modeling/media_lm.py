"""A model around a language model: what it hands on, and which of its parts only media need.

Decision: of all children but `language_model` is taken that only `embed_media` uses them, so that later pipeline stages
do without; a model of which that is not true names its own `media_modules`.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from modelport.batch import Batch
from modelport.modeling.decoder import State


class MediaLM(nn.Module):
    """A language model whose tokens' embeddings may be replaced by rows that a tower makes of media.

    A family adds its tower, whatever leads from there to the language model's width, and `embed_media`.

    :param language: as the core builds it for `Architecture.language`; its tensors lie below `language_model.`.
    """

    def __init__(self, language: nn.Module):
        super().__init__()
        self.language_model = language

    def embed_media(self, modality: str, items: list[Mapping[str, Tensor]]) -> list[Tensor]:
        """Rows that stand for media.

        :param items: `MediaItem.tensors` of several items of one modality, on the model's device.
        :return: for each item (rows, hidden_size of the language model).
        """
        raise NotImplementedError

    @property
    def hidden_size(self) -> int:
        """Width of the rows."""
        return self.language_model.lm_head.hidden_size

    @property
    def media_modules(self) -> list[nn.Module]:
        return [module for name, module in self.named_children() if name != "language_model"]

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.language_model.embed(token_ids)

    @property
    def blocks(self) -> Sequence[Callable[[State, Batch], State]]:
        return self.language_model.blocks

    @property
    def lm_head(self) -> nn.Module:
        return self.language_model.lm_head

    def finish(self, state: State) -> Tensor:
        return self.language_model.finish(state)
