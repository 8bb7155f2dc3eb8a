"""Linear layers over weights packed once at load.

The packed form replaces the weight, it is not a second copy: `PackedWeight.rows` still looks up embeddings in it and
`PackedWeight.unpack` gives the matrix back. Blocked layout, 16 outputs (lanes) to a panel, so that one panel is one
sequential stream for one-row products and the B operand of the matrix kernel for many rows:
  float32, float16: (panels, in, 16);  bfloat16, int8: (panels, in / 2, 16, 2), pairs as dot-product instructions want.
Against int8, rows of bfloat16 and float16 become int16 with a scale for every 128 values: sums of integers take half
the instructions, and what the rows lose is a hundredth of what the weights lost.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from modelport.kernels import cpu, gpu

LANES = 16


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight (out_features, in_features) as `linear` wants it; make it with `pack`, `pack_int8` or `pack_fp8`."""

    data: Tensor  # blocked layout, or (out_features, in_features) when not blocked
    out_features: int
    in_features: int
    blocked: bool
    scales: Tensor | None = None  # (out_features,) float32, for 8 bits

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def rows(self, indices: Tensor) -> Tensor:
        """Rows of the weight for indices: (n,) -> (n, in_features); float32 for 8 bits. An embedding look-up."""
        if self.blocked:
            panel, lane = indices // LANES, indices % LANES
            if self.data.dim() == 4:
                found = self.data[panel, :, lane].flatten(1)[:, : self.in_features]  # drops the pad of an odd width
            else:
                found = self.data[panel, :, lane]
        else:
            found = self.data[indices]
        return found if self.scales is None else found.float() * self.scales[indices, None]

    def unpack(self) -> Tensor:
        """The weight (out_features, in_features) again; float32 for 8 bits."""
        return self.rows(torch.arange(self.out_features, device=self.data.device))


def _block(weight: Tensor) -> Tensor:
    out, width = weight.shape
    pair = weight.dtype in (torch.bfloat16, torch.int8)
    weight = F.pad(weight, (0, width % 2 if pair else 0, 0, -out % LANES))
    panels = weight.view(-1, LANES, weight.shape[1])
    if pair:
        return panels.unflatten(2, (-1, 2)).transpose(1, 2).contiguous()
    return panels.transpose(1, 2).contiguous()


def _check_weight(weight: Tensor) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"pack: want a floating point weight (out, in), got {tuple(weight.shape)} {weight.dtype}")


def pack(weight: Tensor) -> PackedWeight:
    """Lay out weight: (out, in) float32, bfloat16 or float16 for `linear`, in the same dtype. Called once, at load."""
    _check_weight(weight)
    weight = weight.detach()
    if cpu.lib is not None and weight.is_cpu and weight.dtype in cpu.FLOATS and weight.numel():
        return PackedWeight(_block(weight), *weight.shape, blocked=True)
    return PackedWeight(weight, *weight.shape, blocked=False)


def pack_int8(weight: Tensor) -> PackedWeight:
    """Quantise weight: (out, in) to int8, symmetric, one float32 scale per output, and lay it out for `linear`."""
    _check_weight(weight)
    wide = weight.detach().float()
    scales = (wide.abs().amax(1) / 127.0).clamp_min(torch.finfo(torch.float32).tiny)
    codes = torch.round(wide / scales[:, None]).clamp_(-127, 127).to(torch.int8)
    if cpu.lib is not None and weight.is_cpu and weight.numel():
        return PackedWeight(_block(codes), *weight.shape, blocked=True, scales=scales)
    return PackedWeight(codes, *weight.shape, blocked=False, scales=scales)


def pack_fp8(weight: Tensor) -> PackedWeight:
    """Round weight: (out, in) to 8-bit floats (e4m3), with one float32 scale per output. Called once, at load.

    On a GPU its kernel reads them; on a CPU, which has no instructions for them, every product widens them first.
    """
    _check_weight(weight)
    wide = weight.detach().float()
    most = torch.finfo(torch.float8_e4m3fn).max
    scales = (wide.abs().amax(1) / most).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (wide / scales[:, None]).clamp_(-most, most).to(torch.float8_e4m3fn)
    return PackedWeight(codes, *weight.shape, blocked=False, scales=scales)


def linear_reference(
    x: Tensor, packed: PackedWeight, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Plain torch version of `linear`."""
    weight = packed.unpack() if packed.blocked else packed.data
    if packed.scales is not None:
        # Scaling the result, not the weight, keeps the codes exact in x.dtype; but a float16 would not hold the sums.
        codes = torch.round(weight / packed.scales[:, None]) if packed.blocked else weight
        held = torch.float32 if x.dtype == torch.float16 else x.dtype
        out = F.linear(x.to(held), codes.to(held)).float() * packed.scales
        out = out if bias is None else out + bias
        return (out if residual is None else out + residual).to(x.dtype)
    out = F.linear(x, weight, bias)
    return out if residual is None else out + residual


def linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias + residual -> (tokens, out), in x.dtype, summed in float32.

    x: (tokens, in) in the weight's dtype (any of the three for int8); bias: (out,); residual: (tokens, out).
    """
    if cpu.lib is not None and packed.blocked and x.dim() == 2 and x.shape[1] == packed.in_features:
        out = torch.empty((x.shape[0], packed.out_features), dtype=x.dtype)
        if cpu.lib.linear(x, packed.data, packed.scales, bias, residual, out, cpu.threads()):
            return out
    if x.dim() != 2 or x.shape[1] != packed.in_features:
        raise ValueError(f"linear: x {tuple(x.shape)} must be (tokens, {packed.in_features})")
    if packed.scales is None and x.dtype != packed.dtype:
        raise ValueError(f"linear: x is {x.dtype}, the packed weight {packed.dtype}; convert x")
    tokens, out_features = x.shape[0], packed.out_features
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"linear: bias {tuple(bias.shape)} must be ({out_features},)")
    if residual is not None and residual.shape != (tokens, out_features):
        raise ValueError(f"linear: residual {tuple(residual.shape)} must be ({tokens}, {out_features})")
    if packed.scales is not None and not packed.blocked and gpu.takes(x):
        return gpu.linear.linear(x, packed.data, packed.scales, bias, residual)
    if x.is_cuda and packed.scales is None and residual is not None and residual.dtype == x.dtype:
        # One product that adds, not two passes over the result.
        out = torch.addmm(residual, x, packed.data.t())
        return out if bias is None else out.add_(bias)
    return linear_reference(x, packed, bias, residual)
