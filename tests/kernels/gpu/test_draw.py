"""The draw: tokens of the reference, except where a random number falls on an edge and rounding decides."""

import pytest
import torch

from modelport.kernels.argmax import argmax_reference
from modelport.kernels.draw import draw, draw_reference, filter_weights

FILTERS = [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.9, 0.0), (0, 0.3, 0.0), (40, 0.8, 0.0), (0, 1.0, 0.1), (7, 0.95, 0.2)]


def arguments(x: torch.Tensor, temperature: float, filters: list, uniforms: torch.Tensor) -> tuple:
    top_k, top_p, min_p = zip(*filters, strict=True)
    best = argmax_reference(x)[1]
    return (
        x, best, torch.full_like(best, temperature), torch.tensor(top_k), torch.tensor(top_p, dtype=torch.float64),
        torch.tensor(min_p), uniforms,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "width", "temperature"),
    [(torch.float32, 1, 1.0), (torch.bfloat16, 70, 0.3), (torch.float16, 1100, 2.0), (torch.float32, 2500, 1.0)],
)
def test_draw(dtype: torch.dtype, width: int, temperature: float) -> None:
    """Values of few digits, so that there are many equals where the filters cut."""
    rows = 2 * len(FILTERS)
    x = (torch.randn(rows, width) * 2).round(decimals=1).to(dtype)
    filters = [(min(k, width), p, m) for k, p, m in FILTERS] * 2
    given = arguments(x, temperature, filters, torch.rand(rows, dtype=torch.float64))
    got, want = draw(*given), draw_reference(*given)
    assert (got != want).sum() <= 1
    weights = torch.exp((x.float() - given[1][:, None]) / temperature)
    kept = filter_weights(weights, *given[3:6], 40)
    assert (kept[torch.arange(rows), got] > 0).all()


def test_ends() -> None:
    """The first and the last number that there is find the first and the last token with a weight."""
    x = torch.full((1, 3000), -torch.inf)
    x[0, [700, 900, 2100]] = torch.tensor([1.0, 3.0, 0.0])
    for k, p, m in FILTERS[:2]:
        for number, token in ((0.0, 700), (1 - 2**-53, 2100)):
            given = arguments(x, 1.0, [(k, p, m)], torch.tensor([number], dtype=torch.float64))
            assert draw(*given).item() == token


def test_equals_are_kept_in_the_order_of_their_ids() -> None:
    x, numbers = torch.zeros(3, 2000), torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(*arguments(x, 1.0, [(0, 0.75, 0.0)] * 3, numbers)).tolist() == [0, 750, 1499]
    assert draw(*arguments(x, 1.0, [(10, 1.0, 0.0)] * 3, numbers)).tolist()[2] == 1999  # top_k keeps ties


def test_rows_without_a_distribution_name_some_token() -> None:
    x = torch.randn(3, 100)
    x[0, 4], x[1, 50], x[2] = torch.nan, torch.inf, -torch.inf
    tokens = draw(*arguments(x, 1.0, [(5, 0.9, 0.1)] * 3, torch.full((3,), 0.5, dtype=torch.float64)))
    assert ((tokens >= 0) & (tokens < 100)).all()
