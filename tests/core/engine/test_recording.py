"""Recorded decode steps: bit for bit what the model computes, and only where that is certain."""

import dataclasses

import numpy as np
import pytest
import torch

from modelport import LLM, SamplingParams
from modelport.batch import Batch, Pages
from modelport.engine import recording, runner
from modelport.engine.buckets import Buckets
from modelport.engine.recording import Recorder
from modelport.kernels import cpu, kv_cache, linear, norm
from modelport.plugin import load_plugins
from modelport.testing.reference import ModuleReference

pytestmark = pytest.mark.skipif(cpu.lib is None, reason="the compiled kernels are not built")
ROWS, WIDTH = 3, 16


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def step(seed: int, rows: int = ROWS, columns: int = 2) -> tuple[torch.Tensor, Batch]:
    """Token ids and a batch with other numbers for every seed."""
    chance = np.random.default_rng(seed)

    def ints(*shape: int, dtype: type = np.int32) -> torch.Tensor:
        return torch.from_numpy(chance.integers(0, 32, shape).astype(dtype))

    pages = Pages(ints(rows, columns), ints(rows, dtype=np.int64))
    starts, slots = torch.arange(rows + 1, dtype=torch.int32), torch.arange(rows, dtype=torch.int32)
    return ints(rows, dtype=np.int64), Batch(ints(rows, dtype=np.int64), starts, ints(rows), (pages,), slots, 1)


def same_as_plain(recorder: Recorder, seeds: range, **shape: int) -> None:
    for seed in seeds:
        token_ids, batch = step(seed, **shape)
        found = recorder.run(token_ids, batch)
        if found is not None:
            assert torch.equal(found, recorder.function(token_ids, batch))


WEIGHT = torch.randn(WIDTH, WIDTH)
PACKED = linear.pack(WEIGHT)
EMBEDDING = torch.randn(32, WIDTH)


