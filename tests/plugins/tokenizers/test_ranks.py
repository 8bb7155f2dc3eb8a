"""Ranks cut text as tiktoken's algorithm says, and come back as the same text, whole or as a stream."""

import base64
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelport.inputs.tokenizer import Tokenizer
from modelport.plugins.tokenizers.ranks import SINGLE_DIGITS, THREE_DIGITS, build, is_ranks, read_ranks

quick = settings(max_examples=150, deadline=None)
words = st.sampled_from(
    ["the quick", " brown", "doesn't", "I'LL", "  1234567", "\n\n ", "<end>", "你好", "🤗", "\t\r\n", "e\u0301"]
)
texts = st.one_of(st.text(), st.lists(st.one_of(words, st.text(max_size=4)), max_size=12).map("".join))
runs = st.text(alphabet="the oqn", max_size=40)


def by_hand(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's algorithm: a whole word, else the neighbours of lowest rank merge, of several the leftmost."""
    if word in ranks:
        return [ranks[word]]
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        joined = [(ranks[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not joined:
            return [ranks[part] for part in parts]
        _, at = min(joined)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.fixture(scope="module")
def tokenizer(ranks) -> Tokenizer:
    return Tokenizer(build(ranks, THREE_DIGITS, ["<begin>", "<end>"], ["<begin>"]), {"eos_token": "<end>"})


@quick
@given(word=st.one_of(runs, st.text(alphabet="你好世界", max_size=6)))
def test_merges_are_those_of_tiktoken(ranks, tokenizer, word):
    expected = [
        token for part in re.findall(r" ?[^ ]+|[ ]+(?=[ ])|[ ]+", word) for token in by_hand(part.encode(), ranks)
    ]
    assert tokenizer.encode(word, add_special_tokens=False) == expected


@quick
@given(data=st.data())
def test_merges_of_any_ranks_are_those_of_tiktoken(data):
    """Here the ranks are no result of training: ways to reach a token compete that a real file would not have."""
    pieces = data.draw(
        st.lists(st.text(alphabet="ab", min_size=2, max_size=4).map(str.encode), max_size=8, unique=True)
    )
    ranks = {token: i for i, token in enumerate([*(bytes([b]) for b in range(256)), *sorted(pieces, key=len)])}
    word = data.draw(st.text(alphabet="ab", max_size=14))
    assert build(ranks, SINGLE_DIGITS, []).encode(word).ids == by_hand(word.encode(), ranks) or not word


@quick
@given(text=texts)
def test_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == "<begin>" + text
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("<end>", "").replace("<begin>", "")


@quick
@given(text=texts, ids=st.lists(st.integers(0, 291), max_size=30), skip=st.booleans())
def test_a_stream_joins_to_the_whole(tokenizer, text, ids, skip):
    for tokens in (tokenizer.encode(text), ids):
        stream = tokenizer.decode_stream(skip_special_tokens=skip)
        pieces = [stream.step(token) for token in tokens]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(tokens, skip_special_tokens=skip)


def test_special_tokens_follow_the_ranks(tokenizer):
    assert tokenizer.encode("<end>") == [290, 291]
    assert tokenizer.special_ids == {290, 291}
    assert tokenizer.vocab_size == 292
    assert tokenizer.eos_token_id == 291


def test_digits_are_cut_in_ones_or_threes(ranks):
    more = {**ranks, b"12": 290, b"123": 291}
    assert len(build(more, SINGLE_DIGITS, []).encode("1234").ids) == 4
    assert build(more, THREE_DIGITS, []).encode("1234").ids == [291, more[b"4"]]


def test_composed_form(ranks):
    apart, composed = "e\u0301", "\u00e9"
    assert (
        build(ranks, SINGLE_DIGITS, [], compose=True).encode(apart).ids
        == build(ranks, SINGLE_DIGITS, []).encode(composed).ids
    )
    assert build(ranks, SINGLE_DIGITS, []).encode(apart).ids != build(ranks, SINGLE_DIGITS, []).encode(composed).ids


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"!!!! 290", "line 291 of .* is b'!!!! 290', not a token in base64"),
        (b"YWI=", "not a token in base64 and its rank"),
        (b"YWI= -1", "not a token in base64 and its rank"),
        (b"enp6 300", "do not count from 0 without gaps"),
    ],
)
def test_a_broken_line_is_named(rank_file, tmp_path, line, message):
    file = tmp_path / "broken.tiktoken"
    file.write_bytes(rank_file + line + b"\n")
    with pytest.raises(ValueError, match=message):
        read_ranks(file)


def test_a_missing_byte_is_named(ranks, tmp_path):
    file = tmp_path / "short.tiktoken"
    rest = [token for token in ranks if token != b"\x07"]
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(rest)))
    with pytest.raises(ValueError, match="the byte 0x07 is no token"):
        read_ranks(file)


def test_a_file_of_ranks_is_told_from_a_sentencepiece_model(rank_file, model, ranks, tmp_path):
    (tmp_path / "ranks").write_bytes(rank_file)
    (tmp_path / "model").write_bytes(model)
    assert is_ranks(tmp_path / "ranks")
    assert not is_ranks(tmp_path / "model")
    assert read_ranks(tmp_path / "ranks") == ranks
