"""Cache blocks and state rows for models of every kind of memory."""

import pytest
import torch
from torch import nn

from modelport.config import EngineConfig
from modelport.engine.memory import Limits, attach_memory
from modelport.modeling import CacheSpec, StateSpec


class Layer(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.cache_spec, self.given = spec, ()

    def attach(self, *given):
        self.given = given


def memory(specs, length=1024, rows=8, chunk=32, **settings):
    model = nn.ModuleList(Layer(s) for s in specs)
    engine = EngineConfig(model="m", **settings)
    found = attach_memory(model, engine, torch.bfloat16, torch.device("cpu"), Limits(length, rows, chunk))
    return found, [layer.given for layer in model]


def test_layers_that_forget_alike_share_a_group():
    full, wide, narrow = CacheSpec(2, 16), CacheSpec(1, 8), CacheSpec(2, 16, window=64)
    found, given = memory([full, narrow, wide, narrow])
    assert [group.window for group in found.groups] == [0, 64]
    assert [entry[2] for entry in given] == [0, 1, 0, 1]
    assert given[0][0].shape == (8 * 64, 2, 16, 16)
    assert given[2][1].shape == (8 * 64, 1, 16, 8)


def test_a_window_costs_its_window():
    found, given = memory([CacheSpec(2, 16, window=64)], length=1 << 20)
    assert found.max_model_len == 1 << 20
    assert given[0][0].shape[0] == 8 * ((64 + 32) // 16 + 2)


def test_latent_attention_keeps_no_values():
    _, given = memory([CacheSpec(1, 40, v_head_dim=0)])
    assert given[0][0].shape == (8 * 64, 1, 16, 40)
    assert given[0][1] is None


def test_the_budget_is_kept_and_windows_leave_their_rest_to_the_others():
    block = 2 * 2 * 16 * 16 * 2  # bytes of both tensors, one layer
    found, _ = memory([CacheSpec(2, 16), CacheSpec(2, 16, window=16)], kv_cache_memory_bytes=100 * block)
    counts = [group.pool.num_blocks for group in found.groups]
    assert counts == [100 - 8 * 5, 8 * 5]
    assert found.max_model_len == 60 * 16


def test_a_length_that_does_not_fit_is_refused_when_it_was_asked_for():
    with pytest.raises(ValueError, match=r"max_model_len=1024 .* room for 64; lower max_model_len"):
        memory([CacheSpec(2, 16)], max_model_len=1024, num_kv_blocks=4)


def test_states_have_a_row_for_each_sequence_and_take_at_most_half():
    spec = StateSpec(((4, 3), (4, 16)), (None, torch.float32))
    row = 4 * 3 * 2 + 4 * 16 * 4
    found, given = memory([spec, spec])
    assert [t.shape for t in given[0]] == [(8, 4, 3), (8, 4, 16)]
    assert [t.dtype for t in given[0]] == [torch.bfloat16, torch.float32]
    assert not found.shareable
    assert memory([spec], kv_cache_memory_bytes=8 * row)[0].num_rows == 4
    assert memory([spec], kv_cache_memory_bytes=8 * row, max_num_seqs=8)[0].num_rows == 8
