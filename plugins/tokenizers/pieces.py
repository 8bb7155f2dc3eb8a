"""Read a sentencepiece model (`tokenizer.model`) as a tokenizer.

Decisions: the sentencepiece library cuts text, since the file may hold any normalisation and either algorithm; special
tokens are found by us, and the text on either side of one is cut by itself, as the published Python classes did.
Decoding joins the bytes of the pieces (a byte-fallback piece is one byte) and takes away the space that the library
puts before a text; it adds no spaces around special tokens, which those classes did, so that text stays as it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from modelport.inputs.tokenizer import Tokenizer

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_SPACE = "▁"


def read_model(file: Path) -> SentencePieceProcessor:
    """Load a sentencepiece model.

    :raises ImportError: the library is not installed.
    :raises ValueError: the file is damaged.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ImportError(
            f"{file} is read with the sentencepiece library, which is not installed: "
            "pip install 'modelport[tokenizers]'; or pass skip_tokenizer_init=True to work with token ids"
        ) from None
    try:
        return SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{file} is no sentencepiece model ({error}); download it again") from None


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model with the special tokens around it.

    :param model: cuts ordinary text.
    :param added: id to token, for tokens that the model lacks, or names otherwise.
    :param special: tokens of the model or of `added` that are no text: found in a text wherever they stand, and left
        out of decoded text.
    :param prefix: ids that begin a text.
    :param suffix: ids that end it.
    :param spelled: text to ids, for sequences that are found as a whole.
    :param hidden: special tokens that are not found in a text by themselves: "sop" is part of many a word.
    """

    def __init__(
        self,
        model: SentencePieceProcessor,
        added: Mapping[int, str],
        special: Sequence[str],
        special_tokens: Mapping[str, str],
        chat_templates: Mapping[str, str],
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        spelled: Mapping[str, Sequence[int]] | None = None,
        hidden: Sequence[str] = (),
        turn_ends: Sequence[str] = (),
    ):
        self._model, self._prefix, self._suffix = model, list(prefix), list(suffix)
        self._pieces = dict(enumerate(model.id_to_piece(list(range(model.get_piece_size()))))) | dict(added)
        self._ids = {piece: token_id for token_id, piece in self._pieces.items()}
        missing = [token for token in special if token not in self._ids]
        if missing:
            raise ValueError(
                f"the vocabulary lacks the special token {missing[0]!r}; do tokenizer.model and tokenizer_config.json "
                "belong together?"
            )
        control = {i for i in range(model.get_piece_size()) if model.is_control(i) and i not in added}
        self._special = {self._ids[token] for token in special} | control
        self._texts = {token_id: self._pieces[token_id] for token_id in {*added, *self._special}}
        found = {piece: [token_id] for token_id, piece in self._texts.items() if piece not in hidden}
        self._spelled = found | dict(spelled or {})
        longest_first = sorted(filter(None, self._spelled), key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._bytes = dict(self._content())
        self._adds_space = "".join(model.encode_as_pieces("a")).startswith(_SPACE)
        super().__init__(None, special_tokens, chat_templates, turn_ends=turn_ends)

    def _content(self) -> Iterator[tuple[int, bytes]]:
        model = self._model
        for token_id in range(model.get_piece_size()):
            if token_id in self._texts:
                continue
            if model.is_byte(token_id):
                yield token_id, bytes([int(self._pieces[token_id][3:5], 16)])  # <0x0A>
            elif model.is_unknown(token_id):
                yield token_id, model.decode([token_id]).encode()
            else:
                yield token_id, self._pieces[token_id].replace(_SPACE, " ").encode()

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self._special)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        text.encode()  # half a character raises UnicodeEncodeError here, and something else below
        ids = list(self._prefix) if add_special_tokens else []
        for index, part in enumerate(self._split.split(text)):
            if index % 2:
                ids += self._spelled[part]
            elif part:
                ids += self._model.encode(part)
        return ids + self._suffix if add_special_tokens else ids

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        text, run = [], []  # run: bytes of the text since the last token that is no piece
        for token_id in ids:
            if token_id in self._texts:
                if skip_special_tokens and token_id in self._special:
                    continue
                text += self._text(run), self._texts[token_id]
                run = []
            else:
                run.append(self._bytes.get(token_id, b""))
        return "".join((*text, self._text(run)))

    def _text(self, run: Sequence[bytes]) -> str:
        text = b"".join(run).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._adds_space else text

    def _piece(self, token_id: int) -> str:
        return self._pieces.get(token_id, "")

    def _token_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _size(self) -> int:
        return max(self._pieces) + 1
