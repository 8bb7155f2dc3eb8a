"""`model.adapters`: reads adapters, and puts them into slots."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from modelport.batch import Adapted
from modelport.plugin import ModelInfo
from modelport.plugins.lora.layers import Pair, Rows
from modelport.plugins.lora.matching import AnyLayer, Key, Matcher, find_targets
from modelport.plugins.lora.peft import read_peft


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """An adapter that fits the model.

    :ivar pairs: by layer (its number) and part.
    """

    path: Path
    digest: bytes
    pairs: dict[int, dict[Key, Pair]]


class LoraAdapters:
    """Serves the adapters of one model, or of one place's part of it (`modelport.modeling.adapters.Adapters`)."""

    def __init__(self, model: nn.Module, info: ModelInfo):
        self._rows, self._dtype, self._device = Rows(), info.dtype, info.device
        self._most_rank = info.engine.max_lora_rank
        targets = find_targets(model, self._rows, info.engine.max_loras, info.dtype)
        self._matcher = Matcher(targets, info)
        self._layers: list[AnyLayer] = list({id(t.layer): t.layer for t in targets.values()}.values())
        self._number = {id(layer): number for number, layer in enumerate(self._layers)}
        self._model, self._here = [model], None  # in a list: a module would become a part of this model's part

    def read(self, path: Path) -> LoraAdapter:
        read = read_peft(path, self._most_rank)
        pairs: dict[int, dict[Key, Pair]] = {}
        for module, factors in read.factors.items():
            for layer, key, (a, b) in self._matcher.match(module, factors):
                of_layer = pairs.setdefault(self._number[id(layer)], {})
                if key in of_layer:
                    raise ValueError(f"{module!r} changes a layer that another module of the adapter changes too")
                of_layer[key] = a.to(self._dtype), b.to(self._dtype)
                if self._dtype == torch.float16 and not all(torch.isfinite(part).all() for part in of_layer[key]):
                    raise ValueError(f"the factors of {module!r} are infinite as {self._dtype}; use a wider dtype")
        return LoraAdapter(read.path.absolute(), read.digest, pairs)

    def place(self, slot: int, adapter: LoraAdapter) -> bool:
        if self._here is None:  # a place holds a part of the layers only
            held = set(map(id, self._model[0].modules()))
            self._here = [n for n, layer in enumerate(self._layers) if id(layer.module) in held]
        moved = [self._layers[n].place(slot, adapter.pairs.get(n, {}), self._device) for n in self._here]
        return any(moved)

    def begin(self, rows: Adapted | int | None) -> None:
        self._rows.now = rows
