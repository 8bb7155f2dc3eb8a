"""Embeddings and heads divided by tokens: who has which, what is gathered, and what stays whole and says why."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from modelport import LLM, SamplingParams
from modelport.config import TextConfig
from modelport.loading.loader import WeightsError, load_weights, tensor_names
from modelport.modeling.embedding import Embedding, LMHead
from modelport.parallel.groups import Place, ThreadHub
from modelport.parallel.vocabulary import divide_vocabulary, is_head_divided
from modelport.plugin import Architecture, load_plugins
from modelport.testing.reference import ModuleReference

VOCABULARY, HIDDEN = 11, 8
CONFIG = TextConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2)
ARCHITECTURE = Architecture("ToyForCausalLM", nn.Module, TextConfig)
CPU = torch.device("cpu")
SETTINGS = {"dtype": "float32", "max_model_len": 64, "skip_tokenizer_init": True}
PROMPTS = [[5, 6, 7, 8, 9], [11], [3, 4] * 6]


def places(tp_size: int) -> tuple[ThreadHub, list[Place]]:
    hub = ThreadHub()
    return hub, [Place.of(rank, tp_size, 1, hub.links(rank)) for rank in range(tp_size)]


def everywhere(hub: ThreadHub, count: int, work: Callable[[int], Tensor]) -> list[Tensor]:
    """What each of `count` threads gets."""

    def one(rank: int) -> Tensor:
        hub.enter()
        failed = True
        try:
            found = work(rank)
            failed = False
            return found
        finally:
            hub.leave(failed)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


class Ends(nn.Module):
    """A model without layers."""

    def __init__(self, tied: bool, head=LMHead, bias: bool = True):
        super().__init__()
        self.embed_tokens = Embedding(VOCABULARY, HIDDEN, scale=2.0)
        self.positions = Embedding(VOCABULARY - 1, HIDDEN)  # fewer than there are tokens
        self.lm_head = head(
            HIDDEN, VOCABULARY, tied=self.embed_tokens if tied else None, bias=bias, scale=0.5, softcap=3.0
        )


class OwnHead(LMHead):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(1)


def loaded(tied: bool, place: Place | None, tensors: dict[str, Tensor], head=LMHead) -> tuple[nn.Module, list]:
    with torch.device("meta"):
        model = Ends(tied, head)
    names, notes = tensor_names(model), []
    if place is not None:
        notes = divide_vocabulary(model, place, VOCABULARY)
    load_weights(model, tensors.items(), ARCHITECTURE, CONFIG, torch.float32, CPU, names)
    return model, notes


def values(tied: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(p.shape, generator=generator) for name, p in Ends(tied).named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp_size", [2, 3, 11])
def test_divided_ends_are_the_whole_ones(tied: bool, tp_size: int) -> None:
    tensors = values(tied)
    whole, _ = loaded(tied, None, tensors)
    hub, all_places = places(tp_size)
    models = []
    for place in all_places:
        model, notes = loaded(tied, place, tensors)
        assert {note.path for note in notes} == {"embed_tokens", "lm_head"}
        assert all(note.divided and not note.is_layer for note in notes)
        assert is_head_divided(model)
        models.append(model)
    ids, x = torch.tensor([10, 0, 3, 3, 5, 7]), torch.randn(5, HIDDEN)
    for found in everywhere(hub, tp_size, lambda rank: models[rank].embed_tokens(ids)):
        assert torch.equal(found, whole.embed_tokens(ids))
    for found in everywhere(hub, tp_size, lambda rank: models[rank].lm_head(x)):
        torch.testing.assert_close(found, whole.lm_head(x))
    assert models[0].positions.weight.shape == (VOCABULARY - 1, HIDDEN)
    if not tied:
        assert sum(len(model.embed_tokens.weight) for model in models) == VOCABULARY


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_of_its_own_kind_stays_whole_with_the_table_it_shares(tied: bool) -> None:
    tensors = values(tied)
    model, notes = loaded(tied, places(2)[1][1], tensors, OwnHead)
    told = {note.path: (note.divided, note.how) for note in notes}
    assert told["lm_head"] == (False, "does something of its own")
    assert told["embed_tokens"] == ((False, "lm_head does something of its own") if tied else (True, "6 of 11 tokens"))
    assert not is_head_divided(model)


def test_a_vocabulary_that_is_smaller_than_the_number_of_places_stays_whole() -> None:
    with torch.device("meta"):
        model = Ends(False)
    (note,) = divide_vocabulary(model, places(12)[1][0], VOCABULARY)
    assert (note.divided, note.how) == (False, "has only 11 tokens")


def test_a_table_of_another_size_than_the_configuration_says_is_told_in_the_checkpoints_sizes() -> None:
    tensors = values(False) | {"lm_head.weight": torch.zeros(VOCABULARY + 1, HIDDEN)}
    with pytest.raises(WeightsError, match=r"shape \(12, 8\), the model wants \(11, 8\)"):
        loaded(False, places(2)[1][0], tensors)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
@pytest.mark.parametrize(
    "settings", [{"tensor_parallel_size": 2}, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}]
)
def test_logits_are_gathered_wherever_they_are_needed(name: str, settings: dict, tmp_path: Path) -> None:
    architecture = load_plugins().find([name])
    ModuleReference(architecture).save(tmp_path)
    one = LLM(str(tmp_path), **SETTINGS)
    llm = LLM(str(tmp_path), **SETTINGS, **settings, executor="inproc", max_num_batched_tokens=7, max_num_seqs=2)
    for params in (
        SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=2, prompt_logprobs=1),
        SamplingParams(seed=3, max_tokens=6, ignore_eos=True, n=2),
    ):
        for found, wanted in zip(*(each.generate(PROMPTS, params, use_tqdm=False) for each in (llm, one)), strict=True):
            assert [o.token_ids for o in found.outputs] == [o.token_ids for o in wanted.outputs]
            if params.prompt_logprobs:
                for mine, theirs in zip(found.prompt_logprobs[1:], wanted.prompt_logprobs[1:], strict=True):
                    assert {t: p.logprob for t, p in mine.items()} == pytest.approx(
                        {t: p.logprob for t, p in theirs.items()}, abs=1e-4
                    )
