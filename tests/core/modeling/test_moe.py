"""Routers and experts against the blocks of transformers, from checkpoints in the published names; their loading."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from modelport.config import TextConfig
from modelport.kernels import linear
from modelport.loading.loader import WeightsError, fill_random, load_weights
from modelport.modeling import Experts, GatedMLP, Linear, Router, SparseMixer, SwigluOAI
from modelport.plugin import Architecture

CPU = torch.device("cpu")
HIDDEN, WIDTH, COUNT = 40, 24, 12
SIZES = {
    "vocab_size": 32,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
Tensors = dict[str, Tensor]


class Moe(nn.Module):
    """What a family writes: a router, experts, perhaps a shared expert."""

    def __init__(self, gate: Router, experts: Experts | None = None, shared: int = 0, shared_gate: bool = False):
        super().__init__()
        self.gate, self.experts = gate, experts or Experts(COUNT, HIDDEN, WIDTH)
        self.shared_expert = GatedMLP(HIDDEN, shared, "silu") if shared else None
        self.shared_expert_gate = Linear(HIDDEN, 1) if shared_gate else None

    def forward(self, x: Tensor) -> Tensor:
        if self.shared_expert is None:
            return self.experts(x, *self.gate(x))
        shared = self.shared_expert(x)
        return self.experts(
            x,
            *self.gate(x),
            shared if self.shared_expert_gate is None else self.shared_expert_gate(x).sigmoid() * shared,
        )


def load(make: Callable[[], nn.Module], tensors: Tensors, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.device("meta"):
        model = make()
    architecture = Architecture("ToyForCausalLM", Moe, TextConfig)
    config = TextConfig(vocab_size=32, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2)
    load_weights(model, tensors.items(), architecture, config, dtype, CPU)
    return model


def published(kind: str, folder: Path, **settings) -> tuple[nn.Module, Tensors]:
    """The mixture of a model of transformers, random, and its tensors as `save_pretrained` publishes them."""
    model_class = getattr(transformers, f"{kind}ForCausalLM")
    config = model_class.config_class(**{**SIZES, **settings})
    config._experts_implementation = "eager"
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(3)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and "inv_freq" not in name:
            tensor.data.normal_(0.0, 0.3, generator=generator)
    model.save_pretrained(folder)
    block = next(m for m in model.modules() if isinstance(getattr(m, "experts", None), nn.Module))
    inside = re.compile(r".*?\.(?:block_sparse_moe|mlp|ffn|feed_forward)\.(.*)")
    stored = load_file(folder / "model.safetensors")
    return block, {found[1]: tensor for name, tensor in stored.items() if (found := inside.fullmatch(name))}


def renamed(**names: str) -> Callable[[Tensors], Tensors]:
    """Words of tensor names to replace; underscores stand for dots."""
    table = {old.replace("__", "."): new for old, new in names.items()}

    def rename(tensors: Tensors) -> Tensors:
        made = {}
        for name, tensor in tensors.items():
            for old, new in table.items():
                name = name.replace(old, new)
            made[name] = tensor
        return made

    return rename


def from_dbrx(tensors: Tensors) -> Tensors:
    """All experts' rows one after the other; the down projection is stored transposed."""
    made = {"gate.weight": tensors["router.layer.weight"]}
    for stored, name in (("w1", "gate_proj"), ("v1", "up_proj"), ("w2", "down_proj")):
        for expert, matrix in enumerate(tensors[f"experts.mlp.{stored}"].chunk(COUNT)):
            made[f"experts.{expert}.{name}.weight"] = matrix.T if stored == "w2" else matrix
    return made


