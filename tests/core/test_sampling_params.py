"""`SamplingParams`: defaults, every bad value refused by name, and what the model's vocabulary adds."""

import copy
import logging
import math
import subprocess
import sys

import numpy as np
import pytest

from modelport import sampling_params
from modelport.sampling_params import SamplingParams, takes_prompt

BAD = [
    ("n", [0, -1, True, 1.5, "2", None, 16385]),
    ("temperature", [-0.1, math.nan, math.inf, -math.inf, "1", None, True, 10**400]),
    ("top_p", [0, 0.0, -0.5, 1.01, math.nan, "0.9", None, True]),
    ("top_k", [-2, 1.0, True, None, "50"]),
    ("min_p", [-0.1, 1.1, math.nan, None]),
    ("repetition_penalty", [0, -1.0, math.nan, math.inf, None]),
    ("presence_penalty", [-2.1, 2.1, math.nan, "0"]),
    ("frequency_penalty", [-2.1, 2.1, math.nan, None]),
    ("seed", [1.0, "1", True, 2**64, -(2**63) - 1]),
    ("stop", ["", [""], ["a", ""], 5, ["a", 5], b"a", {"a": 1}]),
    ("stop_token_ids", [5, [-1], [1.0], [True], ["1"], "12", 0]),
    ("min_tokens", [-1, 1.0, True, None, 17]),
    ("max_tokens", [0, -1, 1.0, True, "16"]),
    ("ignore_eos", [None, 1, "yes"]),
    ("logprobs", [-1, 21, True, 1.0, "5"]),
    ("prompt_logprobs", [-1, 21, False]),
    ("logit_bias", [[(1, 2.0)], {-1: 1.0}, {"a": 1.0}, {1.5: 1.0}, {1: math.nan}, {1: math.inf}, {1: "2"}, {True: 1}]),
    ("bad_words", ["word", [""], [5], 5]),
    ("allowed_token_ids", [[], [-1], 7, ["7"]]),
    ("skip_special_tokens", [None, 0]),
    ("include_stop_str_in_output", ["no"]),
    ("detokenize", [0]),
    ("logits_processors", [5, [5], [lambda logits: logits], [lambda a, b, c, d: d], lambda output, logits: logits]),
]


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD for value in values])
def test_a_bad_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"^{field}=.* must be"):
        SamplingParams(**{field: value})


def test_defaults_ask_for_nothing_special():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.max_tokens) == (1, 1.0, 1.0, 0, 16)
    assert params.stop == params.stop_token_ids == params.bad_words == params.logits_processors == []
    assert params.logit_bias is None
    assert params.allowed_token_ids is None
    assert params.seed is None


def test_the_message_shows_the_value_and_the_cure():
    with pytest.raises(ValueError, match=r"top_p=0 .*\(0, 1\].*temperature=0 is greedy"):
        SamplingParams(top_p=0)
    with pytest.raises(ValueError, match=r"min_tokens=9 .*at most max_tokens, which is 8"):
        SamplingParams(min_tokens=9, max_tokens=8)


def test_values_are_brought_to_their_plain_form():
    params = SamplingParams(
        stop="\n",
        logit_bias={"7": 1, np.int64(8): np.float32(0.5)},
        top_k=np.int32(5),
        temperature=1,
        stop_token_ids=np.array([3, 4]),
        seed=-1,
    )
    assert params.stop == ["\n"]
    assert params.logit_bias == {7: 1.0, 8: 0.5}
    assert params.seed is None
    assert params.stop_token_ids == [3, 4]
    assert type(params.stop_token_ids[0]) is int
    assert type(params.top_k) is int
    assert type(params.temperature) is float
    assert copy.deepcopy(params) == params
    params.check()  # nothing changes a second time
    assert params == copy.deepcopy(params)


def test_lists_of_the_caller_are_not_shared():
    stop = ["a"]
    params = SamplingParams(stop=stop)
    stop.append("")
    assert params.stop == ["a"]


def test_a_tiny_temperature_is_raised_with_a_note(caplog):
    sampling_params._note_small_temperature.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert SamplingParams(temperature=1e-5).temperature == 0.01
    assert "0.01" in caplog.text
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=0.01).greedy


def test_combinations_that_contradict_each_other():
    with pytest.raises(ValueError, match=r"n=2 .*temperature=0"):
        SamplingParams(n=2, temperature=0)
    with pytest.raises(ValueError, match=r"stop=.*detokenize"):
        SamplingParams(stop="a", detokenize=False)
    assert SamplingParams(min_tokens=100, max_tokens=None).max_tokens is None


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids", "logit_bias"])
def test_token_ids_are_checked_against_the_vocabulary(field):
    params = SamplingParams(**{field: {100: 1.0} if field == "logit_bias" else [100]})
    params.validate_vocab(101)
    with pytest.raises(ValueError, match=rf"{field}.*100.*0 to 99"):
        params.validate_vocab(100)


def test_fields_assigned_later_are_checked_when_the_engine_takes_them():
    params = SamplingParams()
    params.top_p = 0
    with pytest.raises(ValueError, match="top_p=0"):
        params.validate_vocab(10)


def test_bad_words_are_spelled_with_and_without_a_space_before():
    vocabulary = {"bad": [1, 2], " bad": [3], "\n": [4], " \n": [5, 4]}
    params = SamplingParams(bad_words=["bad", " bad", "\n"])
    assert params.bad_words_token_ids(vocabulary.__getitem__) == [(1, 2), (3,), (4,), (5, 4)]
    assert SamplingParams().bad_words_token_ids(vocabulary.__getitem__) == []


def test_both_forms_of_logits_processors_are_told_apart():
    class Three:
        def __call__(self, prompt, output, logits):
            return logits

    assert not takes_prompt(lambda output, logits: logits)
    assert takes_prompt(lambda prompt, output, logits: logits)
    assert takes_prompt(Three())
    assert not takes_prompt(lambda output, logits, strength=1: logits)


def test_importing_it_imports_no_torch():
    code = "import sys, modelport.sampling_params as s; s.SamplingParams(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
