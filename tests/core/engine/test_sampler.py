"""`Sampler`: the right token, from the right distribution, whatever else is in the batch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelport.engine.logits import LogitsEdits
from modelport.engine.sampler import Sampler, prompt_logprobs
from modelport.kernels import draw
from modelport.kernels.argmax import argmax
from modelport.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0)


def make(*requests, vocab=1000, prompt=(1, 2, 3), outputs=None, eos=(0,), bad_words=()):
    """A sampler with one request per parameters, request i in slot i with seed i; and their outputs."""
    sampler = Sampler(vocab, len(requests), torch.device("cpu"))
    outputs = outputs or [[] for _ in requests]
    for slot, params in enumerate(requests):
        sampler.add(slot, params, prompt, outputs[slot], slot, eos, bad_words)
    return sampler, outputs


def step(sampler, outputs, logits, slots=None):
    """Sample once and append, as the engine does."""
    slots = np.arange(len(logits)) if slots is None else np.asarray(slots)
    got = sampler.sample(logits, slots)
    for slot, token in zip(slots, got.token_ids.tolist(), strict=True):
        outputs[slot].append(token)
    return got


def rows(n, vocab=1000, seed=0):
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * 3


# Greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocab", [1, 7, 511, 512, 513, 1024, 5000])
def test_greedy_is_the_first_greatest(dtype, vocab):
    logits = rows(9, vocab).to(dtype)
    logits[3] = 1.0  # all equal
    logits[4, vocab // 2] = logits[4, -1] = 50.0
    sampler, _ = make(*[GREEDY] * 9, vocab=vocab)
    got = sampler.sample(logits, np.arange(9))
    assert got.token_ids.dtype == np.int64
    assert got.token_ids.tolist() == logits.argmax(-1).tolist()
    assert got.token_ids[3] == 0
    assert got.errors == {}
    assert got.logprobs == [None] * 9


def test_slots_and_rows_are_different_things():
    sampler, _ = make(GREEDY, SamplingParams(temperature=0, logit_bias={5: 1000.0}), GREEDY)
    assert sampler.sample(rows(2), np.array([2, 1], np.int32)).token_ids.tolist() == [rows(2)[0].argmax(), 5]
    sampler.remove(1)
    sampler.add(1, GREEDY, [], [], 0, ())
    assert sampler.sample(rows(1), np.array([1])).token_ids.tolist() == [rows(1)[0].argmax()]


def test_logits_that_are_not_contiguous_and_are_left_alone():
    padded = rows(2, 1100)
    logits = padded[:, :1000]
    before = padded.clone()
    sampler, outputs = make(GREEDY, SamplingParams(top_k=5, logit_bias={7: 100.0}, repetition_penalty=2.0, logprobs=2))
    assert step(sampler, outputs, logits).token_ids.tolist() == [logits[0].argmax(), 7]
    assert torch.equal(padded, before)


def test_greedy_reads_the_logits_as_they_are(monkeypatch):
    read = []

    def spy(x):
        read.append(x.data_ptr())
        return argmax(x)

    logits = rows(2).bfloat16()
    monkeypatch.setattr("modelport.engine.sampler.argmax", spy)
    monkeypatch.setattr("modelport.engine.sampler.draw", None)
    make(GREEDY, GREEDY)[0].sample(logits, np.arange(2))
    assert read == [logits.data_ptr()]


# The distribution


def weights_of(logits):
    return (logits - logits.amax(-1, keepdim=True)).exp()


def filtered(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    settings = torch.tensor([top_k]), torch.tensor([top_p], dtype=torch.float64), torch.tensor([min_p])
    weights = weights_of(logits / temperature)
    weights = draw.filter_weights(weights, *(s.expand(len(logits)) for s in settings), top_k)
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (0, 0.9, 0),
        (50, 1.0, 0),
        (50, 0.9, 0),
        (1, 1.0, 0),
        (0, 0.1, 0),
        (0, 1.0, 0.05),
        (900, 0.99, 0.001),
        (0, 0.999, 0),
    ],
)
def test_filters_keep_what_the_reference_keeps(temperature, top_k, top_p, min_p):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = rows(16)
    expected = warpers.TemperatureLogitsWarper(temperature)(None, logits)
    if min_p:  # before the others, as vLLM has it
        expected = warpers.MinPLogitsWarper(min_p)(None, expected)
    if top_k:
        expected = warpers.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = warpers.TopPLogitsWarper(top_p)(None, expected)
    got = filtered(logits, temperature, top_k, top_p, min_p)
    assert torch.equal(got > 0, expected > -math.inf)
    torch.testing.assert_close(got, expected.softmax(-1), rtol=1e-5, atol=1e-8)


def plain_filter(weights, top_k, top_p, min_p):
    """The definitions, one row at a time."""
    floor = max(sorted(weights, reverse=True)[top_k - 1] if top_k else 0, min_p)
    weights = [w if w >= floor else 0.0 for w in weights]
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    keep, mass = set(), 0.0
    for i in order:
        if mass < top_p * sum(weights) or top_p == 1:
            keep.add(i)
        mass += weights[i]
    return [w if i in keep else 0.0 for i, w in enumerate(weights)]


requests = st.tuples(
    st.integers(0, 11), st.sampled_from([1.0, 0.01, 0.3, 0.5, 0.9, 0.99]), st.sampled_from([0, 0.25, 1.0])
)


@given(data=st.data(), first=st.sampled_from([1, 2, 64]), vocab=st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_filters_follow_their_definitions_among_many_equals(data, first, vocab):
    entry = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=vocab, max_size=vocab)
    batch = data.draw(st.lists(st.tuples(entry, requests), min_size=1, max_size=5))
    batch = [([1.0, *weights[1:]], (min(k, vocab), p, m)) for weights, (k, p, m) in batch]
    top_k, top_p, min_p = (list(column) for column in zip(*[request for _, request in batch], strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "FIRST_LOOK", first)  # so that looks have to be widened
        patch.setattr(draw, "WIDER", 2)
        got = draw.filter_weights(
            torch.tensor([weights for weights, _ in batch]),
            torch.tensor(top_k),
            torch.tensor(top_p, dtype=torch.float64),
            torch.tensor(min_p, dtype=torch.float32),
            max(top_k),
        )
    assert got.tolist() == [plain_filter(weights, *request) for weights, request in batch]


def test_a_wide_nucleus_is_found_whole():
    vocab, weights = 6000, torch.ones(1, 6000)
    keep = draw.filter_weights(
        weights, torch.tensor([0]), torch.tensor([0.75], dtype=torch.float64), torch.tensor([0.0]), 0
    )
    assert keep[0].nonzero()[:, 0].tolist() == list(range(vocab * 3 // 4))


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    assert expected.min() > 5
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.7, top_k=12, top_p=0.95)])
def test_tokens_come_as_often_as_they_should(params):
    vocab, requests, places = 1100, 800, 10
    logits = torch.full((1, vocab), -math.inf)
    likely = torch.arange(0, vocab, 55)  # 20 tokens over all blocks
    logits[0, likely] = rows(1, len(likely))[0] / 3
    sampler, outputs = make(*[params] * requests, vocab=vocab)
    for _ in range(places):
        step(sampler, outputs, logits.expand(requests, vocab))
    counts = np.bincount(np.array(outputs).ravel(), minlength=vocab)
    expected = (logits / params.temperature).softmax(-1)[0].double()
    if params.top_k:
        order = expected.argsort(descending=True)
        nucleus = order[: int((expected[order[:12]].cumsum(0) < 0.95 * expected[order[:12]].sum()).sum()) + 1]
        expected = torch.zeros_like(expected).index_copy(0, nucleus, expected[nucleus])
        expected /= expected.sum()
    expected = expected.numpy()
    assert counts[expected == 0].sum() == 0
    freedom = (expected > 0).sum() - 1
    assert chi_square(counts[expected > 0], expected[expected > 0]) < freedom + 4 * math.sqrt(2 * freedom)


def test_random_numbers_are_uniform_over_seeds_and_over_places():
    many = np.arange(20000, dtype=np.uint64)
    for seeds, places in ((many, many * np.uint64(0)), (many * np.uint64(0), many)):
        numbers = draw.uniform(seeds, places)
        assert numbers.min() >= 0
        assert numbers.max() < 1
        assert chi_square(np.histogram(numbers, 50, (0, 1))[0], np.full(50, 0.02)) < 49 + 4 * math.sqrt(98)
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.03


@given(u=st.floats(0, 1, exclude_max=True), weights=st.lists(st.sampled_from([0.0, 1e-30, 1e-8, 0.5, 1.0]), max_size=9))
@settings(deadline=None)
def test_a_draw_never_finds_a_token_without_weight(u, weights):
    weights = [0.0] * 500 + weights + [0.0] * 600 + [1.0] + weights + [0.0]  # over three blocks
    uniforms = [u, 0.0, math.nextafter(1.0, 0.0)]
    tokens = draw.pick(torch.tensor([weights] * 3), torch.tensor(uniforms, dtype=torch.float64)).tolist()
    sums = np.cumsum(weights)
    for token, number in zip(tokens, uniforms, strict=True):
        assert weights[token] > 0
        assert sums[token] >= number * sums[-1] * (1 - 1e-6)
    assert tokens[1] == next(i for i, w in enumerate(weights) if w)


def test_a_block_s_sum_that_is_rounded_up_leads_nowhere_else():
    weights = torch.zeros(1, 3 * draw.BLOCK)
    weights[0, :2] = torch.tensor([1.0, 1.5 * 2**-24])
    assert weights[0, : draw.BLOCK].sum().double() > weights[0, : draw.BLOCK].double().sum()
    assert draw.pick(weights, torch.tensor([math.nextafter(1.0, 0.0)], dtype=torch.float64)).item() == 1


# Independence


MIXED = [
    SamplingParams(),
    GREEDY,
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(top_k=40, top_p=0.95, repetition_penalty=1.3),
    SamplingParams(min_p=0.02, presence_penalty=1.0),
    SamplingParams(temperature=0, frequency_penalty=1.0),
    SamplingParams(temperature=1.5, allowed_token_ids=list(range(0, 1000, 3)), logprobs=3),
    SamplingParams(top_p=0.99, min_tokens=3, logit_bias={0: 5.0}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_do_not_depend_on_the_rest_of_the_batch(dtype):
    steps, n = 6, len(MIXED)
    logits = [rows(n, seed=s).to(dtype) for s in range(steps)]
    sampler, together = make(*MIXED)
    for some in logits:
        step(sampler, together, some)
    alone_sampler, alone = make(*MIXED)
    for slot in range(n):
        for some in logits:
            step(alone_sampler, alone, some[slot : slot + 1], [slot])
    assert alone == together
    mixed_sampler, mixed = make(*MIXED)
    for number, some in enumerate(logits):
        order = np.random.default_rng(number).permutation(n)
        step(mixed_sampler, mixed, some[order], order)
    assert mixed == together


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_a_preempted_request_goes_on_as_if_nothing_had_been(cut):
    logits = [rows(len(MIXED), seed=s) for s in range(6)]
    sampler, whole = make(*MIXED)
    for some in logits:
        step(sampler, whole, some)
    sampler, outputs = make(*MIXED, outputs=[output[:cut] for output in whole])
    for some in logits[cut:]:
        step(sampler, outputs, some)
    assert outputs == whole


def test_seeds_decide():
    logits = rows(1).expand(4, -1)
    sampler = Sampler(1000, 4, torch.device("cpu"))
    outputs = [[] for _ in range(4)]
    for slot, seed in enumerate([7, 7, 8, -(2**80)]):
        sampler.add(slot, SamplingParams(), [], outputs[slot], seed, ())
    for _ in range(8):
        step(sampler, outputs, logits)
    assert outputs[0] == outputs[1]
    assert len({tuple(output) for output in outputs}) == 3
    assert len(set(outputs[0])) > 1  # a new number for each place


# Edits


def edited(params, logits, prompt=(), output=(), **settings):
    """The logits of one request as `LogitsEdits` leaves them."""
    edits = LogitsEdits(logits.shape[-1], 1)
    rest = (settings.get("stop_ids", ()), settings.get("bad_words", ()), settings.get("forced", {}))
    edits.add(0, params, prompt, list(output), *rest)
    x = logits.clone()
    assert edits.apply(x, np.array([0])) == {}
    return x


def test_repetition_penalty_is_the_reference_s():
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits, prompt, output = rows(1), [5, 6, 6, 7], [7, 900, 900]
    expected = processors.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + output]), logits.clone())
    params = SamplingParams(repetition_penalty=1.3)
    torch.testing.assert_close(edited(params, logits, prompt, output), expected)
    assert torch.equal(edited(params, logits, [5, 5000, -1], []), edited(params, logits, [5], []))  # media's ids


def test_presence_and_frequency_penalties_count_the_output_alone():
    logits, output = rows(1), [7, 900, 900]
    expected = logits.clone()
    expected[0, 7] -= 0.5 + 0.25
    expected[0, 900] -= 0.5 + 2 * 0.25
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    torch.testing.assert_close(edited(params, logits, [5, 6, 7], output), expected)
    both = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0)
    first = edited(SamplingParams(repetition_penalty=2.0), logits, [5], output)
    torch.testing.assert_close(edited(both, logits, [5], output), first + expected - logits)


def test_penalties_see_tokens_as_they_arrive():
    sampler, outputs = make(SamplingParams(temperature=0, frequency_penalty=2.0))
    logits = torch.zeros(1, 1000)
    logits[0, :3] = torch.tensor([9.5, 9.0, 5.2])
    for _ in range(6):
        step(sampler, outputs, logits)
    assert outputs == [[0, 1, 0, 1, 0, 2]]  # 9.5 9.0 7.5 7.0 5.5 | 5.2


def test_bias_and_allowed_tokens():
    logits = rows(1)
    got = edited(SamplingParams(logit_bias={"3": 2.5, 4: -1.0}, allowed_token_ids=[9, 3, 4, 3]), logits)
    assert (got > -math.inf).nonzero()[:, 1].tolist() == [3, 4, 9]
    torch.testing.assert_close(got[0, [3, 4, 9]], logits[0, [3, 4, 9]] + torch.tensor([2.5, -1.0, 0.0]))


def test_no_end_before_min_tokens_and_then_the_fast_path():
    logits = torch.zeros(1, 1000)
    logits[0, [0, 8, 5]] = torch.tensor([9.0, 8.0, 7.0])  # end of text, a stop token, an ordinary one
    sampler, outputs = make(SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[8]))
    for _ in range(4):
        step(sampler, outputs, logits)
    assert outputs == [[5, 5, 0, 0]]
    assert not sampler._edits.active.any()


def test_bad_words_are_stopped_at_their_last_token():
    words = [(4,), (5, 6), (5, 7), (1, 2, 3)]
    banned = lambda output: (  # noqa: E731
        edited(SamplingParams(), rows(1), (5,), output, bad_words=words)[0].isinf().nonzero()[:, 0].tolist()
    )
    assert banned([]) == [4]  # the prompt's 5 does not count
    assert banned([5]) == [4, 6, 7]
    assert banned([1, 2]) == [3, 4]
    assert banned([2]) == banned([1, 2, 9]) == [4]


def test_ids_that_only_the_tokenizer_has_touch_no_other_row():
    sampler, _ = make(*[SamplingParams(temperature=0, min_tokens=1)] * 2, eos=(1000 + 7,), bad_words=[(1000 + 7,)])
    logits = torch.zeros(2, 1000)
    logits[1, 7] = 1.0
    assert sampler.sample(logits, np.arange(2)).token_ids.tolist() == [0, 7]


def test_own_processors_get_their_arguments_and_their_way():
    seen = []

    def two(output, logits):
        seen.append(list(output))
        logits[6] = 1000.0
        return logits

    def three(prompt, output, logits):
        seen.append((prompt, list(output), logits.shape, logits.dtype))
        return torch.where(torch.arange(len(logits)) == 6, -math.inf, logits)

    logits = rows(3).bfloat16()
    sampler, outputs = make(
        GREEDY,
        SamplingParams(temperature=0, logits_processors=[two]),
        SamplingParams(temperature=0, logits_processors=[two, three]),
    )
    step(sampler, outputs, logits)
    got = step(sampler, outputs, logits)
    assert got.token_ids.tolist() == [logits[0].argmax(), 6, logits[2].argmax()]
    assert seen[-1] == ([1, 2, 3], [logits[2].argmax()], (1000,), torch.float32)
    assert seen[-3] == [6]


# What goes wrong


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_k=3, top_p=0.5, logprobs=1)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_harms_no_other(params, bad):
    logits = rows(3)
    expected = make(*[params] * 3)[0].sample(logits, np.arange(3))
    logits[1, 600] = bad
    got = make(*[params] * 3)[0].sample(logits, np.array([0, 1, 2]))
    assert list(got.errors) == [1]
    assert "FloatingPointError" in got.errors[1]
    assert f"slot 1 hold {bad}" in got.errors[1]
    assert got.token_ids[[0, 2]].tolist() == expected.token_ids[[0, 2]].tolist()
    assert (got.token_ids[1], got.logprobs[1]) == (-1, None)


def test_nothing_left_to_choose_from_is_said():
    only_end = SamplingParams(allowed_token_ids=[0], min_tokens=2)
    sampler, outputs = make(only_end, SamplingParams())
    got = step(sampler, outputs, rows(2))
    assert list(got.errors) == [0]
    assert "allowed_token_ids" in got.errors[0]


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda output, logits: 1 / 0, "ZeroDivisionError"),
        (lambda output, logits: logits[:5], r"\(5,\), not a tensor of shape \(1000,\)"),
        (lambda output, logits: None, "NoneType"),
    ],
)
def test_a_processor_that_fails_harms_no_other(processor, message):
    sampler, outputs = make(SamplingParams(logits_processors=[processor]), GREEDY)
    got = step(sampler, outputs, rows(2))
    assert list(got.errors) == [0]
    with pytest.raises(ValueError, match=rf"lambda.*failed.*{message}"):
        raise ValueError(got.errors[0])
    assert got.token_ids.tolist() == [-1, rows(2)[1].argmax()]


def test_extreme_temperatures_still_draw():
    sampler, outputs = make(
        SamplingParams(temperature=1e-9), SamplingParams(temperature=1e300, allowed_token_ids=[3, 4])
    )
    for _ in range(20):
        assert step(sampler, outputs, rows(2)).errors == {}
    assert set(outputs[0]) == {int(rows(2)[0].argmax())}
    assert set(outputs[1]) == {3, 4}


# Log-probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_untouched_logits(dtype):
    logits = rows(4).to(dtype)
    asks = [0, None, 5, 20]
    sampler, outputs = make(*[SamplingParams(temperature=0.5, logit_bias={17: 100.0}, logprobs=k) for k in asks])
    got = step(sampler, outputs, logits)
    expected = logits.float().log_softmax(-1)
    assert got.token_ids.tolist() == [17] * 4
    assert got.logprobs[1] is None
    for row in (0, 2, 3):
        entry, k = got.logprobs[row], asks[row]
        assert entry.logprob == pytest.approx(expected[row, 17].item(), abs=1e-5)
        assert entry.rank == 1 + int((expected[row] > expected[row, 17]).sum())
        best = sorted(range(1000), key=lambda i, row=row: (-expected[row, i].item(), i))[:k]
        if dtype == torch.float32:  # in bfloat16 the last of the list may have equals outside of it
            assert entry.top_ids == best
        assert entry.top_logprobs == pytest.approx(expected[row, best].tolist(), abs=1e-5)
        assert all(type(token) is int for token in entry.top_ids)


def test_more_logprobs_than_tokens():
    sampler, outputs = make(SamplingParams(temperature=0, logprobs=20), vocab=3)
    entry = step(sampler, outputs, torch.tensor([[1.0, 2.0, 1.0]])).logprobs[0]
    assert (entry.rank, entry.top_ids) == (1, [1, 0, 2])


def test_prompt_logprobs():
    logits = rows(300)
    following = torch.randint(0, 1000, (300,), generator=torch.Generator().manual_seed(1))
    got = prompt_logprobs(logits, following, 2)
    expected = logits.log_softmax(-1)
    assert len(got) == 300
    assert [e.logprob for e in got] == pytest.approx(expected.gather(1, following[:, None])[:, 0].tolist(), abs=1e-5)
    assert [e.top_ids for e in got] == expected.topk(2).indices.tolist()
    assert prompt_logprobs(logits[:0], following[:0], 2) == []


def test_forced_tokens_stand_in_their_places_whatever_else_was_asked_for():
    params = SamplingParams(min_tokens=3, allowed_token_ids=[1])
    logits = torch.tensor([[5.0, 1.0, 2.0, 3.0]])
    for length, want in ((0, [3]), (1, [1]), (2, [2])):
        found = edited(params, logits, output=[1] * length, stop_ids=[2], forced={0: 3, 2: 2})
        assert torch.isfinite(found.view(-1)).nonzero().view(-1).tolist() == want
