"""How two runs of a prompt are compared."""

import math

import pytest
import torch

from modelport.testing.prompts import Prompt
from modelport.testing.registry import Failure
from modelport.testing.subject import Continuation, difference, magnitude

LOWEST = torch.finfo(torch.float32).min


def run(logits: list[float], token: int) -> Continuation:
    told = torch.tensor([logits])
    return Continuation(Prompt((1,)), [token], told.log_softmax(-1)[:, token], told)


def test_differences_are_relative_to_the_largest_logit_that_can_be_chosen():
    base, moved = run([1.0, -8.0, 2.0, LOWEST], 2), run([1.0, -8.0, 2.5, LOWEST], 2)
    assert difference(base, moved) == 0.5 / 8
    with pytest.raises(Failure, match="token 0 is 0 instead of 2"):
        difference(base, run([3.0, -8.0, 2.0, LOWEST], 0))


def test_broken_logits_are_no_magnitude():
    assert magnitude(torch.tensor([1.0, math.nan])) == math.inf
    assert magnitude(torch.tensor([1.0, -math.inf])) == math.inf
