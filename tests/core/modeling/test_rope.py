"""Tables and rotations against transformers; where it departs from published checkpoints, against their authors."""

import math

import pytest
import torch
from transformers import PhiConfig, PhimoeConfig
from transformers.models.cohere import modeling_cohere
from transformers.models.glm4 import modeling_glm4
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.gptj import modeling_gptj
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

from modelport.batch import Batch
from modelport.config import RopeParameters, TextConfig
from modelport.kernels.rope import rotate_
from modelport.modeling import Rope
from modelport.modeling.rope import find_by_length

HEAD = 16
SMALL = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 128, "rope_theta": 10000.0,
}  # fmt: skip
WHOLE = {"partial_rotary_factor": 1.0}  # Phi's own default is half a head
SHORT, LONG = [1.0 + i / 10 for i in range(8)], [2.0 + i for i in range(8)]
LONGROPE = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}
PHI3 = {"rope_scaling": LONGROPE, "original_max_position_embeddings": 32}
DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32}


def ours(extra: dict, max_len: int = 128, head_dim: int = HEAD, interleaved: bool = False) -> Rope:
    rope = Rope(head_dim, TextConfig.model_validate(SMALL | extra).rope_parameters, interleaved)
    rope.build_tables(torch.device("cpu"), max_len)
    return rope


def theirs(extra: dict, positions: torch.Tensor) -> torch.Tensor:
    """Cosines and sines as in our tables, of a fresh module: theirs remembers the longest sequence it has seen."""
    module = PhiRotaryEmbedding(PhiConfig(**WHOLE | SMALL | extra))
    cos, sin = module(torch.zeros(1), positions[None])
    half = cos.shape[-1] // 2
    return torch.cat((cos[0, :, :half], sin[0, :, :half]), -1)


def step(rope: Rope, *spans: tuple[int, int, int]) -> tuple[Batch, torch.Tensor]:
    """A batch of sequences (prompt length, computed, known now), each up to its last token; and its angles."""
    return chunk(rope, *((prompt, first, last, last) for prompt, first, last in spans))


def chunk(rope: Rope, *spans: tuple[int, int, int, int]) -> tuple[Batch, torch.Tensor]:
    """As `step`, with rows [first, last) of a sequence that has `known` tokens."""
    positions = torch.cat([torch.arange(first, last) for _, first, last, _ in spans])
    counts = [last - first for _, first, last, _ in spans]
    batch = Batch(
        positions=positions,
        query_starts=torch.tensor([0, *counts]).cumsum(0).int(),
        seq_lens=torch.tensor([last for _, _, last, _ in spans]).int(),
        length_classes=torch.tensor([rope.length_class(p, known) for p, _, _, known in spans]).int(),
        **UNUSED,
    )
    table, rows = rope.angles(batch)
    assert rows.dtype == torch.int64
    return batch, table[rows]


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    """To the last bit of a cosine: vectors and their tails round differently."""
    torch.testing.assert_close(a, b, rtol=0.0, atol=2e-7)


EMPTY = torch.empty(0)
UNUSED = {"pages": (), "state_slots": EMPTY, "max_query_len": 1}

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
TYPES = {
    "default": {},
    "partial": {"partial_rotary_factor": 0.5},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                "original_max_position_embeddings": 64}},
    "llama3 without original": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                                 "high_freq_factor": 4.0}},
    "yarn": {"rope_scaling": YARN},
    "yarn betas": {"rope_scaling": YARN | {"beta_fast": 4, "beta_slow": 2}, "rope_theta": 500.0},
    "yarn factor of lengths": {"rope_scaling": {**YARN, "factor": None}},
    "yarn attention_factor": {"rope_scaling": YARN | {"attention_factor": 0.75}},
    "yarn mscale": {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 1.2}},
    "yarn not truncated": {"rope_scaling": YARN | {"truncate": False}, "rope_theta": 150000.0},
    "yarn partial": {"rope_scaling": YARN, "partial_rotary_factor": 0.5},
    "proportional": {"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "factor": 2.0,
                                         "rope_theta": 500.0}},
    "longrope, short": {"rope_scaling": LONGROPE, "original_max_position_embeddings": 128},
    "longrope, factor": {"rope_scaling": LONGROPE | {"factor": 9.0}, "original_max_position_embeddings": 128},
    "longrope, attention_factor": {"rope_scaling": LONGROPE | {"attention_factor": 1.5, "factor": 9.0}},
}  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
def test_table(name: str) -> None:
    extra = TYPES[name]
    rope = ours(extra)
    assert not rope.by_length
    torch.testing.assert_close(rope.cos_sin, theirs(extra, torch.arange(128)), rtol=1e-5, atol=2e-5)


