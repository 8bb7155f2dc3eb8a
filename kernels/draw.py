"""A draw: the tokens that filters leave, and the one that a random number points at.

Decisions: all works on weights exp((logit - best) / temperature), which lie in [0, 1], so that a filter is a threshold.
The compiled kernel holds the weights of one row at a time. In torch nothing is sorted whole unless a row's nucleus is
wide, and long rows are searched in two levels, blocks first and then inside one, which is several times as fast on a
CPU as one reduction over the row. Sums across blocks are in float64.
Legend: weights: (rows, vocab) float32.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from modelport.kernels import cpu, gpu

BLOCK = 512  # tokens; of the order of the square root of a vocabulary, so that both levels of a search are short
FIRST_LOOK = 64  # tokens looked at for a nucleus before the look is widened; most are narrower
WIDER = 16  # times
ALL = 2**62  # more tokens than any vocabulary has


def uniform(seeds: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(n,) float64 in [0, 1): a hash (splitmix64) of each (seed, place), both (n,) uint64."""
    return (_mix(_mix(seeds) + places) >> np.uint64(11)) * 2.0**-53


def draw(
    x: Tensor, best: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniforms: Tensor
) -> Tensor:
    """A token of each row, (rows,) int64, with the probability that softmax(x / temperature) and the filters give it.

    x: (rows, vocab) of any floating type; best: (rows,) float32, the greatest of each row; temperature: (rows,)
    float32, above 0; top_k: (rows,) int64, 0 for all; top_p: (rows,) float64; min_p: (rows,) float32, a share of the
    greatest probability; uniforms: (rows,) float64 in [0, 1). Some token where the greatest is an infinity or a NaN.
    """
    if gpu.takes(x):
        return gpu.draw.draw(x, best, temperature, top_k, top_p, min_p, uniforms)
    if cpu.lib is not None and x.is_cpu:
        tokens = torch.empty(x.shape[0], dtype=torch.int64)
        if cpu.lib.draw(x, best, temperature, top_k, top_p, min_p, uniforms, tokens, cpu.threads()):
            return tokens
    return draw_reference(x, best, temperature, top_k, top_p, min_p, uniforms)


def draw_reference(
    x: Tensor, best: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniforms: Tensor
) -> Tensor:
    """Plain torch version of `draw`."""
    weights = torch.sub(x, best[:, None]).float().div_(temperature[:, None]).exp_()
    return pick(filter_weights(weights, top_k, top_p, min_p, int(top_k.max())), uniforms)


def pick(weights: Tensor, uniforms: Tensor) -> Tensor:
    """(rows,) int64 tokens: the inverse of the distribution function, tokens in the order of their ids.

    :param uniforms: (rows,) float64 in [0, 1).
    """
    cumulative = _cumulative(weights)
    target = uniforms * cumulative[:, -1]  # rounded, this is still below the sum
    block = (cumulative <= target[:, None]).sum(-1).clamp_(max=cumulative.shape[1] - 1)
    before = pad(cumulative, (1, 0)).gather(1, block[:, None])[:, 0]
    values, start = _inside(weights, block)
    inner = values.double().cumsum(-1)
    # A float32 sum of the block may exceed this one: stay below it, lest the search end on a token of weight 0.
    rest = torch.minimum(target - before, torch.nextafter(inner[:, -1], inner.new_zeros(())))
    tokens = start + (inner <= rest[:, None]).sum(-1)
    return tokens.clamp_(max=weights.shape[1] - 1)  # a row of NaN must not lead outside


