"""Spellings of rotary settings, as published configurations have them."""

import pytest
from pydantic import ValidationError

from modelport.config import RopeParameters, TextConfig

BASE = {"vocab_size": 8, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


class Neox(TextConfig):
    aliases = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}
    rope_parameters: RopeParameters = RopeParameters(partial_rotary_factor=0.25)


class TwoKinds(TextConfig):
    rope_by_layer_type: dict[str, RopeParameters] = {
        "full_attention": RopeParameters(rope_theta=1e6),
        "sliding_attention": RopeParameters(rope_theta=1e4),
    }


def rope(kind: type[TextConfig] = TextConfig, **data: object) -> RopeParameters:
    return kind.model_validate(BASE | data).rope_parameters


def test_both_spellings_are_one() -> None:
    old = rope(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    assert old == rope(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    assert (old.rope_type, old.factor, old.rope_theta) == ("linear", 2.0, 5e5)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"type": "su"}, "longrope"),
        ({"rope_type": "longrope", "type": "su"}, "longrope"),
        ({"type": "mrope", "mrope_section": [4, 2, 2]}, "default"),
        ({"type": "default", "rope_type": None}, "default"),
        (None, "default"),
        ({}, "default"),
    ],
)
def test_types(given: dict | None, kind: str) -> None:
    assert rope(rope_scaling=given).rope_type == kind


def test_lengths() -> None:
    """The original length may stand inside, outside (that one counts), or nowhere; others keep none."""
    assert rope(rope_scaling={"type": "yarn"}, max_position_embeddings=64).original_max_position_embeddings == 64
    inside = {"type": "longrope", "original_max_position_embeddings": 16}
    assert rope(rope_scaling=inside).original_max_position_embeddings == 16
    assert rope(rope_scaling=inside, original_max_position_embeddings=32).original_max_position_embeddings == 32
    assert rope(original_max_position_embeddings=32).original_max_position_embeddings is None
    assert rope(max_position_embeddings=64).max_position_embeddings == 64
    assert rope().max_position_embeddings == 2048


def test_a_family_knows_its_original_length() -> None:
    class Family(TextConfig):
        rope_parameters: RopeParameters = RopeParameters(rope_type="yarn", factor=4, original_max_position_embeddings=8)

    found = Family(**BASE, max_position_embeddings=64).rope_parameters
    assert (found.rope_type, found.factor, found.original_max_position_embeddings) == ("yarn", 4, 8)


def test_nulls_mean_defaults() -> None:
    found = rope(rope_theta=None, rope_scaling={"type": "yarn", "factor": 4, "mscale": None, "beta_fast": None})
    assert found.rope_theta == 10000.0
    assert found.mscale == 1.0
    assert found.beta_fast == 32.0


def test_a_familys_defaults_and_names() -> None:
    assert rope(Neox).partial_rotary_factor == 0.25
    old = rope(Neox, rotary_pct=0.5, rotary_emb_base=500)
    assert (old.partial_rotary_factor, old.rope_theta) == (0.5, 500.0)
    new = rope(Neox, rope_parameters={"rope_type": "default", "rope_theta": 500, "partial_rotary_factor": 1.0})
    assert (new.partial_rotary_factor, new.rope_theta) == (1.0, 500.0)


def test_layer_types_of_today() -> None:
    given = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }
    cfg = TextConfig.model_validate(BASE | {"rope_parameters": given})
    assert cfg.rope("full_attention").factor == 8.0
    assert cfg.rope("sliding_attention").rope_type == "default"
    assert cfg.rope("sliding_attention").rope_theta == 10000.0
    assert cfg.rope_parameters == cfg.rope("full_attention")
    with pytest.raises(ValueError, match=r"'chunked'.*sliding_attention"):
        cfg.rope("chunked")


@pytest.mark.parametrize("kind", [TextConfig, TwoKinds])
def test_layer_types_of_yesterday(kind: type[TextConfig]) -> None:
    given = {"rope_theta": 2e6, "rope_local_base_freq": 500, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    cfg = kind.model_validate(BASE | given)
    assert (cfg.rope("full_attention").rope_theta, cfg.rope("full_attention").factor) == (2e6, 8.0)
    assert (cfg.rope("sliding_attention").rope_theta, cfg.rope("sliding_attention").rope_type) == (500.0, "default")


def test_layer_types_that_a_configuration_leaves_out() -> None:
    cfg = TwoKinds.model_validate(BASE | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    assert (cfg.rope("full_attention").rope_theta, cfg.rope("full_attention").rope_type) == (1e6, "linear")
    assert (cfg.rope("sliding_attention").rope_theta, cfg.rope("sliding_attention").rope_type) == (1e4, "default")


def test_one_rope_for_every_layer_type() -> None:
    cfg = TextConfig.model_validate(BASE)
    assert cfg.rope("sliding_attention") is cfg.rope_parameters


def test_what_is_no_rope_is_refused() -> None:
    with pytest.raises(ValidationError, match="rope_parameters"):
        rope(rope_parameters="linear")