def test_an_ordinary_step_reads_positions() -> None:
    rope = ours({})
    batch, _ = step(rope, (3, 0, 3), (9, 9, 10))
    assert rope.angles(batch)[1] is batch.positions
    assert rope.angles(batch)[0] is rope.cos_sin
    assert rope.length_class(1000, 2000) == 0


def test_equal_layers_share_a_table_that_dies_with_them() -> None:
    from modelport.modeling import rope as module

    first, second = ours({"rope_theta": 77.0}), ours({"rope_theta": 77.0})
    assert first.cos_sin is second.cos_sin
    before = len(module._tables)
    del first, second
    assert len(module._tables) == before - 1


def test_yarn_magnitude_of_one_setting_is_deepseeks() -> None:
    """DeepSeek divides by 1 when `mscale_all_dim` is 0 or missing; transformers then forgets `mscale`."""
    table = ours({"rope_scaling": YARN | {"mscale": 0.5, "mscale_all_dim": 0}}).cos_sin
    assert table[0, 0].item() == pytest.approx(1 + 0.05 * math.log(4))


# ---- length classes


@pytest.mark.parametrize("known", [1, 31, 32, 33, 128])
def test_longrope_by_length(known: int) -> None:
    rope = ours(PHI3)
    assert rope.length_class(known, known) == (known > 32)
    torch.testing.assert_close(
        step(rope, (known, 0, known))[1], theirs(PHI3, torch.arange(known)), rtol=1e-5, atol=2e-5
    )


def test_longrope_of_a_growing_sequence_changes_once() -> None:
    rope = ours(PHI3)
    assert [rope.length_class(30, known) for known in (30, 31, 32, 33, 34)] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("extra", [PHI3, DYNAMIC], ids=["longrope", "dynamic"])
def test_sequences_do_not_see_each_other(extra: dict) -> None:
    """Long and short ones, prompts and single tokens in one step; and a prompt in chunks is the prompt."""
    rope = ours(extra)
    spans = [(40, 0, 40), (10, 0, 10), (20, 20, 21), (100, 0, 100), (50, 60, 61)]
    together = step(rope, *spans)[1]
    alone = torch.cat([step(rope, span)[1] for span in spans])
    same(together, alone)
    whole = step(rope, (100, 0, 100))[1]
    parts = [chunk(rope, (100, a, b, 100), (5, 0, 5, 5))[1][: b - a] for a, b in ((0, 30), (30, 40), (40, 100))]
    same(torch.cat(parts), whole)


