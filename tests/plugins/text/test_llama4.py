"""Llama 4: layouts and settings as they are published, and a cache that holds a chunk."""

from modelport.plugins.text.llama4 import Llama4Config


def test_experts_one_by_one(checkpoint):
    """As tools write them that quantise every linear by itself."""
    made = checkpoint("Llama4ForCausalLM", num_experts_per_tok=2)
    for name in [name for name in made.tensors if ".experts." in name]:
        path, kind = name.rsplit(".", 1)
        for expert, matrix in enumerate(made.tensors.pop(name).transpose(1, 2)):
            halves = matrix.chunk(2) if kind == "gate_up_proj" else (matrix,)
            parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            for part, half in zip(parts, halves, strict=True):
                made.tensors[f"{path}.{expert}.{part}.weight"] = half.clone()
    made.assert_agrees()


def test_first_configurations(checkpoint):
    """Temperature tuning as a number, an empty list of layers, and the settings of today's transformers left out."""
    made = checkpoint("Llama4ForCausalLM")
    made.config |= {"attn_temperature_tuning": 4, "no_rope_layers": [], "rope_scaling": None, "rope_theta": 500000.0}
    for key in ("layer_types", "moe_layers", "rope_parameters", "no_rope_layer_interval"):
        made.config.pop(key, None)
    made.assert_agrees()


def test_layers_of_the_published_models():
    shape = {"vocab_size": 8, "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40}
    scout = Llama4Config.model_validate({**shape, "interleave_moe_layer_step": 1})
    maverick = Llama4Config.model_validate({**shape, "interleave_moe_layer_step": 2})
    assert [i for i in range(48) if not scout.turns(i)] == [i for i in range(48) if not scout.is_chunked(i)]
    assert [i for i in range(8) if not scout.turns(i)] == [3, 7]
    assert [all(map(scout.is_sparse, range(48))), [i for i in range(6) if maverick.is_sparse(i)]] == [True, [1, 3, 5]]


def test_layers_with_chunks_keep_a_chunk(checkpoint):
    """Layers that see everything hold all blocks of a sequence, the others no more than their chunk and a step need."""
    made = checkpoint("Llama4ForCausalLM", attention_chunk_size=16)
    engine = made.engine()._front.engine
    all_, chunked = sorted(engine.cache.groups, key=lambda group: group.window)
    assert (all_.window, chunked.window) == (0, 16)
    assert chunked.pool.num_blocks < all_.pool.num_blocks
