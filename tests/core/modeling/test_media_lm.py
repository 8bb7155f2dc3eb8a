"""A model around a language model: what it hands on, and which parts only media need."""

import torch
from torch import nn

from modelport.config import TextConfig
from modelport.modeling import CausalLM, Linear, MediaLM, RMSNorm


class Block(nn.Module):
    def __init__(self, cfg, index):
        super().__init__()

    def forward(self, x, batch):
        return x + 1


class Seeing(MediaLM):
    def __init__(self, language):
        super().__init__(language)
        self.tower = nn.ModuleList([Linear(3, 4)])
        self.projector = Linear(4, self.hidden_size)


def test_hands_on_and_names_what_only_media_use():
    cfg = TextConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    language = CausalLM(cfg, Block, RMSNorm(8, 1e-6))
    for parameter in language.parameters():
        parameter.data.normal_()
    model = Seeing(language)
    ids = torch.tensor([3, 1, 10])
    assert model.hidden_size == 8 == model.projector.out_features
    assert torch.equal(model.embed(ids), language.embed(ids))
    assert list(model.blocks) == list(language.blocks)
    assert model.lm_head is language.lm_head
    state = torch.randn(3, 8)
    assert torch.equal(model.finish(state), language.finish(state))
    assert model.media_modules == [model.tower, model.projector]
