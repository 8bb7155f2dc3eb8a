"""Nemotron: every flag, and how published configurations name the rotated part of a head."""

import pytest


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"attention_bias": True, "mlp_bias": True}, id="biases"),
        pytest.param({"head_dim": None, "num_key_value_heads": 4, "tie_word_embeddings": True}, id="tied"),
    ],
)
def test_variants(checkpoint, flags):
    checkpoint("NemotronForCausalLM", **flags).assert_agrees()


@pytest.mark.parametrize(
    ("written", "rotated"),
    [
        ({}, 0.5),
        ({"partial_rotary_factor": 0.25}, 0.25),
        ({"rope_percent": 0.25}, 0.25),
        ({"rope_percentage": 0.25}, 0.25),
    ],
)
def test_rotated_part(checkpoint, written, rotated):
    made = checkpoint("NemotronForCausalLM", head_dim=16, partial_rotary_factor=rotated)
    made.config = {k: v for k, v in made.config.items() if k not in ("rope_parameters", "partial_rotary_factor")}
    made.config |= {"rope_theta": 10000.0, **written}
    made.assert_agrees()
