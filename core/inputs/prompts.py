"""Prompts in every form that callers write them, checked and turned into token ids.

Decisions: an encoder-decoder model reads a plain prompt with its encoder, and its decoder begins with the token which
the checkpoint names, as transformers and vLLM do; both can be given (`encoder_prompt`, `decoder_prompt`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from modelport.config import TextConfig
from modelport.inputs.multimodal import MediaReader
from modelport.inputs.processor import Expanded
from modelport.inputs.tokenizer import Tokenizer

Read = tuple[str | None, list[int]]
"""Text, when there was one, and token ids."""


class PromptReader:
    """Reads the prompts of one model.

    :param generation: what the checkpoint's `generation_config.json` says.
    :param max_model_len: most tokens of one sequence.
    :param media: of a model that takes media.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        config: TextConfig,
        generation: Mapping[str, Any],
        max_model_len: int,
        media: MediaReader | None = None,
    ):
        self.tokenizer, self.config, self.max_model_len, self.media = tokenizer, config, max_model_len, media
        self._placeholders: set[int] = set()  # may lie outside the vocabulary
        if media is not None:
            self._placeholders = {media.processor.placeholder_id(m) for m in media.processor.modalities}
        names = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "bos_token_id")
        self._special = {name: generation.get(name, config.model_dump().get(name)) for name in names}

    def read(self, prompt: Any) -> Read:
        """:raises ValueError: empty, too long, token ids outside the vocabulary, text without a tokenizer.
        :raises TypeError: not a prompt.
        """
        text, ids = self._tokens(prompt)
        self._check_length(ids)
        return text, ids

    def read_media(self, prompt: Any) -> tuple[str | None, Expanded]:
        """A prompt with its media in their places.

        :raises ValueError: as `read`; media that cannot be used, or do not fit the prompt's placeholders.
        :raises TypeError: not a prompt.
        """
        data, trusted = {}, True
        if isinstance(prompt, Mapping):
            prompt = dict(prompt)
            data, trusted = prompt.pop("multi_modal_data", None) or {}, prompt.pop("trusted", True)
        text, ids = self._tokens(prompt)
        expanded = self.media.processor.expand(ids, self.media.read(data, trusted, self.max_model_len))
        self._check_length(expanded.token_ids)
        return text, expanded

    def _check_length(self, ids: Sequence[int]) -> None:
        if len(ids) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens; max_model_len={self.max_model_len} leaves room for "
                f"{self.max_model_len - 1} and one to generate; shorten the prompt or raise max_model_len"
            )

    def read_pair(self, prompt: Any) -> tuple[Read, Read]:
        """The encoder's and the decoder's prompt.

        :raises ValueError, TypeError: as `read`.
        """
        pair = isinstance(prompt, Mapping) and "encoder_prompt" in prompt
        if pair and (unknown := sorted(set(prompt) - {"encoder_prompt", "decoder_prompt"})):
            raise ValueError(f"a prompt pair holds 'encoder_prompt' and 'decoder_prompt', not {unknown}")
        encoder = self._tokens(prompt["encoder_prompt"] if pair else prompt)
        if len(encoder[1]) > self.max_model_len:
            raise ValueError(
                f"the encoder prompt has {len(encoder[1])} tokens, more than max_model_len={self.max_model_len}; "
                "shorten it or raise max_model_len"
            )
        given = prompt.get("decoder_prompt") if pair else None
        start = self._special["decoder_start_token_id"]
        start = self._special["bos_token_id"] if start is None else start
        text, ids = (None, []) if given is None else self._tokens(given, special=False)
        if start is not None and (not ids or ids[0] != start):
            ids = [start, *ids]
        if not ids:
            raise ValueError(
                "the checkpoint names no decoder_start_token_id; give {'encoder_prompt': ..., 'decoder_prompt': ...}"
            )
        return encoder, (text, self.read(ids)[1])

    def forced_tokens(self, num_prompt_tokens: int, num_tokens: int) -> dict[int, int]:
        """Place in the output -> token that the checkpoint wants there: the first, and the last of a full output.

        :param num_tokens: most tokens of prompt and output.
        """
        first, last = self._special["forced_bos_token_id"], self._special["forced_eos_token_id"]
        forced = {0: first} if first is not None and num_prompt_tokens == 1 else {}
        if last is not None:
            forced[num_tokens - num_prompt_tokens - 1] = last[0] if isinstance(last, list) else last
        return forced

    def _tokens(self, prompt: Any, special: bool = True) -> Read:
        text, ids = _parts(prompt)
        if ids is None:
            if self.tokenizer is None:
                raise ValueError("a text prompt needs a tokenizer; give {'prompt_token_ids': [...]}")
            encoder = self.tokenizer if self.media is None else self.media.processor
            ids = encoder.encode(text, add_special_tokens=special)
        if not ids:
            raise ValueError(f"the prompt {prompt!r} is empty: there is nothing to continue; give at least one token")
        vocab = self.config.vocab_size
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) and not hasattr(token, "__index__"):
                raise TypeError(f"prompt token ids must be integers, not {token!r}")
            if not 0 <= token < vocab and token not in self._placeholders:
                raise ValueError(f"token id {token} in the prompt is outside the vocabulary (0 to {vocab - 1})")
        return text, [int(token) for token in ids]


def _parts(prompt: Any) -> tuple[str | None, Sequence[int] | None]:
    """Text and token ids of any form of prompt; one of them may be None."""
    if isinstance(prompt, str):
        return prompt, None
    if isinstance(prompt, Mapping):
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        unknown = sorted(set(prompt) - {"prompt", "prompt_token_ids"})
        if unknown or (text is None and ids is None):
            hint = "; an encoder_prompt is for encoder-decoder models" if "encoder_prompt" in prompt else ""
            hint = "; this model takes text only" if "multi_modal_data" in prompt else hint
            raise ValueError(
                f"a prompt dictionary holds 'prompt' or 'prompt_token_ids', not {unknown or sorted(prompt)}{hint}"
            )
        return text, ids
    if isinstance(prompt, Sequence) or hasattr(prompt, "tolist"):
        return None, list(prompt)
    raise TypeError(f"a prompt is text, token ids or a dictionary, not {type(prompt).__name__}")
