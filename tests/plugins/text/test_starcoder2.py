"""StarCoder2: every flag, and the published configurations, which do not say that the head is tied."""

import pytest


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"use_bias": False}, id="no-biases"),
        pytest.param({"sliding_window": None, "tie_word_embeddings": False}, id="own-head-no-window"),
    ],
)
def test_variants(checkpoint, flags):
    checkpoint("Starcoder2ForCausalLM", **flags).assert_agrees()


def test_published_config(checkpoint):
    made = checkpoint("Starcoder2ForCausalLM", rope_parameters={"rope_type": "default", "rope_theta": 200.0})
    for key in ("tie_word_embeddings", "rope_parameters"):
        del made.config[key]
    made.config |= {"rope_theta": 200.0, "norm_type": "layer_norm", "mlp_type": "default"}
    made.assert_agrees()
