"""Low-rank updates against one dense product per row, in every variant."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelport.kernels import cpu, lora

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(params=[*cpu.lib.available(), "reference"] if cpu.lib else ["reference"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "reference":
        monkeypatch.setattr(lora.cpu, "lib", None)
        yield
        return
    chosen = cpu.lib.isa()
    cpu.lib.isa(request.param)
    yield
    cpu.lib.isa(chosen)


def low_rank(
    ranks: list[int], size: int, widths: list[int], dtype: torch.dtype, room: int | None = None
) -> lora.LowRank:
    rank, parts, edges = max(ranks, default=0) if room is None else room, len(widths), [0]
    for width in widths:
        edges.append(edges[-1] + width)
    a, b = torch.randn(len(ranks), parts, rank, size) / size**0.5, torch.randn(len(ranks), rank, edges[-1])
    for slot, used in enumerate(ranks):
        a[slot, :, used:], b[slot, used:] = 0.0, 0.0
    return lora.LowRank(
        a.flatten(1, 2).to(dtype), b.to(dtype), torch.tensor(ranks, dtype=torch.int32), tuple(edges)
    )  # fmt: skip


def want(out: torch.Tensor, x: torch.Tensor, slots: torch.Tensor, made: lora.LowRank) -> torch.Tensor:
    result, rank = out.double().clone(), made.b.shape[1]
    for row, slot in enumerate(slots.tolist()):
        for part in range(len(made.edges) - 1 if slot >= 0 else 0):
            start, end = made.edges[part], made.edges[part + 1]
            a = made.a[slot, part * rank : (part + 1) * rank].double()
            result[row, start:end] += x[row].double() @ a.T @ made.b[slot, :, start:end].double()
    return result.to(out.dtype)


def check(
    rows: int, ranks: list[int], size: int, widths: list[int], dtype: torch.dtype, room: int | None = None
) -> None:
    made = low_rank(ranks, size, widths, dtype, room)
    slots = torch.randint(-1, len(ranks), (rows,), dtype=torch.int32)
    # rows of a larger tensor, as the parts of a fused projection are
    x = torch.randn(rows, 2 * size).to(dtype)[:, size:]
    out = torch.randn(rows, 2 * sum(widths)).to(dtype)
    beside = out[:, sum(widths) :].clone()
    got = out[:, : sum(widths)]
    expected = want(got, x, slots, made)
    lora.lora_(got, x, slots, made)
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)
    assert torch.equal(out[:, sum(widths) :], beside)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    check(1, [1], 1, [1], dtype)
    check(5, [3, 0, 7], 33, [17], dtype)
    check(70, [16, 5, 1, 9], 64, [40, 8, 8], dtype)
    check(3, [2], 20, [700, 3, 300], dtype, room=8)
    check(100, [8], 130, [96], dtype)
    check(0, [2], 4, [4], dtype)
    check(4, [0, 0], 4, [4], dtype, room=2)


@given(
    st.integers(1, 40), st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 70),
    st.lists(st.integers(1, 90), min_size=1, max_size=3),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_shape(rows: int, ranks: list[int], size: int, widths: list[int]) -> None:
    torch.manual_seed(rows * size)
    check(rows, ranks, size, widths, torch.float32, room=max(*ranks, 1))


@pytest.mark.usefixtures("variant")
def test_a_row_does_not_depend_on_the_others() -> None:
    made = low_rank([4, 6], 40, [30], torch.bfloat16)
    x, slots = torch.randn(50, 40).bfloat16(), torch.randint(-1, 2, (50,), dtype=torch.int32)
    out = torch.randn(50, 30).bfloat16()
    together, alone = out.clone(), out.clone()
    lora.lora_(together, x, slots, made)
    for row in range(50):
        lora.lora_(alone[row : row + 1], x[row : row + 1], slots[row : row + 1], made)
    if cpu.lib is not None and lora.cpu.lib is not None:
        assert torch.equal(together, alone)
    torch.testing.assert_close(together, alone, rtol=1e-2, atol=1e-2)
    assert torch.equal(together[slots < 0], out[slots < 0])


@pytest.mark.usefixtures("variant")
def test_what_does_not_fit_is_refused() -> None:
    made = low_rank([2], 8, [6], torch.float32)
    x, out, none = torch.randn(3, 8), torch.zeros(3, 6), torch.full((3,), -1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"slot[ s].*1"):
        lora.lora_(out, x, none + 2, made)
    with pytest.raises(ValueError, match=r"x \(3, 7\)"):
        lora.lora_(out, x[:, :7], none, made)
    with pytest.raises(ValueError, match=r"float64|convert"):
        lora.lora_(out.double(), x.double(), none, made)
    with pytest.raises(ValueError, match=r"end at 5"):
        lora.LowRank(made.a, made.b, made.ranks, (0, 5))
