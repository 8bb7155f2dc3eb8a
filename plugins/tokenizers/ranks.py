"""Read a file of byte-pair ranks, as the tiktoken library keeps them (`qwen.tiktoken`), as a tokenizer.

Decisions: the ranks become merges of the `tokenizers` library, which every tokenizer of ours is built on, so that no
other library is needed. tiktoken merges any two neighbours that join to a known token, that of lowest rank first;
hence each way to cut a token in two is a merge, at the rank of the token. Of two ways to reach the same token at
overlapping places tiktoken takes the one to the left, whose left part is the longer one: longer left parts come first.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SINGLE_DIGITS = _LETTERS + r"|\p{N}" + _REST
"""How Qwen cuts text into words."""
THREE_DIGITS = _LETTERS + r"|\p{N}{1,3}" + _REST
"""How cl100k_base cuts text into words."""


def is_ranks(file: Path) -> bool:
    """Whether a file holds ranks; a `tokenizer.model` may instead be one of sentencepiece."""
    with file.open("rb") as opened:
        words = opened.readline(4096).split()
    return len(words) == 2 and words[1].isdigit() and _decoded(words[0]) is not None


def read_ranks(file: Path) -> dict[bytes, int]:
    """Read lines of a token in base64 and its rank, which is its id.

    :raises ValueError: a line is something else, or ranks are missing.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        words = line.split()
        token = _decoded(words[0]) if len(words) == 2 and words[1].isdigit() else None
        if token is None:
            raise ValueError(
                f"line {number} of {file} is {line[:60]!r}, not a token in base64 and its rank; download the file again"
            )
        ranks[token] = int(words[1])
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or set(ranks.values()) != set(range(len(ranks))):
        what = f"the byte {missing[0]:#04x} is no token" if missing else "the ranks do not count from 0 without gaps"
        raise ValueError(f"{file} is incomplete: {what}; download it again")
    return ranks


def _decoded(word: bytes) -> bytes | None:
    try:
        return base64.b64decode(word, validate=True) or None
    except binascii.Error:
        return None


def build(
    ranks: dict[bytes, int], pattern: str, special: Sequence[str], prefix: Sequence[str] = (), compose: bool = False
) -> Tokenizer:
    """Build the tokenizer.

    :param pattern: regular expression for the words that text is cut into before anything merges.
    :param special: special tokens; their ids follow the ranks.
    :param prefix: those of them that begin a text.
    :param compose: bring text into Unicode's composed form (NFC) first.
    """
    letters = _letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((spelled[left], spelled[right]))
    # a whole word that is a token is not merged together, which may fail to arrive at it
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    if compose:
        backend.normalizer = normalizers.NFC()
    backend.add_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    if prefix:
        backend.post_processor = processors.TemplateProcessing(
            single=[*prefix, "$A"], special_tokens=[(token, backend.token_to_id(token)) for token in prefix]
        )
    return backend


def _letters() -> list[str]:
    """The printable character that stands for each byte in the vocabulary of a byte-level tokenizer (GPT-2's)."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]