def filter_weights(weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, max_k: int) -> Tensor:
    """Weights with 0 in place of every token that a filter leaves out.

    `top_k` keeps ties of its last token. `top_p` keeps the smallest set of the most likely tokens that has this share
    of what the other two have left, lower ids first among equals.

    :param top_k: (rows,) int64, 0 for all.
    :param top_p: (rows,) float64.
    :param min_p: (rows,) float32.
    :param max_k: the greatest of `top_k`.
    """
    if max_k == 0 and not (top_p < 1).any():
        return weights.where(weights >= min_p[:, None], 0.0)
    cut, equals = _cut(weights, top_k, top_p, min_p, max_k + FIRST_LOOK)
    kept = weights.where(weights >= cut[:, None], 0.0)
    rows = (equals < ALL).nonzero()[:, 0]
    if len(rows):
        equal = weights[rows] == cut[rows, None]
        row, token = equal.nonzero(as_tuple=True)  # in the order of rows, then tokens
        count = equal.sum(-1)
        place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]  # among its row's equals
        beyond = place >= equals[rows][row]
        kept[rows[row[beyond]], token[beyond]] = 0.0
    return kept


def _cut(weights: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, look: int) -> tuple[Tensor, Tensor]:
    """The least weight that each row keeps; and how many tokens of just this weight it keeps.

    :param look: how many of a row's best tokens to look at; rows for which this is too few are looked at again.
    :return: (rows,) float32, (rows,) int64.
    """
    look = min(look, weights.shape[1])
    top = weights.topk(look, dim=-1).values  # (rows, look), best first
    last = top.gather(1, (top_k - 1).clamp(min=0)[:, None])[:, 0]
    floor = torch.maximum(torch.where(top_k > 0, last, 0.0), min_p)  # what top_k and min_p keep is not below this
    shared = top_p < 1
    equals = torch.full_like(top_k, ALL)
    if not shared.any():
        return floor, equals

    mass = top.where(top >= floor[:, None], 0.0).double().cumsum(-1)
    total = torch.where(floor > 0, mass[:, -1], _cumulative(weights)[:, -1])
    # The token that completes the share; clamped where rounding, or a look too short, leaves none.
    place = (mass < (top_p * total)[:, None]).sum(-1).clamp_(max=look - 1)
    edge, after = top.gather(1, torch.stack([place, (place + 1).clamp_(max=look - 1)], 1)).unbind(1)
    cut = torch.where(shared, edge, floor)
    split = shared & (after == edge) & (place < look - 1)  # only some of equal tokens are needed
    position = (top == edge[:, None]).cumsum(-1).gather(1, place[:, None])[:, 0]
    equals = torch.where(split, position, equals)

    enough = torch.where(floor > 0, top[:, -1] < floor, place < look - 1)  # nothing beyond the look matters
    rows = (shared & ~enough).nonzero()[:, 0]
    if len(rows) and look < weights.shape[1]:
        cut[rows], equals[rows] = _cut(weights[rows], top_k[rows], top_p[rows], min_p[rows], look * WIDER)
    return cut, equals


def _mix(state: np.ndarray) -> np.ndarray:
    z = state + np.uint64(0x9E3779B97F4A7C15)  # arrays of uint64 wrap around, as they should here
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """The whole blocks of each row, (rows, n, BLOCK), and what is left of it, (rows, less than BLOCK); views."""
    n = x.shape[1] // BLOCK
    return x[:, : n * BLOCK].unflatten(1, (n, BLOCK)), x[:, n * BLOCK :]


def _inside(x: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """One block of each row, (rows, BLOCK), with 0 beyond the row's end; and the place where each begins."""
    start = block * BLOCK
    places = start[:, None] + torch.arange(BLOCK, device=x.device)
    values = x.gather(1, places.clamp(max=x.shape[1] - 1))
    return values.masked_fill_(places >= x.shape[1], 0.0), start


def _cumulative(weights: Tensor) -> Tensor:
    """(rows, blocks) float64: the sum of each block and all before it."""
    whole, rest = _blocks(weights)
    sums = [whole.sum(-1), rest.sum(-1, keepdim=True)] if rest.shape[1] else [whole.sum(-1)]
    return torch.cat(sums, 1).double().cumsum(-1)
