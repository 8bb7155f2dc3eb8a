"""Which layer a module of the checkpoint is, and what its adapter looks like there.

Decisions: a family says once how a checkpoint's tensors become the model's, and adapters take the same way: of `b @ a`
the rows (`b`) go through the family's renaming and rewriting as if they were the weight, whose columns it leaves alone.
So fused projections that are stored by head, split, or transposed need nothing of their own here. A family that changes
a weight otherwise, say by a norm, is found out by a second pass with twice the rows.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modelport.modeling.attention import CrossAttention
from modelport.modeling.embedding import Embedding, LMHead
from modelport.modeling.latent import UpProjection
from modelport.modeling.linear import Linear, MergedLinear
from modelport.modeling.moe import ExpertLinear, Experts, Router
from modelport.plugin import ModelInfo
from modelport.plugins.lora.layers import EmbeddingLayer, ExpertsLayer, LatentLayer, Layer, Pair, RouterLayer, Rows
from modelport.plugins.lora.peft import Factors

AnyLayer = Layer | LatentLayer | ExpertsLayer
Key = int | tuple[str, int, int]
"""A part of a layer; of experts the layer, the expert and the part."""


@dataclass(frozen=True)
class Target:
    """What a name stands for.

    :ivar keys: the parts, in order.
    :ivar widths: outputs of each.
    """

    layer: AnyLayer
    keys: tuple[Key, ...]
    widths: tuple[int, ...]
    in_features: int


def find_targets(model: nn.Module, rows: Rows, slots: int, dtype: torch.dtype) -> dict[str, Target]:
    """Every layer that takes adapters, by the names of its tensors without `.weight`; it is changed to do so."""
    states = {
        id(child)
        for module in model.modules()
        if any(isinstance(child, CrossAttention) for child in module.children())
        for child in module.children()
        if isinstance(child, MergedLinear)
    }
    found: dict[str, Target] = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, UpProjection):
            layer = LatentLayer(module, rows, slots, dtype)
            found[path] = Target(layer, (0,), layer.widths, layer.in_features)
        elif isinstance(module, Linear):
            widths = [width for _, width in module.parts] or [module.out_features]
            layer = Layer(module, rows, slots, module.in_features, widths, dtype, id(module) in states)
            found[path] = Target(layer, tuple(range(len(widths))), layer.widths, layer.in_features)
            for part, (name, width) in enumerate(module.parts):
                found[_beside(path, name)] = Target(layer, (part,), (width,), layer.in_features)
        elif isinstance(module, Router):
            count, size = module.weight.shape
            found[path] = Target(RouterLayer(module, rows, slots, size, dtype), (0,), (count,), size)
        elif isinstance(module, Embedding):
            found[path] = Target(
                EmbeddingLayer(module, rows, slots, dtype), (0,), (module.num_embeddings,), module.size
            )
        elif isinstance(module, LMHead):
            count = module.tied[0].num_embeddings if module.is_tied else len(module.weight)
            layer = Layer(module, rows, slots, module.hidden_size, (count,), dtype)
            found[path] = Target(layer, (0,), (count,), module.hidden_size)
        elif isinstance(module, Experts):
            found |= _experts(path, ExpertsLayer(module, rows, slots, dtype))
    return found


def _experts(path: str, layer: ExpertsLayer) -> Iterator[tuple[str, Target]]:
    for which in ("gate_up_proj", "down_proj"):
        linear: ExpertLinear = getattr(layer.module, which)
        for index, (name, width) in enumerate(linear.parts):
            expert, part = divmod(index, len(linear.names))
            yield f"{path}.{name}", Target(layer, ((which, expert, part),), (width,), linear.weight.shape[-1])


def _beside(path: str, name: str) -> str:
    parent = path.rpartition(".")[0]
    return f"{parent}.{name}" if parent else name


class Matcher:
    """Finds the layers of an adapter's modules."""

    def __init__(self, targets: dict[str, Target], info: ModelInfo):
        self.targets, self._rewrite = targets, info.rewrite

    def match(self, module: str, factors: Factors) -> list[tuple[AnyLayer, Key, Pair]]:
        """The pair of each part of each layer that `module` is.

        :raises ValueError: it is no layer that takes adapters, or has another shape.
        """
        # the rows that a checkpoint would hold, and the other factor
        rows, other = (factors.a.T, factors.b.T) if factors.is_embedding else (factors.b, factors.a)
        places = self._places(module, rows) or self._places(module, rows.T)  # GPT-2 stores its weights transposed
        if not places:
            raise ValueError(self._unknown(module))
        made = []
        for target, piece in places:
            is_table = isinstance(target.layer, EmbeddingLayer)
            if is_table != factors.is_embedding:
                kinds = "an embedding's", "a linear layer's"
                raise ValueError(f"{module!r} is {kinds[not is_table]} name, but its factors are {kinds[is_table]}")
            if other.shape[1] != target.in_features or len(piece) != sum(target.widths):
                raise ValueError(
                    f"the factors of {module!r} are for a layer {len(rows)} x {other.shape[1]}, the model's is "
                    f"{sum(target.widths)} x {target.in_features}; does the adapter belong to this model?"
                )
            if is_table:
                made.append((target.layer, 0, (piece.T, other.T * factors.scale)))
                continue
            for key, part in zip(target.keys, piece.split(target.widths), strict=True):
                made.append((target.layer, key, (other, part * factors.scale)))
        return made

    def _places(self, module: str, rows: Tensor) -> list[tuple[Target, Tensor]]:
        """Where the rows of a weight go; nothing when they do not come out as rows of known layers."""
        name = f"{module}.weight"
        try:
            out = dict(self._rewrite([(name, rows)]))
            twice = dict(self._rewrite([(name, 2 * rows)]))
        except (ValueError, RuntimeError, IndexError, KeyError, TypeError):
            return []
        rank = min(rows.shape)
        found = []
        for made, piece in out.items():
            target = self.targets.get(made.removesuffix(".weight"))
            if target is None or piece.dim() != 2:
                continue
            if rank not in piece.shape or not torch.equal(twice[made], 2 * piece):
                return []
            found.append((target, piece))
        columns = {piece.shape[1] for _, piece in found}
        if len(columns) > 1 or sum(piece.numel() for _, piece in found) != rows.numel():
            return []
        fits = all(len(piece) == sum(target.widths) for target, piece in found)
        return found if fits else []

    def _unknown(self, module: str) -> str:
        close = difflib.get_close_matches(module, self.targets, n=2, cutoff=0.6)
        hint = f"; near names: {', '.join(close)}" if close else ""
        return (
            f"the model has no layer {module!r} that takes an adapter of this shape{hint}; does the adapter belong to "
            "this model, and does it change linear layers and embeddings only?"
        )
