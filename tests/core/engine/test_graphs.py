"""Steps from graphs: what a GPU would capture is run again here as it is, over the same inputs that stay in place."""

import dataclasses

import pytest
import torch

from modelport import LLM, SamplingParams
from modelport.batch import Batch, Pages
from modelport.engine import graphs
from modelport.engine.buckets import Buckets
from modelport.engine.graphs import GraphRecorder
from modelport.modeling.cache import StateSpec
from modelport.plugin import load_plugins
from modelport.testing.reference import ModuleReference


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def same_again(function):
    return function


def step(rows: int, columns: int = 2, seed: int = 0) -> tuple[torch.Tensor, Batch]:
    torch.manual_seed(seed)
    pages = Pages(torch.randint(0, 9, (rows, columns), dtype=torch.int32), torch.randint(0, 99, (rows,)))
    ints = torch.randint(1, 32, (rows,), dtype=torch.int32)
    starts, slots = torch.arange(rows + 1, dtype=torch.int32), torch.arange(rows, dtype=torch.int32)
    return torch.randint(0, 32, (rows,)), Batch(torch.randint(0, 9, (rows,)), starts, ints, (pages,), slots, 1)


def test_a_bucket_is_filled_up_with_rows_of_no_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "BUCKETS", Buckets((4, 8), 64))
    seen: list[tuple[torch.Tensor, Batch]] = []

    def function(token_ids: torch.Tensor, batch: Batch) -> torch.Tensor:
        seen.append((token_ids.clone(), dataclasses.replace(batch, query_starts=batch.query_starts.clone())))
        return (token_ids + batch.seq_lens)[:, None].float() + batch.pages[0].slots[:, None]

    recorder = GraphRecorder(function, capture=same_again)
    for seed, (rows, columns) in enumerate([(3, 2), (3, 2), (4, 60), (2, 1), (3, 64)]):
        token_ids, batch = step(rows, columns, seed)
        seen.clear()
        found = recorder.run(token_ids, batch)
        if seed == 0:
            assert found is None  # what comes once need not come again
            continue
        ids, wide = seen[-1]
        assert torch.equal(found, (token_ids + batch.seq_lens)[:, None].float() + batch.pages[0].slots[:, None])
        assert (ids.tolist(), wide.seq_lens.tolist()) == (
            token_ids.tolist() + [0] * (4 - rows), batch.seq_lens.tolist() + [0] * (4 - rows)
        )  # fmt: skip
        assert wide.query_starts.tolist() == [*range(rows + 1), *[rows] * (4 - rows)]
        assert wide.pages[0].slots[rows:].tolist() == [-1] * (4 - rows)
        assert wide.pages[0].block_table.shape == (4, 64)
        assert torch.equal(wide.pages[0].block_table[:rows, :columns], batch.pages[0].block_table)
    assert recorder.num_replays == 3
    assert recorder.run(*step(3, 65)) is None  # another bucket
    assert recorder.run(*step(9)) is None


def test_recurrent_states_advance_once_a_step() -> None:
    state = torch.zeros(8, 2)

    def function(token_ids: torch.Tensor, batch: Batch) -> torch.Tensor:
        state[batch.state_slots.long()] += 1
        return state[batch.state_slots.long()]

    recorder = GraphRecorder(function, [state], capture=same_again)
    for seed in range(5):
        if recorder.run(*step(3, seed=seed)) is None:
            function(*step(3, seed=seed))
        assert state[:, 0].tolist() == [seed + 1] * 3 + [0] * 5


@pytest.mark.parametrize("failure", ["raises", "stale"])
def test_a_model_that_cannot_be_captured_is_left_alone(failure: str, caplog: pytest.LogCaptureFixture) -> None:
    def capture(function):
        if failure == "raises":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return lambda: torch.full((3, 1), 7e3)

    state = torch.zeros(8)

    def function(token_ids: torch.Tensor, batch: Batch) -> torch.Tensor:
        state[batch.state_slots.long()] += 1
        return token_ids[:, None].float()

    recorder = GraphRecorder(function, [state], capture=capture)
    assert recorder.run(*step(3)) is None
    token_ids, batch = step(3, seed=1)
    assert torch.equal(recorder.run(token_ids, batch), token_ids[:, None].float())
    assert state[:3].tolist() == [1, 1, 1]
    assert recorder.run(token_ids, batch) is None
    assert recorder.given_up in (
        "operation not permitted when stream is capturing",
        "a replay gave something else than the model",
    )
    assert recorder.given_up in caplog.text
    recorder.reset()
    assert recorder.given_up is None


SOME = (
    "LlamaForCausalLM", "MambaForCausalLM", "Mamba2ForCausalLM", "MixtralForCausalLM", "DeepseekV2ForCausalLM",
    "GptOssForCausalLM", "Phi3ForCausalLM", "JambaForCausalLM", "BloomForCausalLM", "BartForConditionalGeneration",
)  # fmt: skip
OTHERS = [a.name for a in load_plugins().architectures.values() if a.tiny and a.reference and a.name not in SOME]


@pytest.mark.parametrize("name", [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_families(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests end and come at different times, so that most steps have rows of no sequence."""
    monkeypatch.setattr(graphs, "BUCKETS", Buckets((4,), 64))
    ModuleReference(load_plugins().find([name])).save(tmp_path)
    llm = LLM(
        str(tmp_path), skip_tokenizer_init=True, max_model_len=128, num_kv_blocks=10, enable_prefix_caching=False,
        max_num_seqs=3, dtype="float32",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(5, 300, (n,), generator=generator).tolist() for n in (1, 17, 40, 9)]
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (30, 20, 12, 25)]
    runner = llm._front.engine.runner
    runner.recorder = None
    want = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
    recorder = runner.recorder = GraphRecorder(runner._decode, capture=same_again)
    layers = [m for m in llm._front.engine.model.modules() if isinstance(getattr(m, "cache_spec", None), StateSpec)]
    recorder.states = [state for layer in layers for state in (layer.conv_state, layer.state)]
    assert [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)] == want
    assert recorder.given_up is None
    assert recorder.num_replays > 10