def kernels_and_operations(token_ids, batch):
    """Views, allocations, numbers as tensors, several results, operations in place, and kernels between them."""
    x = EMBEDDING[token_ids] * torch.tensor(1.5)
    a, b = norm.rms_norm(x, EMBEDDING[0], 1e-6).split(WIDTH // 2, 1)
    x = torch.cat((b.relu(), a), 1)
    x = linear.linear(x, PACKED, residual=x)
    values, places = x.topk(3)
    out = torch.empty_like(x)
    out.copy_(x.t().contiguous().t())
    out[:, :3] += values
    out.scatter_(1, places, 0.5)
    mask = batch.positions > 7
    out[mask] = 0.25
    out += torch.zeros_like(out).scatter_add_(1, places, values).reshape(len(x), -1) * batch.pages[0].slots[:, None]
    return torch.nn.functional.softmax(out.view(len(x), 2, -1), -1).flatten(1)


def test_replays_are_the_function():
    recorder = Recorder(kernels_and_operations)
    same_as_plain(recorder, range(8))
    assert recorder.given_up is None
    assert recorder.num_replays == 5  # the first is not worth it, the second is recorded, the third is the proof


def test_every_number_of_rows_has_its_own_recording():
    recorder = Recorder(kernels_and_operations)
    for seed in range(0, 40, 4):
        for rows in (1, 4, 2):
            same_as_plain(recorder, range(seed, seed + 1), rows=rows)
    assert recorder.num_replays == 3 * 7


def test_other_numbers_of_rows_share_a_recording():
    """Rows of no sequence fill it up, and stay out of the others' way."""
    recorder = Recorder(kernels_and_operations)
    for seed, rows in enumerate((33, 36, 35, 33, 34, 36, 34)):
        same_as_plain(recorder, range(seed, seed + 1), rows=rows)
    assert recorder.num_replays == 4
    assert recorder.run(*step(0, rows=129)) is None


def test_what_a_layer_keeps_for_good_is_not_in_the_recordings_memory():
    kept = {}

    def function(token_ids, batch):
        rows = len(token_ids)
        if rows not in kept:  # once for each number of rows, for all steps to come
            kept[rows] = torch.arange(rows, dtype=torch.float32)[:, None] * 3
        return EMBEDDING[token_ids] * 2 + kept[rows]

    recorder = Recorder(function)
    for rows in (9, 13, 33):
        same_as_plain(recorder, range(4), rows=rows)
    assert recorder.num_replays == 3
    for rows, numbers in kept.items():
        assert numbers[:, 0].tolist() == [3.0 * i for i in range(rows)]


def test_places_are_used_again_once_the_model_has_let_go(monkeypatch):
    def chain(token_ids, batch):
        x = first = EMBEDDING[token_ids] + 1
        for number in range(20):
            x = norm.rms_norm(x.clone(), EMBEDDING[number], 1e-6) + x * 0.5
        return x - first  # held all the while

    monkeypatch.setattr(recording, "MOST_BYTES", 5 * 4 * WIDTH * 4)
    recorder = Recorder(chain)
    same_as_plain(recorder, range(8), rows=4)
    assert (recorder.num_replays, recorder.given_up) == (5, None)


def test_a_table_that_outgrows_its_recording():
    def table_sums(token_ids, batch):
        lens = batch.seq_lens[:, None]
        used = torch.arange(batch.pages[0].block_table.shape[1]) < lens
        return (batch.pages[0].block_table * used).sum(1, keepdim=True).float()

    recorder = Recorder(table_sums)
    same_as_plain(recorder, range(10), columns=33)  # lengths are below 32
    assert recorder.num_replays == 7
    same_as_plain(recorder, range(10), columns=60)
    assert recorder.num_replays == 17
    same_as_plain(recorder, range(10), columns=257)
    assert recorder.num_replays == 24  # recorded and proved again
    same_as_plain(recorder, range(10), columns=33)
    assert recorder.num_replays == 34


def test_threads_are_part_of_a_recording():
    recorder, threads = Recorder(kernels_and_operations), torch.get_num_threads()
    same_as_plain(recorder, range(4))
    try:
        torch.set_num_threads(threads + 1)
        assert recorder.run(*step(5)) is None
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[x[:, 0] > 0].sum() + x,
        lambda x: x + x[0, 0].item(),
        lambda x: x + float(x[0, 0]),
        lambda x: -x if x.sum() > 0 else x,
        lambda x: x + x.tolist()[0][0],
        lambda x: x + torch.from_numpy(x.numpy() * 2),
        lambda x: x + np.asarray(x)[0, 0],
        lambda x: x + x.nonzero().sum(),
        lambda x: x + torch.randn(WIDTH),
        lambda x: x.clone().unsqueeze_(0)[0],
        lambda x: torch.repeat_interleave(x, (x[:, 0] > 0).long() + 1, dim=0)[:ROWS],
    ],
)
def test_what_depends_on_numbers_is_left_to_the_model(read, caplog):
    caplog.set_level("DEBUG", logger=recording.__name__)

    def function(token_ids, batch):
        return read(linear.linear(EMBEDDING[token_ids], PACKED))

    recorder = Recorder(function)
    assert recorder.run(*step(0)) is None
    torch.manual_seed(0)
    found = recorder.run(*step(1))  # the attempt is a sound step all the same
    torch.manual_seed(0)
    assert torch.equal(found, function(*step(1)))
    assert recorder.given_up is not None
    assert all(recorder.run(*step(seed)) is None for seed in range(2, 6))
    assert [r.message for r in caplog.records] == [
        f"steps of this model are not recorded: {recorder.given_up}"
    ]  # said once


def test_what_nobody_could_see_is_found_by_the_proof():
    steps = iter(range(100))
    recorder = Recorder(lambda token_ids, batch: EMBEDDING[token_ids] + next(steps))
    assert recorder.run(*step(0)) is None
    assert torch.equal(recorder.run(*step(1)), EMBEDDING[step(1)[0]])
    assert torch.equal(recorder.run(*step(2)), EMBEDDING[step(2)[0]] + 1)
    assert recorder.run(*step(3)) is None
    assert "something else" in recorder.given_up


