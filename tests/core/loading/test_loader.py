"""Filling a model: parts, ties, order, and every way in which a checkpoint can be wrong, refused by name."""

import pytest
import torch
from torch import nn

from modelport.config import TextConfig
from modelport.loading.loader import WeightsError, fill_random, load_weights
from modelport.modeling import Embedding, LMHead, MergedLinear, QKVLinear, RMSNorm
from modelport.plugin import Architecture

CPU = torch.device("cpu")
CONFIG = TextConfig(vocab_size=10, hidden_size=4, num_hidden_layers=1, num_attention_heads=2)


class Toy(nn.Module):
    def __init__(self, tied: bool = True):
        super().__init__()
        self.embed = Embedding(10, 4)
        self.attn = nn.Module()
        self.attn.qkv_proj = QKVLinear(4, 2, 1, 2, bias=True)
        self.mlp = nn.Module()
        self.mlp.gate_up_proj = MergedLinear(4, (3, 3), ("gate_proj", "up_proj"))
        self.norm = RMSNorm(4)
        self.lm_head = LMHead(4, 10, tied=self.embed if tied else None)


def architecture(**fields) -> Architecture:
    return Architecture("ToyForCausalLM", Toy, TextConfig, **fields)


def checkpoint() -> dict[str, torch.Tensor]:
    shapes = {
        "embed.weight": (10, 4),
        "attn.q_proj.weight": (4, 4),
        "attn.k_proj.weight": (2, 4),
        "attn.v_proj.weight": (2, 4),
        "attn.q_proj.bias": (4,),
        "attn.k_proj.bias": (2,),
        "attn.v_proj.bias": (2,),
        "mlp.gate_proj.weight": (3, 4),
        "mlp.up_proj.weight": (3, 4),
        "norm.weight": (4,),
    }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def load(tensors: dict[str, torch.Tensor], tied: bool = True, **fields) -> Toy:
    with torch.device("meta"):
        model = Toy(tied)
    load_weights(model, tensors.items(), architecture(**fields), CONFIG, torch.float32, CPU)
    return model


def check(model: Toy, tensors: dict[str, torch.Tensor]) -> None:
    x = torch.randn(5, 4)
    q, k, v = model.attn.qkv_proj(x)
    for got, name in ((q, "q_proj"), (k, "k_proj"), (v, "v_proj")):
        want = nn.functional.linear(x, tensors[f"attn.{name}.weight"], tensors[f"attn.{name}.bias"])
        torch.testing.assert_close(got.flatten(1), want)
    want = torch.cat([nn.functional.linear(x, tensors[f"mlp.{name}.weight"]) for name in ("gate_proj", "up_proj")], 1)
    torch.testing.assert_close(model.mlp.gate_up_proj(x), want)
    torch.testing.assert_close(model.lm_head(x), nn.functional.linear(x, tensors["embed.weight"]))


@pytest.mark.parametrize("order", ["as is", "reversed"])
def test_parts_are_filled_in_any_order(order):
    tensors = checkpoint()
    items = dict(reversed(tensors.items())) if order == "reversed" else tensors
    check(load(items), tensors)


def test_a_fused_tensor_is_taken_under_the_layers_own_name():
    tensors = checkpoint()
    fused = {n: t for n, t in tensors.items() if not n.startswith("attn.")}
    for kind in ("weight", "bias"):
        fused[f"attn.qkv_proj.{kind}"] = torch.cat([tensors[f"attn.{p}_proj.{kind}"] for p in "qkv"])
    check(load(fused), tensors)


def test_a_second_copy_of_a_tied_weight_is_no_surplus():
    tensors = checkpoint()
    check(load({**tensors, "lm_head.weight": tensors["embed.weight"]}), tensors)


def test_rename_ignore_and_stream():
    tensors = checkpoint()

    def doubled_back(stream, config):
        for name, tensor in stream:
            yield name, tensor / 2

    published = {f"model.{name}": tensor * 2 for name, tensor in tensors.items()}
    published["model.attn.rotary.inv_freq"] = torch.ones(2)
    model = load(published, rename={"model.": ""}, ignore=("*.inv_freq",), weights=doubled_back)
    check(model, tensors)


@pytest.mark.parametrize("gone", ["attn.k_proj.weight", "norm.weight", "mlp.up_proj.weight", "attn.q_proj.bias"])
def test_a_missing_tensor_is_named(gone):
    tensors = checkpoint()
    del tensors[gone]
    with pytest.raises(WeightsError, match=rf"ToyForCausalLM; missing: '{gone}'\."):
        load(tensors)


def test_an_untied_head_is_missed():
    with pytest.raises(WeightsError, match=r"missing: 'lm_head\.weight'"):
        load(checkpoint(), tied=False)


def test_a_surplus_tensor_is_named():
    with pytest.raises(WeightsError, match=r"not known to the model: 'extra\.weight'"):
        load({**checkpoint(), "extra.weight": torch.ones(1)})


def test_a_wrong_shape_names_both():
    with pytest.raises(WeightsError, match=r"'attn\.k_proj\.weight' has shape \(3, 4\), the model wants \(2, 4\)"):
        load({**checkpoint(), "attn.k_proj.weight": torch.ones(3, 4)})


def test_rows_are_filled_once():
    tensors = checkpoint()
    twice = [*tensors.items(), ("attn.qkv_proj.weight", torch.ones(8, 4))]
    with torch.device("meta"):
        model = Toy()
    with pytest.raises(WeightsError, match=r"already filled"):
        load_weights(model, twice, architecture(), CONFIG, torch.float32, CPU)
    with torch.device("meta"):
        model = Toy()
    with pytest.raises(WeightsError, match=r"'norm\.weight' twice"):
        load_weights(
            model, [*tensors.items(), ("norm.weight", torch.ones(4))], architecture(), CONFIG, torch.float32, CPU
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad):
    tensors = checkpoint()
    tensors["mlp.gate_proj.weight"][1, 2] = bad
    with pytest.raises(WeightsError, match=r"'mlp\.gate_proj\.weight' holds 1 values that are NaN or infinite"):
        load(tensors)


def test_overflow_of_the_chosen_type_is_refused():
    tensors = checkpoint()
    tensors["norm.weight"][0] = 1e30
    with torch.device("meta"):
        model = Toy()
    with pytest.raises(WeightsError, match=r"'norm\.weight' holds 1 values .* torch\.float16"):
        load_weights(model, tensors.items(), architecture(), CONFIG, torch.float16, CPU)


def test_dummy_weights_fill_everything():
    with torch.device("meta"):
        model = Toy(tied=False)
    fill_random(model, torch.float32, CPU, seed=0)
    assert not any(p.is_meta for p in model.parameters())
    assert model.lm_head(torch.ones(1, 4)).isfinite().all()
