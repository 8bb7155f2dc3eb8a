"""Dividing layers: who gets which heads, what stays whole, what of a checkpoint is read, and that sums are right."""

import threading

import pytest
import torch
from torch import Tensor, nn

from modelport.config import TextConfig
from modelport.loading.loader import WeightsError, load_weights, tensor_names
from modelport.modeling import (
    ClipVision,
    ClipVisionConfig,
    MergedLinear,
    QKVLinear,
    RMSNorm,
    RowLinear,
)
from modelport.modeling.attention import Attention
from modelport.modeling.cut import Cut, Piece
from modelport.modeling.mlp import MLP, GatedMLP
from modelport.parallel.groups import Place, ThreadHub
from modelport.parallel.tensor import divide_layers, share, share_heads
from modelport.plugin import Architecture
from modelport.plugins.multimodal.pixtral_tower import PixtralVision, PixtralVisionConfig
from modelport.plugins.multimodal.qwen_tower import Qwen2VisionConfig, Qwen2VisionTower

CONFIG = TextConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
CPU = torch.device("cpu")


def places(tp_size: int) -> tuple[ThreadHub, list[Place]]:
    hub = ThreadHub()
    return hub, [Place.of(rank, tp_size, 1, hub.links(rank)) for rank in range(tp_size)]


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 5])
def test_parts_differ_by_one_at_most_and_lack_nothing(tp_size: int) -> None:
    pieces = [share(13, place) for place in places(tp_size)[1]]
    assert [i for p in pieces for i in range(p.start, p.start + p.size)] == list(range(13))
    assert max(p.size for p in pieces) - min(p.size for p in pieces) <= 1


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp_size"),
    [(4, 2, 2), (5, 5, 2), (8, 2, 4), (7, 1, 3), (40, 40, 3), (64, 8, 16), (6, 3, 2), (2, 2, 1)],
)
def test_every_query_head_lies_once_beside_its_key_head(heads: int, kv_heads: int, tp_size: int) -> None:
    found = []
    for place in places(tp_size)[1]:
        q, k = share_heads(heads, kv_heads, place)
        for head in range(q.start, q.start + q.size):
            found.append(head)
            local_kv = (head - q.start) // (q.size // k.size)  # as attention kernels pair them
            assert k.start + local_kv == head // (heads // kv_heads)
        assert q.size % k.size == 0
        assert q.size
    assert found == list(range(heads))


@pytest.mark.parametrize(("heads", "kv_heads", "tp_size"), [(4, 2, 3), (4, 2, 8), (1, 1, 2), (12, 4, 6)])
def test_heads_that_cannot_be_divided_are_refused_with_the_cure(heads: int, kv_heads: int, tp_size: int) -> None:
    message = f"num_attention_heads={heads} and num_key_value_heads={kv_heads} .*tensor_parallel_size={tp_size}.*use "
    with pytest.raises(ValueError, match=message) as error:
        share_heads(heads, kv_heads, places(tp_size)[1][0])
    for size in map(int, str(error.value).rpartition("use ")[2].split(" or ")):
        share_heads(heads, kv_heads, places(size)[1][0])


class Block(nn.Module):
    def __init__(self, norm: int | tuple[int, int] = 4):
        super().__init__()
        self.attn = nn.Module()
        self.attn.qkv_proj = QKVLinear(8, 4, 2, 4, bias=True)
        self.attn.q_norm = RMSNorm(norm)
        self.attn.attn = Attention(4, 2, 4)
        self.attn.o_proj = RowLinear(16, 8, bias=True)
        self.mlp = GatedMLP(8, 7, "silu", bias=True)


def empty(make) -> nn.Module:
    with torch.device("meta"):
        return make()


def values(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def everywhere(hub: ThreadHub, count: int, work) -> list:
    found = [None] * count

    def one(rank: int) -> None:
        hub.enter()
        failed = True
        try:
            found[rank] = work(rank)
            failed = False
        finally:
            hub.leave(failed)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return found


@pytest.mark.parametrize("tp_size", [2, 3])
@pytest.mark.parametrize("make", [lambda: GatedMLP(8, 7, "silu", bias=True), lambda: MLP(8, 7, "gelu", bias=True)])
def test_a_divided_pair_is_the_whole_one(make, tp_size: int) -> None:
    tensors = values(empty(make))
    architecture = Architecture("ToyForCausalLM", nn.Module, TextConfig)
    whole = empty(make)
    load_weights(whole, tensors.items(), architecture, CONFIG, torch.float32, CPU)
    hub, all_places = places(tp_size)
    models = []
    for place in all_places:
        model = empty(lambda: nn.ModuleDict({"mlp": make()}))
        names = tensor_names(model)
        (note,) = divide_layers(model, place)
        assert note.divided, note
        stream = ((f"mlp.{name}", tensor) for name, tensor in tensors.items())
        load_weights(model, stream, architecture, CONFIG, torch.float32, CPU, names)
        models.append(model["mlp"])
    x, residual = torch.randn(5, 8), torch.randn(5, 8)
    for found in everywhere(hub, tp_size, lambda rank: models[rank](x, residual)):
        torch.testing.assert_close(found, whole(x, residual))


def test_a_place_keeps_its_part_alone() -> None:
    _, (first, second) = places(2)
    for place, wide in ((first, 3), (second, 4)):
        model = empty(Block)
        notes = {note.path: note for note in divide_layers(model, place)}
        assert notes["attn"].how == "2 of 4 heads, 1 of 2 key heads"
        assert notes["mlp"].how == f"{wide} of 7 columns"
        assert model.attn.qkv_proj.weight.shape == (16, 8)
        assert model.attn.o_proj.weight.shape == (8, 8)
        assert model.attn.attn.cache_spec.num_kv_heads == 1
        assert model.mlp.gate_up_proj.weight.shape == (2 * wide, 8)
        assert (model.mlp.down_proj.bias is None) == (place is second)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda block: setattr(block.attn, "q_norm", RMSNorm(16)), "over all heads"),
        (lambda block: setattr(block.attn, "extra", nn.Linear(4, 4)), "not known"),
        (lambda block: block.attn.register_parameter("bias", nn.Parameter(torch.empty(3))), "of its own"),
        (lambda block: setattr(block.attn, "o_proj", RowLinear(12, 8)), "none that are known"),
    ],
)
def test_what_is_not_known_to_be_divisible_stays_whole_and_says_why(change, why: str) -> None:
    model = empty(Block)
    with torch.device("meta"):
        change(model)
    shapes = {name: p.shape for name, p in model.named_parameters() if name.startswith("attn")}
    note = next(n for n in divide_layers(model, places(2)[1][0]) if n.path == "attn")
    assert not note.divided
    assert why in str(note)
    assert shapes == {name: p.shape for name, p in model.named_parameters() if name.startswith("attn")}


