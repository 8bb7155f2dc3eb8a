"""`Detokenizer`: text token by token, stop strings wherever tokens cut them, streams that take nothing back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelport.engine.detokenizer import Detokenizer
from modelport.sampling_params import SamplingParams


class Pieces:
    """A tokenizer whose token `i` is the i-th piece of text; pieces in angle brackets are special."""

    def __init__(self, *pieces: str):
        self.pieces, self.left = pieces, ""

    def decode_stream(self, skip_special_tokens=True):
        self.skip = skip_special_tokens
        return self

    def step(self, token_id):
        piece = self.pieces[token_id]
        return "" if self.skip and piece.startswith("<") else piece

    def flush(self):
        return self.left


def run(pieces, **settings):
    """Feed the pieces as tokens: (deltas, text, the stop string, tokens taken)."""
    detokenizer = Detokenizer(Pieces(*pieces), SamplingParams(max_tokens=None, **settings))
    deltas, stop, taken = [], None, 0
    for token in range(len(pieces)):
        stop, taken = detokenizer.append(token), taken + 1
        deltas.append(detokenizer.delta())
        assert detokenizer.text.startswith("".join(deltas))
        if stop is not None:
            break
    detokenizer.finish()
    deltas.append(detokenizer.delta())
    assert "".join(deltas) == detokenizer.text
    assert detokenizer.delta() == ""
    return deltas, detokenizer.text, stop, taken


def test_text_without_stop_strings_is_given_out_at_once():
    assert run(["Hel", "lo", "", " you"]) == (["Hel", "lo", "", " you", ""], "Hello you", None, 4)


def test_special_tokens_follow_the_request():
    assert run(["a", "<eos>"])[1] == "a"
    assert run(["a", "<eos>"], skip_special_tokens=False)[1] == "a<eos>"


@pytest.mark.parametrize(("include", "text"), [(False, "one "), (True, "one STOP")])
def test_a_stop_string_over_several_tokens(include, text):
    got = run(["one", " S", "TO", "P two", "never"], stop="STOP", include_stop_str_in_output=include)
    assert got[1:] == (text, "STOP", 4)


def test_only_what_may_become_a_stop_string_is_held_back():
    deltas, *_ = run(["a\n", "b", "\n", "\nc", "d"], stop=["\n\n"])
    assert deltas == ["a", "\nb", "", "", ""]  # the second token refutes the first's line end; the fourth ends all
    assert run(["xy", "z"], stop=["\n\n"])[0] == ["xy", "z", ""]


def test_what_was_held_back_is_given_out_at_the_end():
    assert run(["a", "S", "TO"], stop="STOP")[:2] == (["a", "", "", "STO"], "aSTO")


def test_the_stop_string_that_is_complete_first_wins():
    assert run(["one two three"], stop=["three", "two"])[1:3] == ("one ", "two")
    assert run(["abcd"], stop=["bcd", "c"])[1:3] == ("ab", "c")
    assert run(["abc"], stop=["c", "bc"])[1:3] == ("a", "bc")  # complete at once: the longest


def test_overlapping_beginnings_are_found():
    assert run(list("aabaabaaac"), stop="aabaaa")[1:3] == ("aab", "aabaaa")


def test_no_stop_string_before_min_tokens():
    pieces = ["a.", "b.", "c.", "d."]
    assert run(pieces, stop=".", min_tokens=2)[1:] == ("a.b.c", ".", 3)
    assert run(["..", "."], stop="...", min_tokens=1)[1:] == ("", "...", 2)  # begins early, is complete in time
    assert run(["...", "."], stop="...", min_tokens=1)[1:] == (".", "...", 2)


def test_without_detokenize_or_tokenizer_there_is_no_text():
    for detokenizer in (
        Detokenizer(Pieces("a"), SamplingParams(detokenize=False)),
        Detokenizer(None, SamplingParams()),
    ):
        assert detokenizer.append(0) is None
        detokenizer.finish()
        assert detokenizer.text == detokenizer.delta() == ""
    with pytest.raises(ValueError, match=r"stop=\['a'\].*stop_token_ids"):
        Detokenizer(None, SamplingParams(stop="a"))


def test_a_step_looks_only_at_new_text():
    class Parts(list):
        joins = 0

        def __iter__(self):
            Parts.joins += 1
            return super().__iter__()

    detokenizer = Detokenizer(Pieces("ab"), SamplingParams(stop="abc", max_tokens=None))
    detokenizer._parts = Parts()
    for _ in range(1000):
        detokenizer.append(0)
        detokenizer.delta()
    assert Parts.joins == 0  # the whole text was never put together
    assert len(detokenizer._held) == 2


letters = st.text("ab", max_size=4)


@given(
    pieces=st.lists(letters, max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_the_text_is_cut_as_a_plain_search_would(pieces, stops, include):
    _, text, stop, _ = run(pieces, stop=stops, include_stop_str_in_output=include)
    whole = "".join(pieces)
    ends = [(whole.find(s) + len(s), -len(s), s) for s in stops if s in whole]
    if not ends:
        assert (text, stop) == (whole, None)
    else:
        end, negative, expected = min(ends)
        assert stop == expected
        assert text == (whole[:end] if include else whole[: end + negative])


@given(whole=letters, more=letters, stops=st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_how_tokens_cut_the_text_does_not_matter(whole, more, stops):
    whole += more
    assert run([whole], stop=stops)[1:3] == run(list(whole), stop=stops)[1:3]


@given(pieces=st.lists(letters, max_size=10), stop=st.text("ab", min_size=1, max_size=4), every=st.integers(1, 4))
def test_deltas_taken_now_and_then_make_up_the_text(pieces, stop, every):
    detokenizer = Detokenizer(Pieces(*pieces), SamplingParams(stop=stop, max_tokens=None, min_tokens=2))
    got = ""
    for token in range(len(pieces)):
        found = detokenizer.append(token)
        if token % every == 0:
            got += detokenizer.delta()
        if found:
            break
    detokenizer.finish()
    assert got + detokenizer.delta() == detokenizer.text


def test_what_the_last_token_left_open_is_flushed_once_and_may_complete_a_stop_string():
    pieces = Pieces("ab", "c")
    pieces.left = "\ufffd"
    detokenizer = Detokenizer(pieces, SamplingParams())
    detokenizer.append(0)
    detokenizer.finish()
    detokenizer.finish()
    assert detokenizer.delta() == detokenizer.text == "ab\ufffd"
    stopped = Detokenizer(pieces, SamplingParams(stop="b\ufffd"))
    stopped.append(0)
    assert stopped.delta() == "a"
    stopped.finish()
    assert stopped.delta() == ""
    assert stopped.text == "a"
