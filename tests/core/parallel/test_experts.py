"""Experts on different places, and stages of chosen sizes, give what one place gives."""

from dataclasses import replace
from pathlib import Path

import pytest

from modelport import LLM, SamplingParams
from modelport.plugin import load_plugins
from modelport.testing.reference import ModuleReference

SETTINGS = {"dtype": "float32", "max_model_len": 64, "skip_tokenizer_init": True}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
PROMPTS = [[5, 6, 7, 8, 9], [11], [3, 4] * 6]


def run(llm: LLM) -> tuple[list[list[int]], list[float]]:
    found = [output.outputs[0] for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]
    likely = [p[t].logprob for one in found for p, t in zip(one.logprobs, one.token_ids, strict=True)]
    return [one.token_ids for one in found], likely


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM", "DeepseekV2ForCausalLM"])
@pytest.mark.parametrize("places", [2, 4])
def test_experts_on_different_places_are_the_same_mixture(name: str, places: int, tmp_path: Path) -> None:
    ModuleReference(load_plugins().find([name])).save(tmp_path)
    wanted, likely = run(LLM(str(tmp_path), **SETTINGS))
    llm = LLM(
        str(tmp_path), **SETTINGS, tensor_parallel_size=places, enable_expert_parallel=True, executor="inproc"
    )  # fmt: skip
    told = [note.how for note in llm._front.engine.runner.describe() if note.path.endswith(".experts")]
    assert told
    assert all(" experts" in how and how.split()[0] < how.split()[2] for how in told), told
    found, theirs = run(llm)
    assert found == wanted
    assert theirs == pytest.approx(likely, abs=1e-4)


def test_experts_are_divided_by_width_when_there_are_fewer_than_places(tmp_path: Path) -> None:
    name = "MixtralForCausalLM"
    architecture = load_plugins().find([name])
    few = {**architecture.tiny, "num_local_experts": 2, "num_experts_per_tok": 1}
    ModuleReference(replace(architecture, tiny=few)).save(tmp_path)
    settings = {**SETTINGS, "enable_expert_parallel": True, "executor": "inproc"}
    llm = LLM(str(tmp_path), **settings, tensor_parallel_size=4)
    assert any("columns of every expert" in note.how for note in llm._front.engine.runner.describe())
    assert run(llm)[0] == run(LLM(str(tmp_path), **SETTINGS))[0]


@pytest.mark.parametrize("counts", [(1, 2), (2, 1), (1, 1, 1)])
def test_stages_have_as_many_blocks_as_is_said(tiny: str, counts: tuple[int, ...]) -> None:
    settings = {**SETTINGS, "pipeline_parallel_size": len(counts), "executor": "inproc", "pipeline_blocks": counts}
    llm = LLM(tiny, **settings)
    layers = [loaded.model.model.layers for loaded in llm._front.engine.runner._loaded]
    assert [sum(type(b).__name__ != "Elsewhere" for b in stage) for stage in layers] == list(counts)
    assert run(llm)[0] == run(LLM(tiny, **SETTINGS))[0]


@pytest.mark.parametrize("counts", [(3,), (1, 1), (0, 3), (1, 1, 1)])
def test_stages_that_do_not_fit_are_refused(tiny: str, counts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"one number for each of 2 stages, none of them 0, and 3 in all"):
        LLM(tiny, **SETTINGS, pipeline_parallel_size=2, executor="inproc", pipeline_blocks=counts)
