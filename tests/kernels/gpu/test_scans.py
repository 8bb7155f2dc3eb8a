"""State-space kernels: against the references, on states that hold anything where a sequence begins."""

import itertools
import os

import pytest
import torch

from modelport.kernels import ssm

ON_CPU = os.environ.get("MODELPORT_TEST_DEVICE", "cpu") == "cpu"
DTYPES = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)]
if not ON_CPU:  # the interpreter only pretends to compute with bfloat16
    DTYPES.append(torch.bfloat16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
LENS, POSITIONS, SLOTS = [5, 1, 0, 20, 2, 1], [0, 7, 0, 3, 0, 0], [3, 0, 5, 1, 4, 6]
TOKENS = sum(LENS) + 2  # rows of no sequence at the end


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    size = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    torch.testing.assert_close(got, want, rtol=TOLERANCE[want.dtype], atol=TOLERANCE[want.dtype] * size)


def sequences() -> ssm.Sequences:
    positions = [torch.arange(p, p + n) for n, p in zip(LENS, POSITIONS, strict=True)]
    starts = torch.tensor([0, *itertools.accumulate(LENS)], dtype=torch.int32)
    return ssm.Sequences(torch.cat([*positions, torch.zeros(2)]).long(), starts, torch.tensor(SLOTS, dtype=torch.int32))


def fresh_are_poisoned(state: torch.Tensor) -> torch.Tensor:
    for slot, position, count in zip(SLOTS, POSITIONS, LENS, strict=True):
        if position == 0 and count:
            state[slot] = torch.nan
    return state


def check(kernel, reference, state: torch.Tensor, *arguments) -> None:
    at, same = sequences(), fresh_are_poisoned(state).clone()
    want = reference(*arguments, same, at)
    close(kernel(*arguments, state, at), want)
    close(state, same)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("channels", "taps", "bias", "silu"), [(70, 4, True, True), (3, 2, False, False), (9, 1, True, True)]
)
def test_causal_conv(channels: int, taps: int, bias: bool, silu: bool, dtype: torch.dtype) -> None:
    x = torch.randn(TOKENS, 2 * channels).to(dtype)[:, channels:]
    weight, shift = torch.randn(taps, channels), torch.randn(channels) if bias else None
    state = torch.randn(7, taps - 1, channels).to(dtype)
    check(
        lambda *a: ssm.causal_conv(*a, silu), lambda *a: ssm.causal_conv_reference(*a, silu), state, x, weight, shift
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "states", "gated"), [(70, 16, True), (5, 3, False)])
def test_selective_scan(channels: int, states: int, gated: bool, dtype: torch.dtype) -> None:
    x, gate = torch.randn(TOKENS, 2 * channels).to(dtype).chunk(2, 1)
    dt, b, c = torch.randn(TOKENS, channels + 2 * states).to(dtype).split((channels, states, states), 1)
    rates, skip, bias = -torch.rand(states, channels).exp() / 9, torch.randn(channels), torch.randn(channels) * 9 - 2
    state = torch.randn(7, states, channels)
    gate = gate if gated else None
    check(ssm.selective_scan, ssm.selective_scan_reference, state, x, dt, rates, b, c, skip, gate, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups", "head_dim", "states"), [(4, 2, 40, 16), (3, 1, 6, 5)])
def test_head_scan(heads: int, groups: int, head_dim: int, states: int, dtype: torch.dtype) -> None:
    x = torch.randn(TOKENS, heads, 2 * head_dim).to(dtype)[..., head_dim:]
    b, c = torch.randn(2, TOKENS, groups, states).to(dtype)
    dt = torch.randn(TOKENS, 2 * heads).to(dtype)[:, heads:]
    rates, skip, bias = -torch.rand(heads).exp() / 9, torch.randn(heads), torch.randn(heads)
    state = torch.randn(7, heads, states, head_dim)
    check(
        ssm.head_scan, ssm.head_scan_reference, state, x, dt, rates, b, c, skip, bias, (0.01, float("inf"))
    )  # fmt: skip


def test_a_prompt_in_pieces_gives_the_same_bits() -> None:
    x, dt, gate = torch.randn(3, 12, 8)
    b, c = torch.randn(2, 12, 4)
    rates, skip, bias = -torch.rand(4, 8), torch.randn(8), torch.randn(8)

    def run(cuts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        state, out = torch.full((1, 4, 8), torch.nan), []
        for a, z in itertools.pairwise(cuts):
            at = ssm.Sequences(torch.arange(a, z), torch.tensor([0, z - a]).int(), torch.zeros(1).int())
            part = (x[a:z], dt[a:z], rates, b[a:z], c[a:z], skip, gate[a:z], bias, state, at)
            out.append(ssm.selective_scan(*part))
        return torch.cat(out), state

    for whole, cut in zip(run([0, 12]), run([0, 1, 5, 12]), strict=True):
        assert torch.equal(whole, cut)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_norm(dtype: torch.dtype) -> None:
    x, gate = torch.randn(5, 132).to(dtype).chunk(2, 1)
    weight = torch.randn(66).to(dtype)
    for size in (66, 11):
        close(ssm.gated_norm(x, gate, weight, 1e-5, size), ssm.gated_norm_reference(x, gate, weight, 1e-5, size))
