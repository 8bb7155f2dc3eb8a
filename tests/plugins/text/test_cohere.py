"""Cohere: configurations of transformers 4, which count layers instead of naming their types."""

import pytest


@pytest.mark.parametrize("name", ["CohereForCausalLM", "Cohere2ForCausalLM"])
@pytest.mark.parametrize("theta", [None, 700.0])
def test_rotary_base(checkpoint, name, theta):
    made = checkpoint(name, **({} if theta is None else {"rope_theta": theta}))
    del made.config["rope_parameters"]
    if theta is not None:
        made.config["rope_theta"] = theta
    made.assert_agrees()


@pytest.mark.parametrize("pattern", [None, 2])
def test_layers_by_count(checkpoint, pattern):
    written = {} if pattern is None else {"sliding_window_pattern": pattern}
    made = checkpoint("Cohere2ForCausalLM", **written)
    del made.config["layer_types"]
    made.config.pop("sliding_window_pattern", None)
    made.config |= written | {"layer_switch": 4, "order_of_interleaved_layers": "local_attn_first"}
    made.assert_agrees()
