"""Text to token ids and back, whole or as a stream.

Decisions: the `tokenizers` library reads `tokenizer.json` directly, since importing transformers would cost seconds
at every start; what transformers adds on top (special tokens kept in side files, added tokens, space clean-up) is
read here the same way, and compared with it in the tests. A stream's pieces always join to what decoding the whole
gives: text that a later token could still change is held back until `flush`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import tokenizers

from modelport.inputs.decode_stream import DecodeStream, clean_up
from modelport.inputs.tokenizer_files import has_own_code, named_templates, read_folder

if TYPE_CHECKING:
    from pathlib import Path

    from modelport.inputs.chat import Message
    from modelport.plugin import Checkpoint, Plugins


class Tokenizer:
    """A tokenizer with its special tokens and its chat template.

    :ivar bos_token_id: id of the token that begins a text, or None.
    :ivar eos_token_id: id of the token that ends a text, or None.
    :ivar vocab_size: number of tokens, the added ones included.
    :ivar chat_template: the default chat template (jinja source), or None.
    :ivar special_tokens: role to token, `{"eos_token": "</s>"}`; chat templates read them by these names.
    :ivar turn_end_ids: ids that end an answer besides `eos_token_id`.

    A subclass that is not built on the `tokenizers` library passes None as `backend`, and overrides `special_ids` and
    the methods at the end of this class.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer | None,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        clean_up_spaces: bool = False,
        turn_ends: Sequence[str] = (),
    ):
        """
        :param backend: does the work; padding and truncation stored in it are switched off.
        :param special_tokens: role to token; a token the vocabulary lacks has no id.
        :param chat_templates: name to jinja source; `"default"` is the one used when nobody names another.
        :param clean_up_spaces: take the space before punctuation out of decoded text (WordPiece habits).
        :param turn_ends: tokens with which the model ends its turn in a chat, if that is not the `eos_token`.
        """
        if backend is not None:
            backend.no_padding()
            backend.no_truncation()
        self._backend = backend
        self._clean_up = clean_up_spaces
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self.chat_template = self.chat_templates.get("default")
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        ends = (self._token_id(token) for token in turn_ends)
        self.turn_end_ids = tuple(token_id for token_id in ends if token_id is not None)
        self.vocab_size = self._size()

    def _id_of(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self._token_id(token)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out of decoded text."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`; special tokens written out in it become themselves.

        :param add_special_tokens: put before and after it what the model expects there; False for a rendered chat.
        :raises ValueError: `text` is not a string, or not valid Unicode.
        """
        if not isinstance(text, str):
            raise ValueError(f"cannot tokenize {text!r}: it is a {type(text).__name__}, not a string")
        try:
            return self._encode(text, add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            at = next((i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None)
            if at is None:
                raise
            raise ValueError(
                f"cannot tokenize a text with half a character (a lone surrogate, {text[at]!r}) at position {at}; "
                'decode the bytes with errors="replace"'
            ) from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; bytes that are no valid UTF-8 become U+FFFD, unknown ids nothing."""
        text = self._decode(ids, skip_special_tokens)
        return clean_up(text) if self._clean_up else text

    def decode_stream(self, skip_special_tokens: bool = True) -> DecodeStream:
        """Return a fresh stream: feed it token ids, one by one, and it gives text as soon as that is certain."""
        return DecodeStream(self, skip_special_tokens)

    def token(self, token_id: int) -> str:
        """Return the text of one token as it reads inside a sentence (its leading space is kept)."""
        text = self._decode([token_id], False)
        piece = self._piece(token_id)
        return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt text of a conversation; encode it with `add_special_tokens=False`.

        :param chat_template: jinja source, or the name of one of the model's templates, instead of its default.
        :param chat_template_kwargs: variables that this template reads, such as `{"enable_thinking": False}`.
        :raises ValueError: there is no template, or it refuses the messages.
        """
        from modelport.inputs.chat import render

        return render(
            self._template(chat_template, bool(tools)),
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables={**self.special_tokens, **(chat_template_kwargs or {})},
        )

    def _template(self, wanted: str | None, with_tools: bool) -> str:
        if wanted is not None:
            return self.chat_templates.get(wanted, wanted)
        if with_tools and "tool_use" in self.chat_templates:
            return self.chat_templates["tool_use"]
        if self.chat_template is not None:
            return self.chat_template
        if self.chat_templates:
            names = ", ".join(map(repr, sorted(self.chat_templates)))
            raise ValueError(
                f"this model has several chat templates and no default; pass chat_template=, one of {names}"
            )
        raise ValueError(
            "this model has no chat template (is it a base model?); pass chat_template= with jinja source, "
            "or give a plain text prompt to generate()"
        )

    # What a tokenizer that is not built on the `tokenizers` library does in its own way:

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def _piece(self, token_id: int) -> str:
        """The token as the vocabulary spells it, or "" when there is none."""
        return self._backend.id_to_token(token_id) or ""

    def _token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def _size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)


class _TransformersTokenizer(Tokenizer):
    """A transformers tokenizer written in Python: no `tokenizers.Tokenizer` behind it."""

    def __init__(self, auto: Any, chat_templates: Mapping[str, str]):
        self._auto = auto
        self._clean_up = False  # decode() does it
        self.special_tokens = dict(auto.special_tokens_map)
        self.chat_templates = dict(chat_templates)
        self.chat_template = self.chat_templates.get("default")
        self.bos_token_id = auto.bos_token_id
        self.eos_token_id = auto.eos_token_id
        self.turn_end_ids = ()
        self.vocab_size = len(auto)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self._auto.all_special_ids)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._auto.encode(text, add_special_tokens=add_special_tokens)

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self._auto.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def _piece(self, token_id: int) -> str:
        return self._auto.convert_ids_to_tokens(token_id) or ""


def load_tokenizer(checkpoint: Checkpoint, config: dict[str, Any], plugins: Plugins) -> Tokenizer:
    """Load a checkpoint's tokenizer: a plugin's, else `tokenizer.json`, else whatever transformers makes of the files.

    :param config: the model's configuration.
    :raises ValueError: there is no tokenizer among the files, or it is damaged.
    """
    tokenizer = plugins.hook.load_tokenizer(checkpoint=checkpoint, config=config)
    if tokenizer is not None:
        return tokenizer
    path = checkpoint.path
    if (path / "tokenizer.json").is_file():
        return Tokenizer(*read_folder(path))
    if path.is_dir():
        return _from_transformers(path, checkpoint.trust_remote_code)
    raise ValueError(f"no plugin reads a tokenizer from {path}; pass tokenizer= with the folder that holds it")


def _from_transformers(folder: Path, trust_remote_code: bool) -> Tokenizer:
    if has_own_code(folder) and not trust_remote_code:
        raise ValueError(
            f"the tokenizer in {folder} is Python code of its own (auto_map in tokenizer_config.json), which is never "
            "run unasked: read it, then pass trust_remote_code=True; or pass tokenizer= with another one"
        )
    from transformers import AutoTokenizer

    try:
        auto = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # whatever a stranger's tokenizer, or a missing library for it, may raise
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"{folder} holds no tokenizer.json, and transformers cannot load a tokenizer from it either ({reason}); "
            "pass tokenizer= with the folder or name of one, or skip_tokenizer_init=True to work with token ids"
        ) from error
    templates = named_templates(auto.chat_template)
    if auto.is_fast:
        clean_up = auto.clean_up_tokenization_spaces and not isinstance(
            auto.backend_tokenizer.model, tokenizers.models.BPE
        )
        return Tokenizer(auto.backend_tokenizer, auto.special_tokens_map, templates, clean_up)
    return _TransformersTokenizer(auto, templates)