def from_gpt_oss(tensors: Tensors) -> Tensors:
    """Stored transposed, with gate and up in turn."""
    made = {name.replace("router.", "gate."): t for name, t in tensors.items() if name.startswith("router.")}
    weight, bias = tensors["experts.gate_up_proj"].transpose(1, 2), tensors["experts.gate_up_proj_bias"]
    made["experts.gate_up_proj"] = torch.cat((weight[:, 0::2], weight[:, 1::2]), 1)
    made["experts.gate_up_proj_bias"] = torch.cat((bias[:, 0::2], bias[:, 1::2]), 1)
    made["experts.down_proj"] = tensors["experts.down_proj"].transpose(1, 2)
    return {**made, "experts.down_proj_bias": tensors["experts.down_proj_bias"]}


def router(top_k: int = 3, **settings) -> Router:
    return Router(HIDDEN, COUNT, top_k, **settings)


def wide(act: str = "silu") -> Experts:
    return Experts(COUNT, HIDDEN, WIDTH, act, names=("w1", "w3", "w2"))


def gpt_oss() -> Moe:
    experts = Experts(COUNT, HIDDEN, WIDTH, SwigluOAI(limit=1.5, alpha=1.702), bias=True)
    return Moe(router(normalize=1, bias=True), experts)


LOCAL = {"num_local_experts": COUNT, "num_experts_per_tok": 3}
PLAIN = {"num_experts": COUNT, "num_experts_per_tok": 3}
QWEN = {**PLAIN, "moe_intermediate_size": WIDTH, "shared_expert_intermediate_size": 20}
JAMBA = {**PLAIN, "expert_layer_offset": 0, "expert_layer_period": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {
    **LATENT,
    "n_routed_experts": COUNT,
    "n_shared_experts": 2,
    "moe_intermediate_size": WIDTH,
    "first_k_dense_replace": 0,
    "num_experts_per_tok": 3,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
V3 = {"scores": "sigmoid", "scale": 2.5, "correction": True, "groups": 4, "group_best": 2, "exact": True}


def dbrx(norm: float | None) -> dict:
    experts = {"ffn_hidden_size": WIDTH, "hidden_size": HIDDEN, "moe_num_experts": COUNT, "moe_top_k": 3}
    attention = {"kv_n_heads": 2, "clip_qkv": None, "rope_theta": 1e4}
    sizes = {"d_model": HIDDEN, "n_heads": 2, "n_layers": 1}
    return {**sizes, "attn_config": attention, "ffn_config": {**experts, "moe_normalize_expert_weights": norm}}


as_published, one_shared = renamed(), renamed(shared_experts="shared_expert")
CASES = {  # transformers' model and settings; ours; how its published names become ours
    "Mixtral": ("Mixtral", LOCAL, lambda: Moe(router(normalize=1), wide()), as_published),
    "Mixtral, all experts": (
        "Mixtral",
        {**LOCAL, "num_experts_per_tok": COUNT},
        lambda: Moe(router(COUNT, normalize=1), wide()),
        as_published,
    ),
    "Mixtral, one expert": (
        "Mixtral",
        {**LOCAL, "num_experts_per_tok": 1, "hidden_act": "gelu"},
        lambda: Moe(router(1, normalize=1), wide("gelu")),
        as_published,
    ),
    "Qwen2Moe": ("Qwen2Moe", QWEN, lambda: Moe(router(), shared=20, shared_gate=True), as_published),
    "Qwen2Moe, normalised": (
        "Qwen2Moe",
        {**QWEN, "norm_topk_prob": True},
        lambda: Moe(router(normalize=1), shared=20, shared_gate=True),
        as_published,
    ),
    "Olmoe": ("Olmoe", PLAIN, lambda: Moe(router()), as_published),
    "Jamba": ("Jamba", JAMBA, lambda: Moe(router()), renamed(router="gate")),
    "GraniteMoe": (
        "GraniteMoe",
        LOCAL,
        lambda: Moe(router(normalize=1)),
        renamed(router__layer="gate", input_linear="experts.gate_up_proj", output_linear="experts.down_proj"),
    ),
    "Phimoe": (
        "Phimoe",
        {**LOCAL, "num_experts_per_tok": 2, "router_jitter_noise": 0.3},
        lambda: Moe(SparseMixer(HIDDEN, COUNT, 0.3), wide()),
        as_published,
    ),
    "DeepseekV2, greedy": (
        "DeepseekV2",
        {**DEEPSEEK, "topk_method": "greedy"},
        lambda: Moe(router(scale=2.5, exact=True), shared=2 * WIDTH),
        one_shared,
    ),
    "DeepseekV2, in groups": (
        "DeepseekV2",
        DEEPSEEK,
        lambda: Moe(router(groups=4, top_groups=2, scale=2.5, exact=True), shared=2 * WIDTH),
        one_shared,
    ),
    "DeepseekV3": (
        "DeepseekV3",
        {**DEEPSEEK, "norm_topk_prob": True},
        lambda: Moe(router(normalize=1, top_groups=2, **V3), shared=2 * WIDTH),
        one_shared,
    ),
    "DeepseekV3, not normalised": (
        "DeepseekV3",
        {**DEEPSEEK, "norm_topk_prob": False, "topk_group": 3},
        lambda: Moe(router(top_groups=3, **V3), shared=2 * WIDTH),
        one_shared,
    ),
    "Dbrx": ("Dbrx", dbrx(2.0), lambda: Moe(router(normalize=2)), from_dbrx),
    "Dbrx, not normalised": ("Dbrx", dbrx(None), lambda: Moe(router()), from_dbrx),
    "GptOss": ("GptOss", {**LOCAL, "swiglu_limit": 1.5}, gpt_oss, from_gpt_oss),
}


def inputs(tokens: int = 57) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_as_transformers(name: str, tmp_path: Path) -> None:
    kind, settings, make, translate = CASES[name]
    reference, tensors = published(kind, tmp_path, **settings)
    model = load(make, translate(tensors))
    x = inputs()
    want = reference(x[None])
    want = (want[0] if isinstance(want, tuple) else want).view(x.shape)
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_no_tokens() -> None:
    assert load(lambda: Moe(router()), checkpoint())(inputs(0)).shape == (0, HIDDEN)


@torch.inference_mode()
def test_bfloat16_routes_as_transformers(tmp_path: Path) -> None:
    reference, tensors = published("Qwen2Moe", tmp_path, **QWEN)
    model = load(lambda: Moe(router(), shared=20, shared_gate=True), tensors, torch.bfloat16)
    x = inputs().bfloat16()
    want = reference.bfloat16()(x[None])[0].float()
    error = (model(x).float() - want).norm(dim=1) / want.norm(dim=1)
    # a tie may be rounded the other way and choose another expert, for few tokens
    assert float(error.median()) < 0.01
    assert int((error > 0.03).sum()) <= 2


def checkpoint() -> Tensors:
    """Random experts under published names."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"gate.weight": (COUNT, HIDDEN)}
    for expert in range(COUNT):
        shapes[f"experts.{expert}.gate_proj.weight"] = shapes[f"experts.{expert}.up_proj.weight"] = (WIDTH, HIDDEN)
        shapes[f"experts.{expert}.down_proj.weight"] = (HIDDEN, WIDTH)
    return {name: torch.randn(shape, generator=generator) / 5 for name, shape in shapes.items()}


def whole(tensors: Tensors) -> Tensors:
    """The same with all experts in one tensor."""
    made = {"gate.weight": tensors["gate.weight"]}
    for name, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        rows = [torch.cat([tensors[f"experts.{e}.{p}.weight"] for p in parts]) for e in range(COUNT)]
        made[f"experts.{name}"] = torch.stack(rows)
    return made


def test_experts_load_in_any_order_and_form() -> None:
    tensors, x = checkpoint(), inputs()
    want = load(lambda: Moe(router()), tensors)(x)
    for form in (dict(reversed(tensors.items())), dict(sorted(tensors.items())), whole(tensors)):
        assert torch.equal(load(lambda: Moe(router()), form)(x), want)
    assert want.abs().max() > 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts.7.up_proj.weight": None}, r"missing: 'experts\.7\.up_proj\.weight'\."),
        ({"experts.12.up_proj.weight": torch.ones(WIDTH, HIDDEN)}, r"not known .*'experts\.12\.up_proj\.weight'"),
        (
            {"experts.3.down_proj.weight": torch.ones(WIDTH, HIDDEN)},
            r"experts\.3\.down_proj.*the model wants \(40, 24\)",
        ),
        ({"experts.down_proj": torch.ones(COUNT, HIDDEN, WIDTH)}, r"'experts\.down_proj' that are already filled"),
        (
            {"experts.3.gate_proj.weight": torch.full((WIDTH, HIDDEN), torch.inf)},
            r"gate_proj\.weight' holds 960 values",
        ),
    ],
    ids=["missing", "surplus", "shape", "twice", "infinite"],
)
def test_wrong_checkpoints_are_refused_by_name(change: dict[str, Tensor | None], message: str) -> None:
    tensors = {name: tensor for name, tensor in {**checkpoint(), **change}.items() if tensor is not None}
    with pytest.raises(WeightsError, match=message):
        load(lambda: Moe(router()), tensors)


def test_the_correction_stays_float32_and_only_chooses() -> None:
    bias = torch.zeros(COUNT)
    bias[[1, 4, 6]] = 300.0 + torch.arange(3) * 2**-10  # bfloat16 would not tell them apart
    tensors = {**checkpoint(), "gate.e_score_correction_bias": bias}
    settings = {"scores": "sigmoid", "correction": True, "exact": True}
    model = load(lambda: Moe(router(2, **settings)), tensors, torch.bfloat16)
    assert torch.equal(model.gate.e_score_correction_bias, bias)
    tensors["gate.weight"] *= 0
    model = load(lambda: Moe(router(2, **settings)), tensors, torch.bfloat16)
    shares, ids = model.gate(inputs(5).bfloat16())
    assert ids.tolist() == [[6, 4]] * 5
    assert torch.equal(shares, torch.full((5, 2), 0.5))


def test_scores_that_are_all_zero_give_no_nan() -> None:
    gate = router(3, scores="sigmoid", normalize=1)
    shares, _ = gate.choose(torch.full((2, COUNT), -200.0))
    assert torch.equal(shares, torch.zeros(2, 3))


def test_quantised_experts_come_near() -> None:
    tensors, x = checkpoint(), inputs()

    def quantised() -> Moe:
        model = Moe(router())
        model.experts.gate_up_proj.packer = model.experts.down_proj.packer = linear.pack_int8
        return model

    model, want = load(quantised, tensors), load(lambda: Moe(router()), tensors)(x)
    assert model.experts.down_proj.packed.dtype == torch.int8
    assert 0 < float((model(x) - want).norm() / want.norm()) < 0.02


def test_dummy_weights_fill_everything() -> None:
    with torch.device("meta"):
        model = Moe(router(correction=True), Experts(COUNT, HIDDEN, WIDTH, SwigluOAI(), bias=True))
    fill_random(model, torch.bfloat16, CPU, seed=0)
    assert model.gate.e_score_correction_bias.dtype == torch.float32
    assert model(inputs().bfloat16()).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 13}, "cannot choose 13 of 12 experts"),
        ({"top_k": 7, "groups": 4, "top_groups": 2}, "cannot choose 7 of 12 experts in 2 of 4 groups"),
        ({"groups": 5}, "12 experts cannot be routed .* 5 groups"),
        ({"groups": 4, "top_groups": 5}, "4 groups, 5 of them chosen"),
        ({"groups": 6, "group_best": 3}, "by the 3 best of each of 6 groups"),
        ({"scores": "tanh"}, "scores 'tanh' are not known"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router(**settings)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden_act 'swosh' is not supported"):
        Experts(COUNT, HIDDEN, WIDTH, "swosh")
