"""A draw without sorting: filters as thresholds, found digit by digit.

Weights are exp((logit - best) / temperature), so they lie in [0, 1], and the bits of such floats rise as they do. The
k-th greatest is the greatest number that k weights reach, the nucleus ends at the greatest whose followers hold its
share: either is searched 4 bits at a time, 16 candidates in one pass over a row that lies in the cache. A row without a
filter skips its search.

Legend: w: (rows, vocab) float32 weights; a program has one row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _weigh(x, best, temperature, w, vocab, x_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + row * x_row + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    weight = tl.exp((value - tl.load(best + row)) / tl.load(temperature + row))
    tl.store(w + row * vocab + token, weight, mask=token < vocab)


@triton.jit
def _search(w, vocab, wanted, floor, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The greatest number such that the weights that reach it, and `floor`, are `wanted` many, or sum to `wanted`."""
    digit = tl.arange(0, 16)
    found = 0
    for i in range(0, 8):
        shift = 28 - 4 * i
        candidate = found + (digit << shift)
        reached = tl.zeros((16,), tl.float64)
        for start in range(0, vocab, BLOCK):
            token = start + tl.arange(0, BLOCK)
            weight = tl.load(w + token, mask=token < vocab, other=0.0)
            bits = weight.to(tl.int32, bitcast=True)
            there = (bits[:, None] >= candidate[None, :]) & ((token < vocab) & (weight >= floor))[:, None]
            if COUNT:
                reached += tl.sum(there.to(tl.int32), 0).to(tl.float64)
            else:
                reached += tl.sum(tl.where(there, weight[:, None], 0.0), 0).to(tl.float64)
        # Digits beyond the first two of the top four would be beyond 1: negative as integers, so nothing to find.
        good = (reached >= wanted) & (candidate >= 0)
        found += tl.max(tl.where(good, digit, 0), 0) << shift
    return found


@triton.jit
def _kept(weight, token, vocab, floor, edge, equals, before):
    """Weights with zeros for what the filters leave out, and how many equal `edge` up to here."""
    equal = (token < vocab) & (weight == edge)
    place = before + tl.cumsum(equal.to(tl.int32), 0) - 1
    keep = (token < vocab) & (weight >= floor) & ((weight > edge) | (equal & (place < equals)))
    return tl.where(keep, weight, 0.0), before + tl.sum(equal.to(tl.int32), 0)


@triton.jit
def _draw(w, top_k, top_p, min_p, uniforms, tokens, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    w += row * vocab
    floor = tl.load(min_p + row)
    k = tl.load(top_k + row)
    if k > 0:
        least = _search(w, vocab, k.to(tl.float64), 0.0, True, BLOCK)
        floor = tl.maximum(floor, least.to(tl.float32, bitcast=True))
    edge, equals = -1.0, 0
    share = tl.load(top_p + row)
    if share < 1.0:
        total = tl.zeros((), tl.float64)
        for start in range(0, vocab, BLOCK):
            token = start + tl.arange(0, BLOCK)
            weight = tl.load(w + token, mask=token < vocab, other=0.0)
            total += tl.sum(tl.where(weight >= floor, weight, 0.0), 0).to(tl.float64)
        target = share * total
        edge = _search(w, vocab, target, floor, False, BLOCK).to(tl.float32, bitcast=True)
        above = tl.zeros((), tl.float64)
        for start in range(0, vocab, BLOCK):
            token = start + tl.arange(0, BLOCK)
            weight = tl.load(w + token, mask=token < vocab, other=0.0)
            above += tl.sum(tl.where((weight >= floor) & (weight > edge), weight, 0.0), 0).to(tl.float64)
        needed = tl.ceil((target - above) / tl.maximum(edge, 1e-38).to(tl.float64))
        equals = tl.maximum(1.0, tl.minimum(needed, vocab.to(tl.float64))).to(tl.int32)
    mass, before = tl.zeros((), tl.float64), tl.zeros((), tl.int32)
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        weight = tl.load(w + token, mask=token < vocab, other=0.0)
        kept, before = _kept(weight, token, vocab, floor, edge, equals, before)
        mass += tl.sum(kept, 0).to(tl.float64)
    target = tl.load(uniforms + row) * mass
    mass, before = tl.zeros((), tl.float64), tl.zeros((), tl.int32)
    chosen, last = vocab + tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        weight = tl.load(w + token, mask=token < vocab, other=0.0)
        kept, before = _kept(weight, token, vocab, floor, edge, equals, before)
        passed = (mass + tl.cumsum(kept, 0).to(tl.float64) > target) & (kept > 0)
        chosen = tl.minimum(chosen, tl.min(tl.where(passed, token, vocab), 0))
        last = tl.maximum(last, tl.max(tl.where(kept > 0, token, 0), 0))
        mass += tl.sum(kept, 0).to(tl.float64)
    tl.store(tokens + row, tl.where(chosen < vocab, chosen, last).to(tl.int64))


def draw(
    x: Tensor, best: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniforms: Tensor
) -> Tensor:
    """As `modelport.kernels.draw.draw`."""
    rows, vocab = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens = torch.empty(rows, dtype=torch.int64, device=x.device)
    if rows:
        w = torch.empty((rows, vocab), dtype=torch.float32, device=x.device)
        _weigh[(rows, triton.cdiv(vocab, BLOCK))](x, best, temperature, w, vocab, x.stride(0), BLOCK=BLOCK)
        _draw[(rows,)](w, top_k, top_p, min_p, uniforms, tokens, vocab, BLOCK=BLOCK, num_warps=8)
    return tokens
