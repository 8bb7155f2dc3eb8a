"""MiniCPM3: long rotary factors for a long prompt, and for a short one that becomes long."""

import pytest


@pytest.mark.parametrize("original", [24, 52])
def test_long_factors(checkpoint, original):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": original,
        "short_factor": [1.0, 1.1, 1.2, 1.4],
        "long_factor": [1.5, 2.0, 4.0, 9.0],
    }
    checkpoint("MiniCPM3ForCausalLM", rope_parameters=rope).assert_agrees()
