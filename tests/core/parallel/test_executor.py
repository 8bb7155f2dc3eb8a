"""Places in threads: a failure of one is told and stops all, notes are kept, and settings come from flags."""

import argparse

import pytest

from modelport import LLM, SamplingParams
from modelport.cli.flags import add_engine_flags, engine_settings

SETTINGS = {"dtype": "float32", "max_model_len": 64, "executor": "inproc"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("place", [0, 1])
def test_a_place_that_fails_stops_the_others(tiny: str, tensor: int, pipeline: int, place: int) -> None:
    llm = LLM(tiny, **SETTINGS, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
    model = llm._front.engine.runner._loaded[place].model
    layer = model.model.layers[0 if tensor == 2 or place == 0 else 2]

    def fail(*_: object) -> None:
        raise ArithmeticError("no such layer")

    layer.mlp.down_proj.forward = fail
    with pytest.raises(ArithmeticError, match="no such layer"):
        llm.generate("some text", GREEDY, use_tqdm=False)
    with pytest.raises(RuntimeError, match="another place"):
        llm.generate("some text", GREEDY, use_tqdm=False)


def test_every_stage_tells_what_became_of_its_layers(tiny: str) -> None:
    llm = LLM(tiny, **SETTINGS, tensor_parallel_size=2, pipeline_parallel_size=3)
    told = [str(note) for note in llm._front.engine.runner.describe()]
    layers = [
        (
            f"model.layers.{i}.self_attn: divided, 2 of 4 heads, 1 of 2 key heads",
            f"model.layers.{i}.mlp: divided, 56 of 112 columns",
        )
        for i in range(3)
    ]
    table, head = (f"{name}: divided, 160 of 320 tokens" for name in ("model.embed_tokens", "lm_head"))
    assert told == [*layers[0], table, *layers[1], *layers[2], head]


def test_more_stages_than_blocks_stop_the_start(tiny: str) -> None:
    with pytest.raises(ValueError, match="4 stages cannot be made of 3 blocks; use 3 or fewer"):
        LLM(tiny, **SETTINGS, pipeline_parallel_size=4)


@pytest.mark.parametrize("flags", ["-tp 2 -pp 3", "--tensor-parallel-size 2 --pipeline-parallel-size=3"])
def test_flags_have_vllms_names(flags: str) -> None:
    parser = argparse.ArgumentParser()
    add_engine_flags(parser)
    arguments = parser.parse_args([*flags.split(), "-p", "no:gemma"])
    assert engine_settings(arguments) == {
        "model": "smollm2",
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 3,
        "blocked_plugins": ("gemma",),
    }
