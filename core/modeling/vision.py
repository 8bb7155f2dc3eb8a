"""Parts of image towers: configuration, patches, attention and layers, and which layers' states a model reads.

Decisions: a tower's rows of all images lie packed one behind another, (rows, hidden), and `starts` says where each
attention segment begins, so that images of any sizes share every product and none sees another. Layers above the last
one whose states are read are not built; `unused` names their tensors, so that the loader knows them.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from modelport.kernels import linear as kernel
from modelport.kernels.rope import rotate_
from modelport.modeling.attention import EncoderAttention
from modelport.modeling.linear import QKVLinear, RowLinear
from modelport.modeling.mlp import MLP
from modelport.modeling.norm import LayerNorm


class VisionConfig(BaseModel):
    """The common part of `vision_config` in a `config.json`; each kind of tower has its own defaults.

    Where a family takes several kinds, `model_type` tells them apart:
    `Annotated[ClipVisionConfig | SiglipVisionConfig, Field(discriminator="model_type")]`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int = 3
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float = 1e-6

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> "VisionConfig":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} of the tower is not a multiple of its "
                             f"num_attention_heads={self.num_attention_heads}; check vision_config")  # fmt: skip
        return self

    @property
    def patches(self) -> int:
        """In a whole image."""
        return (self.image_size // self.patch_size) ** 2


class PatchEmbedding(nn.Module):
    """A convolution that does not overlap, as one product over patches.

    weight: (out_features, channels, *patch), patch: (height, width) or (frames, height, width).
    """

    def __init__(self, channels: int, out_features: int, patch: tuple[int, ...], bias: bool = False):
        super().__init__()
        self.channels, self.patch = channels, patch
        self.weight = nn.Parameter(torch.empty(out_features, channels, *patch), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.packed: kernel.PackedWeight | None = None

    def pack(self) -> None:
        """Swap the loaded weight for its packed form; called once by the core."""
        self.packed = kernel.pack(self.weight.data.flatten(1))
        self.weight = None

    def cut(self, pixels: Tensor) -> Tensor:
        """pixels: (images, channels, height, width) -> (images * patches, channels * patch), images row by row.

        What is left over at the right and at the bottom is dropped, as a convolution does.
        """
        high, wide = self.patch
        rows, columns = pixels.shape[2] // high, pixels.shape[3] // wide
        cut = pixels[:, :, : rows * high, : columns * wide].unflatten(3, (columns, wide)).unflatten(2, (rows, high))
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Images as `cut` takes them, or patches (patches, channels * patch) -> (patches, out_features)."""
        patches = self.cut(x) if x.dim() == 4 else x
        return kernel.linear(patches.to(self.packed.dtype).contiguous(), self.packed, self.bias)


class VisionAttention(nn.Module):
    """Projections and attention within segments; the residual is added in the last product.

    :param names: of the fused projection and of the output's; the first counts where the checkpoint stores it fused.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, bias: bool = True, names: tuple[str, str] = ("qkv_proj", "out_proj")
    ):
        super().__init__()
        self.names, head_dim = names, hidden_size // num_heads
        self.add_module(names[0], QKVLinear(hidden_size, num_heads, num_heads, head_dim, bias))
        self.attn = EncoderAttention(head_dim)
        self.add_module(names[1], RowLinear(hidden_size, hidden_size, bias))

    def forward(self, x: Tensor, residual: Tensor | None, starts: Tensor, angles: Tensor | None = None) -> Tensor:
        """x, residual: (rows, hidden), starts: (segments + 1,), angles: as `axial_angles` gives them."""
        qkv, out = self.names
        q, k, v = getattr(self, qkv)(x)
        if angles is not None:
            row = torch.arange(len(x), device=x.device)
            rotate_(q, row, angles)
            rotate_(k, row, angles)
        return getattr(self, out)(self.attn(q, k, v, starts), residual)


class VisionLayer(nn.Module):
    """Attention and a plain feed-forward block, each behind a LayerNorm (Dosovitskiy et al., 2020)."""

    def __init__(self, cfg: VisionConfig, names: tuple[str, str] = ("qkv_proj", "out_proj")):
        super().__init__()
        self.layer_norm1 = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.self_attn = VisionAttention(cfg.hidden_size, cfg.num_attention_heads, names=names)
        self.layer_norm2 = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size, cfg.hidden_act, bias=True, names=("fc1", "fc2"))

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        """x: (rows, hidden), starts: (segments + 1,) -> (rows, hidden)."""
        x = self.self_attn(self.layer_norm1(x), x, starts)
        return self.mlp(self.layer_norm2(x), x)


def feature_layers(layers: int | Sequence[int] | None, num_hidden_layers: int) -> tuple[int, ...]:
    """Which states to read, counted from 0: state 0 goes into the layers, state i comes out of layer i - 1.

    :param layers: `vision_feature_layer` of a configuration: -1 is the last state; None also.
    :raises ValueError: a state that there is not.
    """
    wanted = (-1,) if layers is None else (layers,) if isinstance(layers, int) else tuple(layers)
    for layer in wanted:
        if not -num_hidden_layers - 1 <= layer <= num_hidden_layers:
            raise ValueError(f"vision_feature_layer={layers}: {num_hidden_layers} layers have the states 0 to "
                             f"{num_hidden_layers}, or -{num_hidden_layers + 1} to -1; check config.json")  # fmt: skip
    return tuple(layer % (num_hidden_layers + 1) for layer in wanted)


def layer_states(layers: Iterable[nn.Module], x: Tensor, wanted: Sequence[int], *where: Tensor) -> Tensor:
    """Run `layers` on x: (rows, hidden) and join the `wanted` states: (rows, hidden * len(wanted)).

    :param wanted: as `feature_layers` gives them.
    :param where: what every layer takes beside x.
    """
    states = {0: x}
    for number, layer in enumerate(layers, 1):
        x = layer(x, *where)
        if number in wanted:
            states[number] = x
    return states[wanted[0]] if len(wanted) == 1 else torch.cat([states[number] for number in wanted], dim=1)


def segments(lengths: Sequence[int], device: torch.device) -> Tensor:
    """First row of each segment and the end of the last: (segments + 1,) int64."""
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def axial_angles(rows: Tensor, columns: Tensor, row_frequencies: Tensor, column_frequencies: Tensor) -> Tensor:
    """Rotary positions in two dimensions: half of a head's pairs turns with the row, the other half with the column.

    :param rows: (patches,) int64; `columns` as well.
    :param row_frequencies: (head_dim / 4,) float32, radians per patch; `column_frequencies` as well.
    :return: (patches, head_dim) float32, cosines then sines.
    """
    angles = torch.cat(
        [torch.outer(rows.float(), row_frequencies), torch.outer(columns.float(), column_frequencies)], 1
    )
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def grid_positions(frames: int, rows: int, columns: int, merge: int, device: torch.device) -> Tensor:
    """Row and column of every patch, (patches, 2) int64; the `merge` x `merge` that merge lie behind one another."""
    where = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))
    where = where.view(rows // merge, merge, columns // merge, merge, 2).transpose(1, 2)
    return where.reshape(-1, 2).repeat(frames, 1)


def axial_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """(dim / 2,) float32, radians per patch."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))
