"""LoRA adapters, of which every request may choose its own (Hu et al., 2021, arXiv 2106.09685).

Decisions: public hooks only; every layer that computes a product takes adapters, found in the empty model by its kind,
so no family says anything about them. Adapters are read as PEFT writes them (`peft.py`), matched with layers through
the family's own renaming and rewriting (`matching.py`), and lie stacked beside the layers (`layers.py`).
"""

from torch import nn

from modelport.plugin import ModelInfo, hookimpl
from modelport.plugins.lora.store import LoraAdapters

modelport_api = 1


@hookimpl
def transform_model(model: nn.Module, info: ModelInfo) -> None:
    if info.engine.takes_adapters:
        model.adapters = LoraAdapters(model, info)