def test_steps_that_take_long_are_not_recorded(monkeypatch):
    monkeypatch.setattr(recording, "LONG", 0.0)
    recorder = Recorder(kernels_and_operations)
    same_as_plain(recorder, range(6), rows=9)  # filled up to 10
    assert (recorder.num_replays, recorder.given_up) == (0, None)
    same_as_plain(recorder, range(6), rows=8)
    assert recorder.num_replays == 3


def test_recurrent_states_advance_once_a_step():
    def function(token_ids, batch):
        rows = batch.state_slots.long()
        state[rows] = state[rows] * 0.5 + EMBEDDING[token_ids]
        return state[rows] * 2

    state = torch.zeros(5, WIDTH)
    recorder, expected = Recorder(function, [state]), torch.zeros(5, WIDTH)
    for seed in range(8):
        token_ids, batch = step(seed)
        if recorder.run(token_ids, batch) is None:
            function(token_ids, batch)
        expected[:ROWS] = expected[:ROWS] * 0.5 + EMBEDDING[token_ids]
        assert torch.equal(state, expected), seed
    assert recorder.num_replays == 5


def test_indices_are_checked_in_replays():
    cache = torch.zeros(2, 2, 32, 8)

    def function(token_ids, batch):
        x = EMBEDDING[token_ids].view(-1, 2, 8)
        kv_cache.write(x, x, cache, cache, batch.pages[0].slots)
        return x.flatten(1) * 2

    recorder = Recorder(function)
    same_as_plain(recorder, range(4))
    token_ids, batch = step(9)
    bad = dataclasses.replace(batch, pages=(Pages(batch.pages[0].block_table, torch.tensor([1, 64, 2])),))
    before = cache.clone()
    with pytest.raises(ValueError, match="slot 64 is outside the cache of 64 slots"):
        recorder.run(token_ids, bad)
    assert torch.equal(cache, before)
    with pytest.raises(IndexError):
        recorder.run(token_ids + 32, batch)
    same_as_plain(recorder, range(4, 6))
    assert recorder.given_up is None


def test_an_error_while_recording_is_the_models_own():
    recorder = Recorder(lambda token_ids, batch: EMBEDDING[token_ids])
    recorder.run(*step(0))
    with pytest.raises(IndexError):
        recorder.run(step(1)[0] + 32, step(1)[1])
    same_as_plain(recorder, range(2, 6))  # and recording has ended
    assert recorder.num_replays == 2


def test_no_wrapper_that_imports_torchs_compiler():
    """It takes seconds, in the middle of somebody's first answer."""
    assert recording._Watch.__torch_dispatch__.__code__.co_filename == recording.__file__


def test_bounds(monkeypatch):
    monkeypatch.setattr(recording, "MOST_BYTES", 20 * 4 * WIDTH)
    monkeypatch.setattr(recording, "_MOST_RECORDINGS", 2)

    def function(token_ids, batch):
        a = EMBEDDING[token_ids]
        b = a * 2
        return a + b

    recorder = Recorder(function)
    same_as_plain(recorder, range(4), rows=8)
    assert recorder.num_replays == 0  # 3 results of 8 rows, all there at one time, do not fit
    same_as_plain(recorder, range(8), rows=8)
    assert (recorder.num_replays, recorder.given_up) == (0, None)
    for rows in (1, 2, 3):
        same_as_plain(recorder, range(4), rows=rows)
    assert recorder.num_replays == 3
    same_as_plain(recorder, range(1), rows=1)  # the oldest made room
    assert recorder.num_replays == 3


def test_reset_takes_new_weights():
    weights = [torch.ones(WIDTH)]
    recorder = Recorder(lambda token_ids, batch: EMBEDDING[token_ids] * weights[0])
    same_as_plain(recorder, range(4))
    weights[0] = torch.full((WIDTH,), 2.0)
    recorder.reset()
    same_as_plain(recorder, range(4, 8))
    assert recorder.num_replays == 2