@pytest.mark.parametrize("prompt", [20, 32, 33, 60])
def test_dynamic_is_what_generation_computes(prompt: int) -> None:
    """A module that lives through one generation: the prompt, then one token after the other with cached keys."""
    rope, module = ours(DYNAMIC), PhiRotaryEmbedding(PhiConfig(**WHOLE | SMALL | DYNAMIC))
    for first, last in ((0, prompt), *((n, n + 1) for n in range(prompt, prompt + 20))):
        cos, sin = module(torch.zeros(1), torch.arange(first, last)[None])
        want = torch.cat((cos[0, :, : HEAD // 2], sin[0, :, : HEAD // 2]), -1)
        torch.testing.assert_close(step(rope, (prompt, first, last))[1], want, rtol=1e-5, atol=5e-5)


def test_dynamic_computed_again_is_the_same() -> None:
    rope = ours(DYNAMIC)
    once = torch.cat([step(rope, (40, 0, 40))[1], *(step(rope, (40, n, n + 1))[1] for n in range(40, 60))])
    same(step(rope, (40, 0, 60))[1], once)


def test_a_step_is_computed_once_for_all_layers() -> None:
    first, second = ours(DYNAMIC), ours(DYNAMIC)
    batch, _ = step(first, (40, 0, 40))
    assert second.angles(batch)[0] is first.angles(batch)[0]
    other, _ = step(first, (41, 0, 41))
    assert second.angles(other)[0] is not second.angles(batch)[0]


def test_short_engines_and_equal_factors_need_no_classes() -> None:
    assert not ours(PHI3, max_len=32).by_length
    assert not ours(DYNAMIC, max_len=32).by_length
    assert not ours({**PHI3, "rope_scaling": LONGROPE | {"long_factor": SHORT}}).by_length
    assert ours(PHI3, max_len=33).by_length
    assert ours(DYNAMIC, max_len=33).by_length


def test_phimoe_magnitudes_and_long_factors() -> None:
    """transformers switches PhiMoE's magnitude but computes short frequencies always; its authors switch both."""
    scaling = LONGROPE | {"short_mscale": 1.25, "long_mscale": 1.5, "original_max_position_embeddings": 32}
    rope = ours({"rope_scaling": scaling})
    module = PhimoeRotaryEmbedding(PhimoeConfig(**SMALL, rope_parameters={**scaling, "rope_theta": 10000.0,
                                                                          "rope_type": "longrope"}))  # fmt: skip
    mended = module.rope_init_fn
    for known in (20, 40):
        module.rope_init_fn = lambda config, known=known: mended(config, seq_len=known)
        cos, sin = module(torch.zeros(1), torch.arange(known)[None])
        want = torch.cat((cos[0, :, : HEAD // 2], sin[0, :, : HEAD // 2]), -1)
        torch.testing.assert_close(step(rope, (known, 0, known))[1], want, rtol=1e-5, atol=2e-5)


def test_one_rule_for_a_model() -> None:
    ropes = torch.nn.ModuleList([ours({}), ours(PHI3), ours(PHI3)])
    assert find_by_length(ropes) is ropes[1]
    assert find_by_length(torch.nn.ModuleList([ours({})])) is None
    with pytest.raises(ValueError, match="different lengths"):
        find_by_length(torch.nn.ModuleList([ours(PHI3), ours(DYNAMIC)]))


# ---- rotations


def rotated(rope: Rope, x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    rotate_(x, torch.arange(len(x)), rope.cos_sin, rope.interleaved)
    return x


def table(cos_sin: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, tokens, rotary_dim) cosines and sines, each twice."""
    cos, sin = cos_sin.chunk(2, -1)
    if interleaved:
        return cos.repeat_interleave(2, -1)[None], sin.repeat_interleave(2, -1)[None]
    return torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None]


@pytest.mark.parametrize("family", ["gptj", "gpt_neox", "cohere", "glm4"])
def test_pairs_and_partial_heads(family: str) -> None:
    x = torch.randn(12, 4, HEAD)
    heads = x.transpose(0, 1)[None]  # (1, heads, tokens, head_dim)
    if family == "gptj":  # the configuration counts dimensions, the head is wider
        rope = ours({}, head_dim=8, interleaved=True)
        sincos = modeling_gptj.create_sinusoidal_positions(12, 8)
        sin, cos = sincos[None].chunk(2, -1)
        part = modeling_gptj.apply_rotary_pos_emb(x[None, ..., :8], sin, cos)[0]
        want = torch.cat((part, x[..., 8:]), -1)
    elif family == "gpt_neox":
        rope = ours({"partial_rotary_factor": 0.25})
        want = modeling_gpt_neox.apply_rotary_pos_emb(heads, heads, *table(rope.cos_sin[:12], False))[0][0].transpose(
            0, 1
        )
    elif family == "cohere":
        rope = ours({}, interleaved=True)
        want = modeling_cohere.apply_rotary_pos_emb(heads, heads, *table(rope.cos_sin[:12], True))[0][0].transpose(0, 1)
    else:
        rope = ours({"partial_rotary_factor": 0.5}, interleaved=True)
        want = modeling_glm4.apply_rotary_pos_emb(heads, heads, *table(rope.cos_sin[:12], False))[0][0].transpose(0, 1)
    torch.testing.assert_close(rotated(rope, x), want, rtol=1e-5, atol=1e-5)


# ---- refusals


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (RopeParameters(rope_type="spiral"), "spiral.*known types.*yarn"),
        (RopeParameters(rope_type="linear"), "linear.*needs factor"),
        (RopeParameters(rope_type="longrope", original_max_position_embeddings=8, factor=2.0), "needs short_factor"),
        (RopeParameters(rope_type="longrope", original_max_position_embeddings=8, factor=2.0, short_factor=(1.0,),
                        long_factor=(1.0,)), "short_factor.*1 numbers.*8"),
        (RopeParameters(partial_rotary_factor=0.3125), "head_dim=16.*rotate 5"),
    ],
)  # fmt: skip
def test_refusals(parameters: RopeParameters, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rope(HEAD, parameters)
