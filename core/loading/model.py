"""Build an engine's model: architecture and configuration, empty model, plugins' transformations, weights, tables."""

import ctypes
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from torch import nn

from modelport.config import EngineConfig, TextConfig
from modelport.loading.checkpoint import open_weights
from modelport.loading.loader import WeightsError, fill_random, load_weights, rewritten, tensor_names, unused_names
from modelport.modeling.embedding import Embedding, LMHead
from modelport.modeling.linear import Linear
from modelport.modeling.moe import ExpertLinear
from modelport.plugin import Architecture, Checkpoint, ModelInfo, Plugins

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Description:
    """What is known of a model before its weights are read.

    :ivar config: what the model is made of.
    :ivar language: architecture and configuration of the language model inside it, if it has one of its own.
    """

    checkpoint: Checkpoint
    raw_config: dict
    architecture: Architecture
    config: BaseModel
    dtype: torch.dtype
    device: torch.device
    language: tuple[Architecture, TextConfig] | None = None

    @property
    def text(self) -> TextConfig:
        """What the engine reads: sizes of the language model, its special tokens."""
        return self.config if self.language is None else self.language[1]


def describe(checkpoint: Checkpoint, raw_config: dict, plugins: Plugins, engine: EngineConfig) -> Description:
    """Find the architecture and validate the configuration.

    :raises ValueError: an architecture nobody provides, an incomplete configuration, an unknown dtype or device.
    """
    architecture = plugins.find(raw_config["architectures"])
    config = _validated(architecture, {}, raw_config, checkpoint)
    language = None
    if architecture.language is not None:
        entries = _language_entries(architecture, raw_config, checkpoint)
        inner = plugins.find_language(entries)
        language = inner, _validated(inner, inner.defaults, entries, checkpoint)
    text = config if language is None else language[1]
    name = engine.dtype if engine.dtype != "auto" else (text.dtype or "float32")
    if name not in DTYPES:
        raise ValueError(
            f"dtype {name!r} in the configuration of {checkpoint.name!r} cannot be run; give dtype='float32'"
        )
    return Description(checkpoint, raw_config, architecture, config, DTYPES[name], pick_device(engine.device), language)


def text_config(architecture: Architecture, entries: dict, plugins: Plugins) -> TextConfig:
    """What the engine reads of a configuration: its own, or its language model's.

    :param entries: of `config.json`.
    :raises ValueError: entries are missing or do not fit.
    """
    checkpoint = Checkpoint(Path(), architecture.name)
    if architecture.language is None:
        return _validated(architecture, {}, entries, checkpoint)
    inner_entries = _language_entries(architecture, entries, checkpoint)
    inner = plugins.find_language(inner_entries)
    return _validated(inner, inner.defaults, inner_entries, checkpoint)


def _validated(
    architecture: Architecture, defaults: Mapping[str, Any], entries: Mapping[str, Any], checkpoint: Checkpoint
) -> BaseModel:
    try:
        return architecture.config.model_validate({**defaults, **entries})
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}" for e in error.errors())
        raise ValueError(
            f"the configuration of {checkpoint.name!r} does not fit {architecture.name}: {details}"
        ) from None


def _language_entries(architecture: Architecture, raw_config: dict, checkpoint: Checkpoint) -> dict[str, Any]:
    """The language model's own entries; what concerns the whole may stand outside them."""
    if callable(architecture.language):
        found = architecture.language(raw_config)
    else:
        found = raw_config.get(architecture.language)
    if not isinstance(found, dict):
        raise ValueError(
            f"the configuration of {checkpoint.name!r} does not fit {architecture.name}: {architecture.language!r}, "
            f"the entries of its language model, is {found!r}"
        )
    found = {key: value for key, value in found.items() if value is not None}
    outer = {key: raw_config.get(key) for key in ("dtype", "torch_dtype", "bos_token_id", "eos_token_id")}
    return {key: value for key, value in outer.items() if value is not None} | found


def pick_device(name: str) -> torch.device:
    """:raises ValueError: a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is not known; use 'cpu', 'cuda' or 'auto'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: this torch sees no CUDA device; use device='cpu'")
    return device


def build_empty(about: Description, plugins: Plugins, engine: EngineConfig) -> nn.Module:
    """The model on the meta device, where it takes no memory, as plugins have transformed it."""
    with torch.device("meta"):
        if about.language is None:
            model = about.architecture.model_class()(about.config)
        else:
            inner, config = about.language
            model = about.architecture.model_class()(about.config, inner.model_class()(config))
        info = ModelInfo(
            about.architecture, about.config, engine, about.checkpoint, about.dtype, about.device,
            lambda stream: rewritten(stream, about.architecture, about.config, about.language),
        )  # fmt: skip
        plugins.hook.transform_model(model=model, info=info)
    return model


def build(
    about: Description,
    plugins: Plugins,
    engine: EngineConfig,
    max_model_len: int,
    progress: bool,
    divide: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """The model with its weights and tables, ready for a cache.

    :param divide: takes away what other places hold, before anything is read.
    :raises WeightsError: the checkpoint's tensors do not fit (see `load_weights`).
    """
    model = build_empty(about, plugins, engine)
    elsewhere: set[str] = set()
    unused: list[str] = []
    if divide is not None:
        elsewhere, unused = tensor_names(model), list(unused_names(model))
        divide(model)
    if engine.quantization is not None:
        _quantise(model, engine.quantization, plugins)
    if engine.load_format == "dummy":
        fill_random(model, about.dtype, about.device, engine.seed)
    else:
        weights = open_weights(about.checkpoint, about.raw_config, plugins)
        weights = _shown(weights, progress)
        load_weights(
            model,
            weights,
            about.architecture,
            about.config,
            about.dtype,
            about.device,
            elsewhere,
            about.language,
            unused,
        )
    for module in model.modules():
        build_tables = getattr(module, "build_tables", None)
        if build_tables is not None:
            build_tables(about.device, max_model_len)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise WeightsError(
            f"{about.architecture.name} keeps tensors that nothing fills: {', '.join(left[:5])}; "
            "compute tables in a `build_tables(device, max_len)` method"
        )
    _give_back_memory()
    return model.eval()


def _give_back_memory() -> None:
    """What weights were read into, and is free again, goes to the system; glibc would keep it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _quantise(model: nn.Module, name: str, plugins: Plugins) -> None:
    packer = plugins.hook.quantization(name=name)
    if packer is None:
        raise ValueError(f"quantization={name!r}: no plugin knows this method; 'int8' and 'fp8' are built in")
    for module in model.modules():
        if isinstance(module, Linear | LMHead | Embedding | ExpertLinear):
            module.packer = packer


def _shown(weights, progress: bool):
    if not progress:
        return weights
    from tqdm import tqdm

    return tqdm(weights, desc="Loading weights", unit=" tensors", leave=False, delay=1.0)
