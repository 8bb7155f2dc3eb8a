"""The experts against one dense product per expert, in every shape that a batch can take, and in every variant."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modelport.kernels import activation, cpu, linear, moe

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
ROUNDED = 4.0  # the reference rounds between its steps, the compiled kernel only at the end
ACTS = [*sorted(set(activation.ACTIVATIONS.values())), moe.SwigluOAI(limit=0.7, alpha=1.3)]


@pytest.fixture(params=cpu.lib.available() if cpu.lib else ["reference"])
def variant(request: pytest.FixtureRequest) -> Iterator[None]:
    if cpu.lib is None:
        yield
        return
    chosen = cpu.lib.isa()
    cpu.lib.isa(request.param)
    yield
    cpu.lib.isa(chosen)


class Layer:
    """Random experts with their plain weights."""

    def __init__(self, count: int, hidden: int, width: int, dtype: torch.dtype = torch.float32, bias: bool = False):
        self.gate_up = (torch.randn(count, 2, width, hidden) / hidden**0.5).to(dtype)
        self.down = (torch.randn(count, 1, hidden, width) / width**0.5).to(dtype)
        self.biases = [torch.randn(w.shape[:3]).to(dtype) if bias else None for w in (self.gate_up, self.down)]
        self.packed = self.pack(linear.pack)

    def pack(self, packer) -> list[moe.PackedExperts]:
        # a clone, since packing uses the weights up
        both = zip((self.gate_up, self.down), self.biases, strict=True)
        return [moe.pack(weight.clone(), bias, packer) for weight, bias in both]

    def want(self, x: Tensor, ids: Tensor, shares: Tensor, act: str | moe.SwigluOAI, residual: Tensor | None) -> Tensor:
        """Every expert on every token, and then the chosen ones."""
        gate_up_bias, down_bias = (0.0 if b is None else b.double() for b in self.biases)
        both = torch.einsum("etwh,nh->netw", self.gate_up.double(), x.double()) + gate_up_bias
        gate, up = both.unbind(2)
        if isinstance(act, str):
            inner = activation.activate_reference(gate.float(), act).double() * up
        else:
            gate, up = gate.clamp(max=act.limit), up.clamp(-act.limit, act.limit)
            inner = gate * torch.sigmoid(gate * act.alpha) * (up + 1)
        rows = torch.einsum("ethw,new->neth", self.down.double(), inner) + down_bias  # (tokens, experts, 1, hidden)
        spread = torch.zeros(x.shape[0], rows.shape[1] + 1, dtype=torch.float64)  # column 0: choices of nobody
        spread.scatter_add_(1, ids + 1, shares.double())
        out = (rows[:, :, 0] * spread[:, 1:, None]).sum(1)
        return (out if residual is None else out + residual.double()).to(x.dtype)


def routing(tokens: int, count: int, chosen: int) -> tuple[Tensor, Tensor]:
    ids = torch.rand(tokens, count).argsort(1)[:, :chosen].contiguous()
    return ids, torch.rand(tokens, chosen) / chosen


def close(got: Tensor, want: Tensor, times: float = 1.0) -> None:
    tolerance = TOLERANCE[want.dtype] * times
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def check(layer: Layer, x: Tensor, ids: Tensor, shares: Tensor, act="silu", residual: Tensor | None = None) -> None:
    want = layer.want(x, ids, shares, act, residual)
    close(moe.experts(x, ids, shares, *layer.packed, act, residual), want, ROUNDED if cpu.lib is None else 1.0)
    close(moe.experts_reference(x, ids, shares, *layer.packed, act, residual), want, ROUNDED)


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, 40), st.integers(1, 70), st.integers(1, 70), st.integers(1, 9), st.data(), st.sampled_from(DTYPES),
    st.sampled_from(ACTS), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_shape(tokens, hidden, width, count, data, dtype, act, bias, with_residual) -> None:
    chosen = data.draw(st.integers(1, count))
    layer = Layer(count, hidden, width, dtype, bias)
    x = torch.randn(tokens, hidden).to(dtype)
    residual = torch.randn(tokens, hidden).to(dtype) if with_residual else None
    check(layer, x, *routing(tokens, count, chosen), act, residual)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "count", "chosen"), [(1, 8, 2), (5, 8, 8), (9, 1, 1), (70, 16, 4), (230, 4, 3)], ids=str
)
def test_larger(dtype: torch.dtype, tokens: int, count: int, chosen: int) -> None:
    layer = Layer(count, 97, 145, dtype, bias=True)
    check(layer, torch.randn(tokens, 97).to(dtype), *routing(tokens, count, chosen))


@pytest.mark.usefixtures("variant")
def test_one_expert_gets_every_token_and_others_none() -> None:
    layer = Layer(5, 64, 48)
    x, shares = torch.randn(400, 64), torch.rand(400, 1)
    check(layer, x, torch.full((400, 1), 3), shares)


def test_a_choice_of_nobody_adds_nothing() -> None:
    layer = Layer(4, 32, 48)
    x, residual = torch.randn(12, 32), torch.randn(12, 32)
    ids, shares = routing(12, 4, 3)
    ids[torch.rand(12, 3) < 0.5] = -1
    ids[5] = -1
    check(layer, x, ids, shares, "silu", residual)
    out = moe.experts(x, ids, shares, *layer.packed, "silu", residual)
    assert torch.equal(out[5], residual[5])


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 7, 2100])
def test_what_adapters_of_experts_need(dtype: torch.dtype, tokens: int) -> None:
    """What is added before the activation is as if gate and up had it; what goes into the down product is told."""
    layer = Layer(4, 24, 37, dtype, bias=True)
    x, (ids, shares) = torch.randn(tokens, 24).to(dtype), routing(tokens, 4, 2)
    ids[::3, 1] = -1
    extra, inner = torch.randn(tokens, 2, 2, 37).to(dtype), torch.zeros(tokens, 2, 37, dtype=dtype)
    got = moe.experts(x, ids, shares, *layer.packed, "silu", None, extra, inner)
    want, total = torch.zeros(tokens, 2, 37, dtype=torch.float64), torch.zeros(tokens, 24, dtype=torch.float64)
    for choice in range(2):
        for expert in range(4):
            rows = (ids[:, choice] == expert).nonzero()[:, 0]
            both = torch.einsum("pwh,nh->npw", layer.gate_up[expert].double(), x[rows].double())
            both = both + layer.biases[0][expert].double() + extra[rows, choice].double()
            want[rows, choice] = torch.nn.functional.silu(both[:, 0]) * both[:, 1]
            out = want[rows, choice] @ layer.down[expert, 0].double().T + layer.biases[1][expert, 0].double()
            total[rows] += shares[rows, choice, None].double() * out
    close(inner, want.to(dtype), ROUNDED)
    close(got, total.to(dtype), ROUNDED)
    with pytest.raises(ValueError, match="extra"):
        moe.experts(x, ids, shares, *layer.packed, "silu", None, extra[:, :1])


def test_more_tokens_than_one_pass_takes() -> None:
    layer = Layer(3, 20, 18)
    wide, residual = torch.randn(4500, 33), torch.randn(4500, 25)
    check(layer, wide[:, 7:27], *routing(4500, 3, 2), "gelu", residual[:, :20])


def test_a_result_depends_on_its_own_row_alone() -> None:
    layer = Layer(8, 64, 80)
    x = torch.randn(300, 64)
    ids, shares = routing(300, 8, 3)
    together = moe.experts(x, ids, shares, *layer.packed, "silu")
    again = moe.experts(x, ids, shares, *layer.packed, "silu")
    assert torch.equal(together, again)
    for row in (0, 151, 299):
        one = slice(row, row + 1)
        alone = moe.experts(x[one], ids[one], shares[one], *layer.packed, "silu")
        torch.testing.assert_close(alone, together[one], rtol=1e-6, atol=1e-6)


def test_threads_do_not_change_a_result() -> None:
    layer = Layer(8, 64, 400)
    x = torch.randn(90, 64)
    ids, shares = routing(90, 8, 3)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(moe.experts(x, ids, shares, *layer.packed, "silu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [3, 60])
def test_int8(dtype: torch.dtype, tokens: int) -> None:
    layer = Layer(6, 50, 37, bias=True)
    layer.packed = layer.pack(linear.pack_int8)
    layer.gate_up, layer.down = (
        torch.stack([torch.stack([p.matrix(e, t).unpack() for t in range(p.data.shape[1])]) for e in range(6)])
        for p in layer.packed
    )
    x = torch.randn(tokens, 50).to(dtype)
    ids, shares = routing(tokens, 6, 2)
    want = layer.want(x, ids, shares, "silu", None)
    close(moe.experts(x, ids, shares, *layer.packed, "silu"), want, ROUNDED if cpu.lib is None else 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_takes_the_memory_over_where_it_fits(dtype: torch.dtype) -> None:
    for shape, fits in (((3, 2, 32, 20), True), ((3, 2, 33, 20), cpu.lib is None)):
        weight = torch.randn(shape).to(dtype)
        before = weight.clone()
        packed = moe.pack(weight)
        assert (packed.data.data_ptr() == weight.data_ptr()) == fits
        for expert in range(3):
            for part in range(2):
                assert torch.equal(packed.matrix(expert, part).unpack(), before[expert, part])


def test_refusals() -> None:
    layer = Layer(4, 8, 6)
    x = torch.randn(3, 8)
    ids, shares = routing(3, 4, 2)

    def run(x=x, ids=ids, shares=shares, packed=layer.packed, act="silu", residual=None):
        return moe.experts(x, ids, shares, *packed, act, residual)

    with pytest.raises(ValueError, match="tokens"):
        run(x=torch.randn(3, 7))
    with pytest.raises(ValueError, match="convert"):
        run(x=x.bfloat16())
    with pytest.raises(ValueError, match="shares"):
        run(shares=shares[:2])
    with pytest.raises(ValueError, match="int64"):
        run(ids=ids.int())
    with pytest.raises(ValueError, match="float32"):
        run(shares=shares.half())
    with pytest.raises(ValueError, match="residual"):
        run(residual=torch.randn(3, 9))
    with pytest.raises(ValueError, match="does not fit"):
        run(packed=[layer.packed[0], Layer(4, 8, 7).packed[1]])
    with pytest.raises(ValueError, match="unknown activation 'swosh'"):
        run(act="swosh")
    for bad in (4, -2):
        with pytest.raises(ValueError, match=rf"{bad}\b.* 4"):
            run(ids=torch.full((3, 2), bad))
    with pytest.raises(ValueError, match="experts, parts"):
        moe.pack(torch.zeros(3, 4, 5))
