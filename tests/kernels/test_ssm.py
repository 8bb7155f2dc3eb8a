"""The scans and their convolution: native against references, cut against whole, on every variant here."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from modelport.kernels import cpu, ssm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SLOTS = 6


@pytest.fixture(params=cpu.lib.available() if cpu.lib else ("reference",), autouse=True, scope="module")
def variant(request: pytest.FixtureRequest) -> Iterator[None]:
    if cpu.lib is None:
        yield
        return
    chosen = cpu.lib.isa()
    cpu.lib.isa(request.param)
    yield
    cpu.lib.isa(chosen)


def close(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    limit = TOLERANCE[want.dtype]
    size = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got, want, rtol=limit, atol=limit * max(1.0, size))


def sequences(lens: list[int], first: list[int], slots: list[int]) -> ssm.Sequences:
    starts = torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32)
    positions = [torch.arange(p, p + n) for n, p in zip(lens, first, strict=True)]
    return ssm.Sequences(torch.cat(positions), starts, torch.tensor(slots, dtype=torch.int32))


class Convolution:
    """Random inputs of one operation; called with a state and rows, and whether the reference is to compute them."""

    def __init__(self, tokens: int, dtype: torch.dtype, size: int):
        channels, taps = 5 * size, 2 + size % 4
        self.x = torch.randn(tokens, 2 * channels).to(dtype)[:, channels:]  # half of a fused projection
        self.weight, self.bias = torch.randn(taps, channels), torch.randn(channels) if size % 2 else None
        self.state = torch.randn(SLOTS, taps - 1, channels).to(dtype)

    def __call__(self, state: Tensor, at: ssm.Sequences, rows: slice, plain: bool) -> Tensor:
        function = ssm.causal_conv_reference if plain else ssm.causal_conv
        return function(self.x[rows], self.weight, self.bias, state, at)


class Scan:
    def __init__(self, tokens: int, dtype: torch.dtype, size: int):
        channels, states = 7 * size, 3 + size
        self.x, self.gate = torch.randn(tokens, 2 * channels).to(dtype).chunk(2, 1)
        self.dt, _, self.b, self.c = (
            torch.randn(tokens, channels + 2 + 2 * states).to(dtype).split((channels, 2, states, states), 1)
        )
        self.rates, self.skip = -torch.rand(states, channels).exp() / 9, torch.randn(channels)
        self.bias = torch.randn(channels) * 3 - 2
        self.gated = size % 3 > 0
        self.state = torch.randn(SLOTS, states, channels)

    def __call__(self, state: Tensor, at: ssm.Sequences, rows: slice, plain: bool) -> Tensor:
        function = ssm.selective_scan_reference if plain else ssm.selective_scan
        gate = self.gate[rows] if self.gated else None
        return function(
            self.x[rows], self.dt[rows], self.rates, self.b[rows], self.c[rows], self.skip, gate, self.bias, state, at
        )


class HeadScan:
    def __init__(self, tokens: int, dtype: torch.dtype, size: int):
        groups, head_dim, states = 1 + size % 3, 3 * size, 2 + size
        heads = 2 * groups
        wide = torch.randn(tokens, heads * (head_dim + 1) + 2 * groups * states).to(dtype)
        x, self.dt, b, c = wide.split((heads * head_dim, heads, groups * states, groups * states), 1)
        self.x = x.unflatten(1, (heads, head_dim))
        self.b, self.c = b.unflatten(1, (groups, states)), c.unflatten(1, (groups, states))
        self.rates, self.skip, self.bias = -torch.rand(heads) / 9, torch.randn(heads), torch.randn(heads) * 3
        self.limits = (0.01, 2.0) if size % 2 else (0.0, float("inf"))
        self.state = torch.randn(SLOTS, heads, states, head_dim)

    def __call__(self, state: Tensor, at: ssm.Sequences, rows: slice, plain: bool) -> Tensor:
        function = ssm.head_scan_reference if plain else ssm.head_scan
        return function(
            self.x[rows], self.dt[rows], self.rates, self.b[rows], self.c[rows], self.skip, self.bias, self.limits,
            state, at,
        )  # fmt: skip


OPERATIONS = (Convolution, Scan, HeadScan)


@pytest.mark.parametrize("kind", OPERATIONS)
@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from((0, 1, 1, 2, 5, 31, 32, 33, 70)), st.sampled_from((0, 0, 1, 900))), max_size=5),
    st.sampled_from(DTYPES),
    st.integers(1, 9),
    st.randoms(use_true_random=False),
)
def test_native_is_the_reference(kind, lens_and_positions, dtype, size, random) -> None:
    lens, first = [n for n, _ in lens_and_positions], [p for _, p in lens_and_positions]
    if not lens:
        lens, first = [3], [0]
    slots = random.sample(range(SLOTS), len(lens))
    at = sequences(lens, first, slots)
    operation = kind(sum(lens), dtype, size)
    for n, position, slot in zip(lens, first, slots, strict=True):
        if n and position == 0:
            operation.state[slot] = float("nan")  # whatever the sequence before left there
    state, plain_state = operation.state.clone(), operation.state.clone()
    close(operation(state, at, slice(None), False), operation(plain_state, at, slice(None), True))
    close(state, plain_state)
    idle = [slot for slot in range(SLOTS) if slot not in slots]
    assert torch.equal(state[idle], operation.state[idle])


@pytest.mark.parametrize("kind", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cuts", [(0, 1, 2, 3, 100), (0, 40, 97, 100), (0, 99, 100)])
def test_pieces_give_the_bits_of_the_whole(kind, dtype, cuts) -> None:
    operation = kind(100, dtype, 7)
    whole, pieces = torch.full_like(operation.state, float("nan")), torch.full_like(operation.state, float("nan"))
    want = operation(whole, sequences([100], [0], [2]), slice(None), False)
    got = [operation(pieces, sequences([b - a], [a], [2]), slice(a, b), False) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(got), want)
    assert torch.equal(pieces[2], whole[2])
    assert torch.isfinite(want).all()


@pytest.mark.parametrize("kind", OPERATIONS)
def test_many_channels_run_in_parallel(kind) -> None:
    threads = torch.get_num_threads()
    at = sequences([3, 200], [0, 4], [0, 1])
    operation = kind(203, torch.float32, 41)
    want = operation(operation.state.clone(), at, slice(None), True)
    torch.set_num_threads(3)
    try:
        close(operation(operation.state.clone(), at, slice(None), False), want)
    finally:
        torch.set_num_threads(threads)


def test_convolution_is_that_of_torch() -> None:
    x, weight, bias = torch.randn(9, 20), torch.randn(4, 20), torch.randn(20)
    want = F.conv1d(F.pad(x.t(), (3, 0)), weight.t()[:, None], bias, groups=20).t()
    state = torch.full((1, 3, 20), float("nan"))
    close(ssm.causal_conv(x, weight, bias, state, sequences([9], [0], [0]), silu=False), want)
    assert torch.equal(state[0], x[-3:])


def test_extreme_steps() -> None:
    """dt far beyond both ends of the softplus; decay to nothing and none at all."""
    x, dt = (
        torch.ones(4, 3),
        torch.tensor([[-200.0, 200.0, 1e-8], [-30.0, 30.0, 20.0], [0.0, 88.0, -88.0], [5.0, 9.0, 1e4]]),
    )
    rates = torch.tensor([[-1e-6, -1.0, -100.0]])
    rest = (torch.ones(4, 1), torch.ones(4, 1), torch.zeros(3), None, torch.zeros(3))
    at, state = sequences([4], [1], [0]), torch.ones(1, 1, 3)
    plain_state = state.clone()
    got = ssm.selective_scan(x, dt, rates, *rest, state, at)
    torch.testing.assert_close(got, ssm.selective_scan_reference(x, dt, rates, *rest, plain_state, at))
    torch.testing.assert_close(state, plain_state)


def test_a_small_step_keeps_its_digits() -> None:
    """softplus(-16) is 1e-7; as log(1 + 1e-7) in float32 it would lose half of its digits."""
    x, dt = torch.ones(1, 16), torch.linspace(-16, -2, 16)[None]
    rest = (-torch.ones(1, 16), torch.ones(1, 1), torch.ones(1, 1), torch.zeros(16), None, torch.zeros(16))
    got = ssm.selective_scan(x, dt, *rest, torch.zeros(1, 1, 16), sequences([1], [0], [0]))
    torch.testing.assert_close(got, F.softplus(dt.double()).float(), rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 70), st.sampled_from(DTYPES), st.booleans())
def test_gated_norm(tokens: int, groups: int, size: int, dtype: torch.dtype, wide_weight: bool) -> None:
    x, gate = torch.randn(tokens, groups * size).to(dtype), torch.randn(tokens, 2 * groups * size).to(dtype)
    gate = gate[:, : groups * size]
    weight = torch.randn(groups * size).to(torch.float32 if wide_weight else dtype)
    close(ssm.gated_norm(x, gate, weight, 1e-5, size), ssm.gated_norm_reference(x, gate, weight, 1e-5, size))


def test_what_does_not_fit_is_refused() -> None:
    for kind in OPERATIONS:
        operation = kind(4, torch.float32, 4)
        with pytest.raises(ValueError, match="state_slots"):
            operation(operation.state, sequences([4], [0], [SLOTS]), slice(None), False)
        with pytest.raises(ValueError, match="state_slots"):
            operation(operation.state, sequences([4], [0], [-1]), slice(None), False)
        with pytest.raises(ValueError, match="positions"):
            operation(operation.state, sequences([3], [0], [0]), slice(None), False)
        with pytest.raises(ValueError, match="state"):
            operation(operation.state[..., :-1].contiguous(), sequences([4], [0], [0]), slice(None), False)
    with pytest.raises(ValueError, match=r"query_starts|starts"):
        operation(operation.state, ssm.Sequences(torch.arange(4), torch.tensor([0, 5]).int(), torch.tensor([0]).int()),
                  slice(None), False)  # fmt: skip
    with pytest.raises(ValueError, match="groups"):
        ssm.gated_norm(torch.randn(2, 8), torch.randn(2, 8), torch.randn(8), 1e-5, 3)
