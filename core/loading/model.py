"""Build an engine's model: architecture and configuration, empty model, plugins' transformations, weights, tables."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import nn

from modelport.config import EngineConfig, TextConfig
from modelport.loading.checkpoint import open_weights
from modelport.loading.loader import WeightsError, fill_random, load_weights, tensor_names
from modelport.modeling.embedding import Embedding, LMHead
from modelport.modeling.linear import Linear
from modelport.modeling.moe import ExpertLinear
from modelport.plugin import Architecture, Checkpoint, ModelInfo, Plugins

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Description:
    """What is known of a model before its weights are read."""

    checkpoint: Checkpoint
    raw_config: dict
    architecture: Architecture
    config: TextConfig
    dtype: torch.dtype
    device: torch.device


def describe(checkpoint: Checkpoint, raw_config: dict, plugins: Plugins, engine: EngineConfig) -> Description:
    """Find the architecture and validate the configuration.

    :raises ValueError: an architecture nobody provides, an incomplete configuration, an unknown dtype or device.
    """
    architecture = plugins.find(raw_config["architectures"])
    try:
        config = architecture.config.model_validate(raw_config)
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}" for e in error.errors())
        raise ValueError(
            f"the configuration of {checkpoint.name!r} does not fit {architecture.name}: {details}"
        ) from None
    name = engine.dtype if engine.dtype != "auto" else (config.dtype or "float32")
    if name not in DTYPES:
        raise ValueError(
            f"dtype {name!r} in the configuration of {checkpoint.name!r} cannot be run; give dtype='float32'"
        )
    return Description(checkpoint, raw_config, architecture, config, DTYPES[name], pick_device(engine.device))


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
        model = about.architecture.model_class()(about.config)
        info = ModelInfo(about.architecture, about.config, engine, about.checkpoint)
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
    if divide is not None:
        elsewhere = tensor_names(model)
        divide(model)
    if engine.quantization is not None:
        _quantise(model, engine.quantization, plugins)
    if engine.load_format == "dummy":
        fill_random(model, about.dtype, about.device, engine.seed)
    else:
        weights = open_weights(about.checkpoint, about.raw_config, plugins)
        weights = _shown(weights, progress)
        load_weights(model, weights, about.architecture, about.config, about.dtype, about.device, elsewhere)
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
    return model.eval()


def _quantise(model: nn.Module, name: str, plugins: Plugins) -> None:
    packer = plugins.hook.quantization(name=name)
    if packer is None:
        raise ValueError(f"quantization={name!r}: no plugin knows this method; 'int8' is built in")
    for module in model.modules():
        if isinstance(module, Linear | LMHead | Embedding | ExpertLinear):
            module.packer = packer


def _shown(weights, progress: bool):
    if not progress:
        return weights
    from tqdm import tqdm

    return tqdm(weights, desc="Loading weights", unit=" tensors", leave=False, delay=1.0)