# Whole models

SOME = ("LlamaForCausalLM", "MambaForCausalLM", "MixtralForCausalLM", "DeepseekV2ForCausalLM", "BloomForCausalLM")
UNRECORDED = ("BartForConditionalGeneration", "BartModel", "Llama4ForCausalLM")
ARCHITECTURES = [a.name for a in load_plugins().architectures.values() if a.tiny and a.reference]
OTHERS = [name for name in ARCHITECTURES if name not in SOME]


def logits_of(llm: LLM, prompts: list, params: list, replays: bool) -> tuple[list, list]:
    """The logits of every step, and the tokens; requests end and come at different times."""
    mine, seen = llm._front.engine.runner, []
    recorder, recorded, sample = mine.recorder, mine.prompts, mine.sampler.sample
    if not replays:
        mine.recorder = mine.prompts = None
    mine.sampler.sample = lambda logits, slots: seen.append(logits.clone()) or sample(logits, slots)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    mine.recorder, mine.prompts, mine.sampler.sample = recorder, recorded, sample
    return seen, [list(o.outputs[0].token_ids) for o in outputs]


def text_prompts(llm: LLM, lengths: tuple[int, ...]) -> list[list[int]]:
    """Of text alone."""
    generator, media = torch.Generator().manual_seed(7), llm._front.media
    held = {media.processor.placeholder_id(m) for m in media.processor.modalities} if media else set()
    free = torch.tensor([token for token in range(5, 300) if token not in held])
    return [free[torch.randint(len(free), (n,), generator=generator)].tolist() for n in lengths]


def same_bits(got: tuple[list, list], want: tuple[list, list]) -> None:
    assert got[1] == want[1]
    assert len(got[0]) == len(want[0])
    for one, other in zip(got[0], want[0], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_prompts_of_every_family_bit_for_bit(name, tmp_path, monkeypatch):
    """Steps that are full of prompts, beside new tokens, filled up with sequences that have no rows."""
    monkeypatch.setattr(runner, "PROMPTS", Buckets((), columns=64, seqs=(2, 4), full=8))
    ModuleReference(load_plugins().find([name])).save(tmp_path)
    llm = LLM(
        str(tmp_path), skip_tokenizer_init=True, max_model_len=128, max_num_batched_tokens=8, max_num_seqs=4,
        enable_prefix_caching=False, num_kv_blocks=24,
    )  # fmt: skip
    prompts = text_prompts(llm, (70, 11, 1, 50, 33))
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 20, 30, 9, 12)]
    recorder = llm._front.engine.runner.prompts
    same_bits(logits_of(llm, prompts, params, replays=True), logits_of(llm, prompts, params, replays=False))
    if recorder.num_replays < 8:  # an encoder reads each prompt whole; tables that depend on numbers are made in Python
        assert name in UNRECORDED, recorder.given_up


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_family_bit_for_bit(name, tmp_path):
    architecture = load_plugins().find([name])
    ModuleReference(architecture).save(tmp_path)
    # few blocks, so that requests are preempted; without prefixes, so that the second run does all of the first
    llm = LLM(
        str(tmp_path), skip_tokenizer_init=True, max_model_len=128, num_kv_blocks=10, enable_prefix_caching=False,
        max_num_seqs=3,
    )  # fmt: skip
    prompts = text_prompts(llm, (1, 17, 40, 9, 23))
    params = [
        SamplingParams(temperature=t, top_k=k, seed=3, max_tokens=n, ignore_eos=True, presence_penalty=p)
        for t, k, n, p in ((0, 0, 60, 0), (1, 20, 50, 0), (0, 0, 45, 1), (0.7, 0, 30, 0), (0, 0, 50, 0))
    ]
    recorder = llm._front.engine.runner.recorder
    want = logits_of(llm, prompts, params, replays=False)
    got = logits_of(llm, prompts, params, replays=True)
    assert recorder.given_up is None
    assert recorder.num_replays > 30
    same_bits(got, want)
