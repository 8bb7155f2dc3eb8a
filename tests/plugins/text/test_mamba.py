"""State-space families: flags of published checkpoints, spellings of their configurations, what stays float32."""

import pytest
import torch

from modelport import LLM
from modelport.plugins.text.mamba2 import Mamba2Config


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("MambaForCausalLM", {"time_step_rank": 3, "expand": 1, "conv_kernel": 2, "state_size": 16}),
        ("MambaForCausalLM", {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False}),
        ("FalconMambaForCausalLM", {"mixer_rms_eps": 0.5, "tie_word_embeddings": False, "residual_in_fp32": False}),
        ("Mamba2ForCausalLM", {"n_groups": 1, "tie_word_embeddings": True, "layer_norm_epsilon": 0.01}),
        ("Mamba2ForCausalLM", {"use_bias": True, "use_conv_bias": False, "time_step_limit": [0.4, 0.8]}),
        ("JambaForCausalLM", {"num_experts": 1, "attn_layer_period": 2, "mamba_proj_bias": True}),
        ("JambaForCausalLM", {"expert_layer_period": 3, "expert_layer_offset": 2, "num_experts_per_tok": 3}),
        ("JambaForCausalLM", {"mamba_expand": 1, "mamba_dt_rank": 5, "mamba_conv_bias": False, "mamba_d_conv": 3}),
    ],
    ids=str,
)
def test_flags(checkpoint, name, flags):
    checkpoint(name, **flags).assert_agrees()


def test_falcon_means_its_intermediate_size(checkpoint):
    """The 7B checkpoint says `expand: 16` beside an intermediate_size of twice its hidden_size, which it has."""
    case = checkpoint("FalconMambaForCausalLM", expand=3)
    case.config |= {"expand": 16, "intermediate_size": 3 * case.config["hidden_size"]}
    case.assert_agrees()


@pytest.mark.parametrize("name", ["MambaForCausalLM", "Mamba2ForCausalLM"])
def test_embeddings_by_their_first_name(checkpoint, name):
    case = checkpoint(name)
    case.tensors["backbone.embedding.weight"] = case.tensors.pop("backbone.embeddings.weight")
    case.assert_agrees()


@pytest.mark.parametrize("infinity", [float("inf"), {"__float__": "Infinity"}])
def test_spellings_of_infinity(infinity):
    given = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "time_step_limit": [0.0, infinity]}
    assert Mamba2Config.model_validate(given).time_step_limit == (0.0, float("inf"))


def test_another_activation_is_refused(checkpoint):
    case = checkpoint("MambaForCausalLM")
    case.config["hidden_act"] = "gelu"
    with pytest.raises(ValueError, match="hidden_act"):
        case.engine()


@pytest.mark.parametrize("name", ["MambaForCausalLM", "Mamba2ForCausalLM"])
def test_rates_and_residuals_stay_float32(checkpoint, name):
    """A rate of decay rounded to eight bits remembers for another time than the one that was trained."""
    case = checkpoint(name)
    case.engine()  # writes the files
    llm = LLM(str(case.folder), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=64)
    model = llm._front.engine.runner.model
    mixer = model.backbone.layers[0].mixer
    stored = case.tensors["backbone.layers.0.mixer.A_log"]
    assert mixer.in_proj.packed.dtype == torch.bfloat16
    assert torch.equal(mixer.rates, -stored.exp().t())
    assert torch.equal(mixer.D, case.tensors["backbone.layers.0.mixer.D"])
    assert mixer.state.dtype == model.embed(torch.tensor([1])).dtype == torch.float32
    assert model.finish(torch.zeros(1, 64)).dtype == torch.bfloat16
