"""Adapter folders as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`.

Decisions: the tensors say which modules are changed, the configuration how strongly; where the two disagree, or where
an adapter needs more than low-rank products, it is refused with the reason.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<which>[AB])(\.default)?(\.weight)?")

_FIRST_FACTORS = ("lora_A.weight", "lora_embedding_A")


class AdapterConfig(BaseModel):
    """`adapter_config.json`, as far as it matters once an adapter is trained."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    peft_type: str
    r: int = Field(gt=0)
    lora_alpha: float = 8
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    modules_to_save: list[str] | None = None
    target_parameters: list[str] | None = None
    trainable_token_indices: dict[str, list[int]] | list[int] | None = None
    init_lora_weights: bool | str = True

    def rank(self, module: str) -> int:
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """Factor on `B @ A`: alpha over the rank, or over its root (rsLoRA, arXiv 2312.03732)."""
        rank, alpha = self.rank(module), _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _by_pattern(patterns: dict[str, Any], module: str, default: float) -> float:
    """Keys are regular expressions of the end of a module's name; the first that matches counts."""
    if not patterns:
        return default
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)), default)


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to a module's weight: `scale * b @ a`; of an embedding, to its transpose.

    :ivar a: (rank, in); :ivar b: (out, rank); both float32.
    """

    a: Tensor
    b: Tensor
    scale: float
    is_embedding: bool = False


@dataclass(frozen=True)
class PeftAdapter:
    """:ivar factors: by the module's name in the base model's checkpoint."""

    path: Path
    digest: bytes
    factors: dict[str, Factors]


def read_peft(folder: Path, most_rank: int) -> PeftAdapter:
    """Read and check an adapter by itself.

    :raises FileNotFoundError: one of the two files is missing.
    :raises ValueError: it is no LoRA adapter, is damaged, or needs what is not served.
    """
    config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config_file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no adapter_config.json; give the folder that PEFT's save_pretrained wrote"
        )
    if not weights_file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        cure = "it has only a pickled one, which is not read; save it again with safe_serialization=True"
        raise FileNotFoundError(
            f"{folder} holds no adapter_model.safetensors; " + (cure if pickled else "is it complete?")
        )
    written, bytes_ = config_file.read_bytes(), weights_file.read_bytes()
    config = _config(config_file, written)
    try:
        tensors = load(bytes_)
    except SafetensorError as error:
        raise ValueError(f"{weights_file} is damaged ({error}); copy it again") from None
    digest = _digest(written, bytes_)
    return PeftAdapter(folder, digest, dict(_factors(tensors, config, most_rank)))


def _digest(*parts: bytes) -> bytes:
    found = sha256()
    for part in parts:
        found.update(b"%d:" % len(part))
        found.update(part)
    return found.digest()


def _config(file: Path, written: bytes) -> AdapterConfig:
    try:
        config = AdapterConfig.model_validate_json(written)
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'content'}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{file} is no configuration of an adapter: {details}") from None
    if config.peft_type.upper() != "LORA":
        raise ValueError(f"{file}: peft_type {config.peft_type!r} is not served; only LORA is")
    init = config.init_lora_weights
    refused = {
        "use_dora (weight-decomposed adapters); merge it into the model": config.use_dora,
        f"bias={config.bias!r}; train with bias='none', or merge it into the model": config.bias != "none",
        "lora_bias; merge it into the model": config.lora_bias,
        f"modules_to_save={config.modules_to_save}, whole layers; merge it into the model": config.modules_to_save,
        f"target_parameters={config.target_parameters}; train the experts' layers by name": config.target_parameters,
        "trainable_token_indices; merge it into the model": config.trainable_token_indices,
        f"init_lora_weights={init!r}, which changed the base model; save it with "
        "path_initial_model_for_weight_conversion": str(init).lower().startswith(("pissa", "olora", "corda", "loftq")),
    }
    for what, is_so in refused.items():
        if is_so:
            raise ValueError(f"{file} asks for {what}")
    return config


def _factors(tensors: dict[str, Tensor], config: AdapterConfig, most_rank: int) -> Iterator[tuple[str, Factors]]:
    found: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    # with embeddings among its targets PEFT adds copies of the base model's tables
    copies = {name for name in tensors if name.endswith(".base_layer.weight")}
    for name, tensor in tensors.items():
        if name in copies and any(name.replace("base_layer.weight", end) in tensors for end in _FIRST_FACTORS):
            continue
        match = _FACTOR.fullmatch(name.removeprefix(_PREFIX))
        if match is None:
            raise ValueError(f"the tensor {name!r} is no part of a low-rank product; merge the adapter into the model")
        if not tensor.is_floating_point() or tensor.dim() != 2:
            raise ValueError(
                f"the tensor {name!r} has shape {tuple(tensor.shape)} and type {tensor.dtype}; is it damaged?"
            )
        if not torch.isfinite(tensor.sum(dtype=torch.float32)):  # one pass; a finite sum means that every element is
            raise ValueError(f"the tensor {name!r} holds NaN or infinity; the adapter cannot be used")
        found.setdefault(match["module"], {})[match["which"]] = tensor.float()
        if match["embedding"]:
            embeddings.add(match["module"])
    if not found:
        raise ValueError("the adapter holds no tensors")
    for module, pair in found.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"of {module!r} only lora_{'A' if 'A' in pair else 'B'} is there; is the file complete?")
        a, b, rank = pair["A"], pair["B"], config.rank(module)
        if len(a) != rank or b.shape[1] != rank:
            raise ValueError(
                f"{module!r} has factors {tuple(a.shape)} and {tuple(b.shape)}, but adapter_config.json gives it rank "
                f"{rank}; do the two files belong together?"
            )
        if rank > most_rank:
            raise ValueError(f"{module!r} has rank {rank}, more than max_lora_rank={most_rank}; raise the setting")
        yield module, Factors(a, b, config.scale(module), module in embeddings)