def test_norms_of_single_heads_are_divided_with_them() -> None:
    model = empty(lambda: Block((4, 4)))
    divide_layers(model, places(2)[1][1])
    assert model.attn.q_norm.weight.shape == (2, 4)
    assert model.attn.q_norm.cuts["weight"] == Cut(-2, (Piece(2, 2, 4),))


class Counting(torch.Tensor):
    """Counts the numbers that are read out of it."""

    read = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_:
            Counting.read += args[1].numel()
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_place_reads_its_own_part_of_the_checkpoint() -> None:
    whole = empty(Block)
    tensors = {name: tensor.as_subclass(Counting) for name, tensor in values(whole).items()}
    total = sum(tensor.numel() for tensor in tensors.values())
    architecture = Architecture("ToyForCausalLM", Block, TextConfig)
    read = []
    for place in places(2)[1]:
        model = empty(Block)
        names = tensor_names(model)
        divide_layers(model, place)
        held = sum(p.numel() for p in model.parameters())
        Counting.read = 0
        load_weights(model, tensors.items(), architecture, CONFIG, torch.float32, CPU, names)
        assert Counting.read == held
        read.append(held)
    assert sum(read) == total + 4  # both have the norm over a head


def test_a_tensor_of_a_wrong_size_is_told_in_the_checkpoints_sizes() -> None:
    model = empty(lambda: nn.ModuleDict({"mlp": GatedMLP(8, 6, "silu")}))
    divide_layers(model, places(2)[1][0])
    architecture = Architecture("ToyForCausalLM", nn.Module, TextConfig)
    with pytest.raises(WeightsError, match=r"shape \(3, 8\), the model wants \(6, 8\)"):
        load_weights(
            model, {"mlp.gate_proj.weight": torch.ones(3, 8)}.items(), architecture, CONFIG, torch.float32, CPU
        )


def test_the_pieces_of_a_fused_tensor_lie_one_behind_the_other() -> None:
    cut = Cut(-2, (Piece(1, 1, 2), Piece(2, 2, 4)))
    assert cut.full((3, 5), None) == (6, 5)
    here, tensor = torch.empty(3, 5), torch.arange(30.0).view(6, 5)
    for to, source in cut.views(here, tensor):
        to.copy_(source)
    assert torch.equal(here, tensor[[1, 4, 5]])
    assert cut.of(3) == (Piece(2, 2, 4),)  # the second layer of the second expert


def test_a_merged_linear_that_feeds_nothing_stays_whole() -> None:
    model = empty(lambda: nn.ModuleDict({"m": nn.ModuleDict({"up": MergedLinear(8, (4, 6), ("a", "b"))})}))
    (note,) = divide_layers(model, places(2)[1][0])
    assert not note.divided


TOWER = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 12,
         "patch_size": 4}  # fmt: skip
QWEN = Qwen2VisionConfig(depth=2, embed_dim=32, hidden_size=24, mlp_ratio=2, num_heads=2, patch_size=4)


@pytest.mark.parametrize(("tp_size", "heads"), [(2, "1 of 2 heads"), (3, "only 2 key heads")])
@pytest.mark.parametrize(
    ("make", "inputs", "attention"),
    [
        (lambda: ClipVision(ClipVisionConfig(**TOWER)), (torch.randn(2, 3, 12, 12),), "self_attn"),
        (lambda: PixtralVision(PixtralVisionConfig(**TOWER)), ([torch.randn(3, 8, 12)],), "attention"),
        (lambda: Qwen2VisionTower(QWEN), (torch.randn(16, 96), [(1, 4, 4)]), "attn"),
    ],
)
def test_a_divided_image_tower_is_the_whole_one(make, inputs, attention: str, tp_size: int, heads: str) -> None:
    tensors = {name: 0.2 * tensor for name, tensor in values(empty(make)).items()}
    architecture = Architecture("ToyForCausalLM", nn.Module, TextConfig)
    whole = empty(make)
    load_weights(whole, tensors.items(), architecture, CONFIG, torch.float32, CPU)
    hub, all_places = places(tp_size)
    models = []
    for place in all_places:
        model = empty(make)
        names = tensor_names(model)
        notes = [note for note in divide_layers(model, place) if note.path.endswith(f".{attention}")]
        assert len(notes) == 2
        assert all(heads in note.how and note.divided == (tp_size == 2) for note in notes)
        load_weights(model, tensors.items(), architecture, CONFIG, torch.float32, CPU, names)
        models.append(model)
    wanted = torch.cat([*whole(*inputs)])
    for found in everywhere(hub, tp_size, lambda rank: models[rank](*inputs)):
        torch.testing.assert_close(torch.cat([*found]), wanted, rtol=1e-5, atol=1e-5)
