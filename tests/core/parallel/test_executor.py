"""Places in threads: a failure of one is told and stops all, notes are kept, and settings come from flags."""

import argparse
import threading
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch

from modelport import LLM, SamplingParams
from modelport.cli.flags import add_engine_flags, engine_settings
from modelport.loading import model as loading

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


class Counting(torch.Tensor):
    """Counts what is copied out of it, by thread; every place has one."""

    copied: dict[int, int] = {}

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_:
            Counting.copied[threading.get_ident()] += args[1].numel()
        return super().__torch_function__(function, types, args, kwargs or {})


def test_each_place_copies_its_own_part_of_the_files(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(Counting, "copied", defaultdict(int))

    def counted(*given: object) -> Iterator[tuple[str, torch.Tensor]]:
        stream = open_weights(*given)
        sizes.append(0)
        for name, tensor in stream:
            sizes[-1] += tensor.numel()
            yield name, tensor.as_subclass(Counting)

    open_weights = loading.open_weights
    monkeypatch.setattr(loading, "open_weights", counted)
    LLM(tiny, **SETTINGS, tensor_parallel_size=2, pipeline_parallel_size=2)
    (whole,) = set(sizes)
    hidden, layers = 64, 3
    norms = 2 * layers * hidden + 3 * hidden  # both places of a stage have those of its layers, all have the last one
    assert sum(Counting.copied.values()) == whole + norms
    assert len(Counting.copied) == 4
    assert max(Counting.copied.values()) < whole / 3  # one stage has two layers of three


def test_more_stages_than_blocks_stop_the_start(tiny: str) -> None:
    with pytest.raises(ValueError, match="4 stages cannot be made of 3 blocks; use 3 or fewer"):
        LLM(tiny, **SETTINGS, pipeline_parallel_size=4)


def test_every_setting_of_scaling_has_its_flag() -> None:
    parser = argparse.ArgumentParser()
    add_engine_flags(parser)
    flags = "-tp 2 -pp 3 -dp 4 -ep -n 2 -r 1 --master-addr host --master-port 7 --distributed-executor-backend ray"
    more = "--pipeline-blocks 1 2 1 --worker-timeout 2 --step-timeout 9.5"
    assert engine_settings(parser.parse_args([*flags.split(), *more.split()])) == {
        "model": "smollm2",
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 3,
        "data_parallel_size": 4,
        "enable_expert_parallel": True,
        "nnodes": 2,
        "node_rank": 1,
        "master_addr": "host",
        "master_port": 7,
        "executor": "ray",
        "pipeline_blocks": [1, 2, 1],
        "worker_timeout": 2.0,
        "step_timeout": 9.5,
    }


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
